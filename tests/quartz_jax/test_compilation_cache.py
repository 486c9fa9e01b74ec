"""The folder of the compilation cache, and how it is turned off; each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, sys
import jax
from quartz_jax.cli import cache as compilation_cache
folder = compilation_cache.enable({use})
jax.block_until_ready(jax.jit(lambda x: x * 3)(1.0))
print(json.dumps([str(folder), compilation_cache.counts()]))
"""


def start(tmp_path, use=True, words=None, **env):
    """Return the folder and the counts of a process that compiles one function.

    Lines on stderr are added to `words`.
    """
    clean = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", CODE.format(use=use)]
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    if words is not None:
        words += done.stderr.splitlines()
    return json.loads(done.stdout)


def test_the_folder_is_in_the_home_and_a_second_process_reads_it(tmp_path):
    environment = {"XDG_CACHE_HOME": ""}
    folder, counts = start(tmp_path, **environment)
    assert folder == str(tmp_path / "home/.cache/quartz-jax/compiled")
    assert counts["compiled"] > 0
    assert start(tmp_path, **environment)[1] == {"from_cache": counts["compiled"], "compiled": 0}


def test_xdg_cache_home_is_respected(tmp_path):
    folder, _ = start(tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert folder == str(tmp_path / "xdg/quartz-jax/compiled")
    assert list(Path(folder).iterdir())


def test_a_folder_that_jax_was_given_is_respected(tmp_path):
    folder, _ = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert folder == str(tmp_path / "own")


def test_a_folder_that_can_t_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    folder, counts = start(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert folder == str(tmp_path / "file/quartz-jax/compiled")
    assert counts == {}


@pytest.mark.parametrize(
    "off", [{"use": False}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}], ids=["argument", "variable"]
)
def test_it_can_be_turned_off(tmp_path, off):
    assert start(tmp_path, **off) == ["None", {}]
    assert not list(tmp_path.rglob("quartz-jax"))


def test_damaged_programs_are_said_once_and_written_anew(tmp_path):
    _, first = start(tmp_path)
    files = list(tmp_path.rglob("*-cache"))
    assert files
    for i, file in enumerate(files):
        file.write_bytes((file.read_bytes()[:-1], b"", b"nothing")[i % 3])
    words = []
    _, mended = start(tmp_path, words=words)
    assert mended == {"compiled": first["compiled"], "from_cache": 0}
    assert sum("holds damaged programs: they are compiled anew" in x for x in words) == 1
    assert not any("Error reading" in x for x in words)
    assert start(tmp_path)[1] == {"compiled": 0, "from_cache": first["compiled"]}
