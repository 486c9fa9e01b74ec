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
    """Tables of "My GPU-2" and of an H100 that stand for the package's own; what sets the GPU."""
    (tmp_path / "tuning").mkdir()

    def store(name, kind, *, warps, m=4):
        entry = {"kernel": "triton_int8", "m": m, "n": 5, "k": 6, "best": {"warps": warps}}
        table = {"device": kind, "processors": 132, "entries": [entry]}
        (tmp_path / "tuning" / name).write_text(json.dumps(table))

    def stand_on(kind, processors=132):
        monkeypatch.setattr(tuned.device, "current", lambda: describe("gpu", kind))
        monkeypatch.setattr(tuned.device, "processors", lambda: processors)

    store("my_gpu_2.json", "My GPU-2", warps=8)
    store("nvidia_h100_80gb_hbm3.json", "NVIDIA H100 80GB HBM3", warps=4)
    store("nvidia_h200_nvl.json", "NVIDIA H200 NVL", warps=2, m=8)
    monkeypatch.setattr(tuned.resources, "files", lambda _: tmp_path)
    caches = tuned._table, tuned._tables_like
    for cache in caches:
        cache.cache_clear()
    yield stand_on
    for cache in caches:
        cache.cache_clear()


def test_sizes_are_found_by_device_kernel_and_shape(table):
    table("My GPU-2")
    assert tuned.lookup("triton_int8", 4, 5, 6) == {"warps": 8}
    assert tuned.lookup("triton", 4, 5, 6) is None
    assert tuned.lookup("triton_int8", 4, 6, 5) is None


def test_a_device_without_a_table_has_no_sizes(table):
    table("My GPU-3")
    assert tuned.lookup("triton_int8", 4, 5, 6) is None


@pytest.mark.parametrize(
    ("kind", "processors", "m", "warps"),
    [
        ("NVIDIA H200", 132, 4, 4),
        ("NVIDIA H200", 132, 8, 2),
        ("NVIDIA H200 NVL", 132, 4, 4),  # what its own table lacks
        ("NVIDIA H200 NVL", 132, 8, 2),
        ("NVIDIA H100 PCIe", 114, 4, None),
        ("NVIDIA B200", 132, 4, None),
    ],
)
def test_sizes_of_its_generation_with_as_many_processors_serve(table, kind, processors, m, warps):
    table(kind, processors)
    found = tuned.lookup("triton_int8", m, 5, 6)
    assert found == (warps and {"warps": warps})


@pytest.mark.parametrize("file", TABLES)
def test_stored_sizes_are_the_fastest_that_were_timed(file):
    stored = json.loads(file.read_text())
    assert file.name == tuned.file_name(stored["device"])
    assert stored["processors"] > 0
    for entry in stored["entries"]:
        timed = [t for t in entry["times"] if "seconds" in t]
        best = min(timed, key=lambda t: sorted(t["seconds"])[len(t["seconds"]) // 2])
        assert entry["best"] == best["config"]
        CONFIGS[entry["kernel"].replace("gpu_int8", "gpu")].Config(**entry["best"])
