"""What the scripts share: timing on a GPU with PyTorch, and the record they write."""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def output(text: str) -> Path:
    """Return a file to be written, for argparse: its folder must be there before any measuring."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is no file in a folder that is there")
    return path


def queued_ms(call: Callable[[], Any], calls: int, repeats: int = 5) -> float:
    """Return milliseconds a call of several that are enqueued at once; the median of repeats."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def write(out: Path, packages: Sequence[str], results: dict[str, Any]) -> None:
    """Write results with the date, the device and the versions of packages."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {"device": torch.cuda.get_device_name(), "versions": versions},
        "results": results,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
