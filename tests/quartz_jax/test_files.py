"""Files that are read and written: odd names, odd contents, and what a power failure leaves."""

import json
import os

import pytest

from quartz_jax.io.files import (
    atomic_file,
    check_output,
    read_json,
    resumable_folder,
    work_folder,
)

posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes as POSIX has them")


@posix
def test_an_output_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "x"):
        with pytest.raises(ValueError, match="it is a link to itself"):
            check_output(path, folder=True)


@pytest.mark.parametrize("name", ["caf\udce9", "a\0b"])
def test_an_output_whose_name_is_no_text_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="isn't UTF-8") as error:
        check_output(tmp_path / name)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("name", ["caf\u00e9", "\u043b\u0438\u0441\u0430 [v1]", "x" * 200])
def test_other_letters_brackets_and_long_names_are_names(tmp_path, name):
    assert check_output(tmp_path / name) == tmp_path / name


def test_a_name_too_long_for_the_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match="can't be written"):
        check_output(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"{", "is no JSON"),
        (b"", "is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": {"b": 1, "b": 2}}', "has a field twice: 'b'"),
        (b'{"a": "caf\xe9"}', "isn't UTF-8"),
    ],
)
def test_json_that_can_t_be_read_is_named(tmp_path, text, line):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=line) as error:
        read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(error.value)


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


@posix
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no regular file"):
        read_json(tmp_path / "pipe")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("name"), replace(*paths)))
    with atomic_file(tmp_path / "x") as partial:
        partial.write_text("1")
    assert events == ["sync", "name"]
    assert (tmp_path / "x").read_text() == "1"


@pytest.mark.parametrize("left", ["", "\0\0\0\0", '{"sha'])
def test_a_record_that_a_power_failure_emptied_is_none(tmp_path, left):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), resumable_folder(out, 1, incurable=KeyError) as work:
        work.write_record("part", {"sha256": "1"})
        raise KeyboardInterrupt
    (work_folder(out) / "records" / "part.json").write_text(left)
    with resumable_folder(out, 1, incurable=KeyError) as work:
        assert work.read_record("part") is None
        work.write_record("part", 2)
        assert work.read_record("part") == 2
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out"]


def test_records_are_json(tmp_path):
    with resumable_folder(tmp_path / "out", {"a": (1,)}, incurable=KeyError) as work:
        work.write_record("x", [1, {"b": None}])
        assert json.loads((work.records / "x.json").read_text()) == [1, {"b": None}]
