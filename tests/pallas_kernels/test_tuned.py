"""Tables of tile sizes."""

import json
from pathlib import Path

import pytest

from pallas_kernels.device import describe
from pallas_kernels.matmul import mosaic_gpu, triton, triton_few_rows, tuned

CONFIGS = {"mosaic_gpu": mosaic_gpu, "triton_int8": triton, "triton_few_rows": triton_few_rows}
TABLES = sorted((Path(tuned.__file__).parent / "tuning").glob("*.json"))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of one device, "My GPU-2", that stands for the package's own."""
    (tmp_path / "tuning").mkdir()
    entry = {"kernel": "triton_int8", "m": 4, "n": 5, "k": 6, "best": {"warps": 8}}
    (tmp_path / "tuning" / "my_gpu_2.json").write_text(json.dumps({"entries": [entry]}))
    monkeypatch.setattr(tuned.resources, "files", lambda _: tmp_path)
    tuned._table.cache_clear()
    yield lambda kind: monkeypatch.setattr(tuned.device, "current", lambda: describe("gpu", kind))
    tuned._table.cache_clear()


def test_sizes_are_found_by_device_kernel_and_shape(table):
    table("My GPU-2")
    assert tuned.lookup("triton_int8", 4, 5, 6) == {"warps": 8}
    assert tuned.lookup("triton", 4, 5, 6) is None
    assert tuned.lookup("triton_int8", 4, 6, 5) is None


def test_a_device_without_a_table_has_no_sizes(table):
    table("My GPU-3")
    assert tuned.lookup("triton_int8", 4, 5, 6) is None


@pytest.mark.parametrize("file", TABLES)
def test_stored_sizes_are_the_fastest_that_were_timed(file):
    for entry in json.loads(file.read_text())["entries"]:
        timed = [t for t in entry["times"] if "seconds" in t]
        best = min(timed, key=lambda t: sorted(t["seconds"])[len(t["seconds"]) // 2])
        assert entry["best"] == best["config"]
        CONFIGS[entry["kernel"].replace("gpu_int8", "gpu")].Config(**entry["best"])
