import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Scripts import their neighbour common.py; the tiny model is shared with the models' tests.
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "models")]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random FLUX model."""
    pytest.importorskip("torch")
    from tiny_pipeline import make_tiny_flux

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_flux(folder, dev=True)
    return folder


@pytest.fixture(scope="session")
def quantized(tiny, tmp_path_factory):
    """Folder of the tiny model quantized by the default recipe."""
    import quantize

    folder = tmp_path_factory.mktemp("quantized") / "w4a4"
    quantize.main(["--model", str(tiny), "--out", str(folder)])
    return folder


@pytest.fixture
def run_script():
    """Run a script as a command; gives the finished process."""

    def run(name, *argv):
        command = [sys.executable, str(ROOT / "scripts" / name), *map(str, argv)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}  # works without an installation too
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    return run
