import json
import os
import random

import pytest

from quartz_jax.evaluation.photos import find_photos
from quartz_jax.evaluation.prompts import read_lines, read_prompts


@pytest.fixture
def listed(tmp_path):
    """A list of five prompts in MJHQ-30K's form, its ids in no order."""
    entries = {
        f"id{i}": {"category": f"c{i % 2}", "prompt": f"prompt {i}"} for i in (3, 1, 4, 0, 2)
    }
    path = tmp_path / "meta_data.json"
    path.write_text(json.dumps(entries))
    return path


def test_lines_of_a_text_file_repeat_until_there_are_enough(tmp_path):
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    found = read_prompts(tmp_path / "p.txt", 3)
    assert (found.texts, found.images) == (["a", "b", "a"], None)


def test_all_of_a_list_come_in_the_file_s_order_each_image_once(listed):
    found = read_prompts(listed, 6)
    assert found.texts == [f"prompt {i}" for i in (3, 1, 4, 0, 2, 3)]
    assert found.images == ["c1/id3.jpg", "c1/id1.jpg", "c0/id4.jpg", "c0/id0.jpg", "c0/id2.jpg"]


def test_a_part_of_a_list_is_the_published_sample(listed):
    names = list(json.loads(listed.read_text()))
    random.Random(0).shuffle(names)
    wanted = sorted(names[:3])
    found = read_prompts(listed, 3)
    assert found.texts == [f"prompt {name[2:]}" for name in wanted]
    assert [image[3:-4] for image in found.images] == wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1", "is no JSON"),
        ('["a"]', "it is a list"),
        ('{"a": "b"}', "entry 'a' isn't"),
        ('{"a": {"prompt": "b"}}', "entry 'a' isn't"),
        ("{}", "no prompt was given"),
        ('{"a": {"category": "c", "prompt": " "}}', "prompt is empty"),
    ],
)
def test_a_list_of_another_form_is_refused(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_prompts(tmp_path / "x.json", 2)


def test_all_images_below_a_folder_are_found_in_order(tmp_path):
    for name in ("b/1.PNG", "a/2.jpg", "a/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_photos(tmp_path, None) == [tmp_path / "a/2.jpg", tmp_path / "b/1.PNG"]
    assert find_photos(tmp_path, ["b/1.PNG", "a/2.jpg"])[0] == tmp_path / "b/1.PNG"


def test_a_folder_without_the_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds 0 real images"):
        find_photos(tmp_path, None)
    with pytest.raises(ValueError, match=r"a/1.jpg is missing, and 1 more of 2"):
        find_photos(tmp_path, ["a/1.jpg", "a/2.jpg"])


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, listed):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa red fox\r\ntwo dogs")
    assert read_prompts(tmp_path / "p.txt", 2).texts == ["a red fox", "two dogs"]
    wanted = read_prompts(listed, 5)
    listed.write_bytes(b"\xef\xbb\xbf" + listed.read_bytes())
    assert read_prompts(listed, 5) == wanted


@pytest.mark.parametrize("content", ["a".encode("utf-16"), "caf\xe9".encode("latin-1")])
@pytest.mark.parametrize("name", ["p.txt", "p.json"])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} isn't UTF-8"):
        read_prompts(tmp_path / name, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 10**5, "nested too deeply"),
        ('{"a": {"category": "c", "prompt": "caf\\ud800"}}', "'a' isn't valid Unicode"),
        ('{"a": {"category": "c", "prompt": 3}}', "entry 'a' isn't"),
    ],
)
def test_an_odd_list_is_named(tmp_path, text, told):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(tmp_path / "p.json", 1)


def test_a_file_of_prompts_that_is_none_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="no regular file"):
        read_prompts(tmp_path / "p.txt", 1)


def test_only_line_ends_end_a_prompt(tmp_path):
    texts = ["a\u2028b", "c\x0bd", "e\x85f", "g\x1ch"]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "x.txt").write_bytes(end.join(texts).encode())
        assert read_lines(tmp_path / "x.txt") == texts
