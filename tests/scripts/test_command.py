"""How commands end: exit codes and one line, whatever happened."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from quartz_jax.cli import arguments as cli


def raises(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\nb"), 2, "error: a b\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (MemoryError("8 EiB"), 2, "error: not enough memory: 8 EiB\n"),
        (RuntimeError("Unable to initialize backend 'foo'"), 2, "JAX_PLATFORMS"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "make fewer or smaller images"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_command_ends_in_one_line(capsys, error, code, line):
    assert cli.run(raises(error)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert line in err


def test_a_defect_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a defect"):
        cli.run(raises(RuntimeError("a defect")))


@pytest.mark.skipif(os.name == "nt", reason="pipes as POSIX has them")
def test_a_reader_that_went_away_is_no_error():
    code = "import sys; from quartz_jax.cli import start; sys.exit(start(lambda _: print('x' * 9)))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=-1, env=env)
    os.close(write)
    assert done.returncode == 141
    assert b"BrokenPipe" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_lacks_a_letter_shows_it_otherwise(encoding):
    code = (
        "import sys; from quartz_jax.cli import start; sys.exit(start(lambda _: print('\u043b')))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, b"\\u043b")


@pytest.mark.parametrize("quiet", [True, False])
def test_that_there_is_no_pytorch_is_no_news_to_commands(quiet):
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find(name, *more)
{command}
import transformers
"""
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    code = code.format(command="import quartz_jax.cli" if quiet else "")
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0
    assert ("PyTorch was not found" in done.stdout + done.stderr) == (not quiet)
