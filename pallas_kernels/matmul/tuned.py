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

    Args:
      kernel: a backend's name, with "_int8" behind it for int8 weights.
      m: rows of x.
      n: output channels.
      k: contraction length.
    """
    return _table(device.current().kind).get((kernel, m, n, k))


@functools.cache
def _table(kind: str) -> dict[tuple[str, int, int, int], dict[str, Any]]:
    file = resources.files("pallas_kernels.matmul") / "tuning" / file_name(kind)
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text())["entries"]
    return {(e["kernel"], e["m"], e["n"], e["k"]): e["best"] for e in entries}
