"""What can be told of the scripts of peers without a GPU: where they may write."""

import argparse
import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "scripts" / "peers" / "common.py"


def test_an_output_that_can_not_be_made_is_refused_before_any_measuring(tmp_path):
    spec = importlib.util.spec_from_file_location("peers_common", FILE)
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    assert common.output(str(tmp_path / "x.json")) == tmp_path / "x.json"
    for wrong in (tmp_path, tmp_path / "absent" / "x.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no file in a folder"):
            common.output(str(wrong))
