"""What stored figures say of their origin: device, versions, commit, date and command."""

import datetime
import functools
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from quartz_jax.io.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return the device and the versions that figures depend on."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()} | versions,
    }


@functools.cache
def commit() -> str | None:
    """Return the checkout's commit, with "-dirty" behind it if files differ; None outside one."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON with date, command and commit; the file is never half-written."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    origin = {"date": now, "command": sys.argv, "commit": commit()}
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(origin | results, indent=1) + "\n")
