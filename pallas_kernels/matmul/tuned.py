"""Tile sizes that `scripts/tune.py` found, by device and shape: `tuning/<device>.json`."""

import functools
import json
import re
from importlib import resources
from typing import Any

from pallas_kernels import device


def file_name(kind: str) -> str:
    """Return the file of a device, such as "nvidia_h100_80gb_hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json"


def lookup(kernel: str, m: int, n: int, k: int) -> dict[str, Any] | None:
    """Return the fastest sizes found for a kernel and shape on this device, or None.

    Where none were searched on it, those of a device of its generation with as many processors
    serve: how tiles divide among processors decides most (an H200's are an H100's).

    Args:
      kernel: a backend's name, with "_int8" behind it for int8 weights.
      m: rows of x.
      n: output channels.
      k: contraction length.
    """
    sizes = (kernel, m, n, k)
    here = device.current()
    found = _table(here.kind).get(sizes)
    if found is None and here.platform == "gpu" and here.generation:
        found = _tables_like(here.generation, device.processors()).get(sizes)
    return found


@functools.cache
def _table(kind: str) -> dict[tuple[str, int, int, int], dict[str, Any]]:
    file = _folder() / file_name(kind)
    return _sizes(json.loads(file.read_text())) if file.is_file() else {}


@functools.cache
def _tables_like(generation: int, processors: int) -> dict:
    """Return the sizes of all GPUs of a generation and a number of processors."""
    sizes: dict = {}
    for file in sorted(_folder().iterdir(), key=lambda file: file.name):
        stored = json.loads(file.read_text())
        like = device.describe("gpu", stored["device"]).generation, stored["processors"]
        if like == (generation, processors):
            sizes |= _sizes(stored)
    return sizes


def _folder() -> Any:
    return resources.files("pallas_kernels.matmul") / "tuning"


def _sizes(stored: dict[str, Any]) -> dict[tuple[str, int, int, int], dict[str, Any]]:
    return {(e["kernel"], e["m"], e["n"], e["k"]): e["best"] for e in stored["entries"]}
