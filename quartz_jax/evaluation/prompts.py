"""Prompts to evaluate on: a text file, or MJHQ-30K's list, whose prompts have real images."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from quartz_jax.io.files import read_json, read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts, and the real images that belong to them."""

    texts: list[str]  # as many as were asked for
    images: list[str] | None  # "category/id.jpg", each once; None for a text file


def read_prompts(path: Path, count: int) -> Prompts:
    """Return `count` prompts of a file, from its start again at its end.

    A text file has one a line. A .json file has the form of MJHQ-30K's meta_data.json (Li et al.,
    arXiv 2402.17245), an object from image ids to {"category": ..., "prompt": ...}. Of more than
    `count` of these a sample is taken, the one of SVDQuant's evaluation (arXiv 2411.05007,
    deepcompressor's MJHQ.py): ids in the file's order, shuffled by Python's generator of seed 0,
    the first `count`, sorted. Prompts are in the sample's order, in the file's if all are taken.

    A byte order mark at the start, as Windows' editors write it, is no part of a prompt.

    Raises:
      ValueError: there is no prompt, the file isn't UTF-8, or a .json file isn't of the form.
    """
    if path.suffix != ".json":
        return Prompts(texts=_repeated(read_lines(path), count), images=None)
    entries = _read_entries(path)
    names = list(entries)
    if count < len(names):
        random.Random(0).shuffle(names)
        names = sorted(names[:count])
    texts = check_prompts([entries[name]["prompt"] for name in names])
    images = [f"{entries[name]['category']}/{name}.jpg" for name in names]
    return Prompts(texts=_repeated(texts, count), images=images)


def read_lines(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line; blank lines are left out.

    Raises:
      ValueError: it holds none, or isn't UTF-8.
      OSError: it can't be read.
    """
    return check_prompts([line for line in _lines(path) if line.strip()])


def _lines(path: Path) -> list[str]:
    try:
        # Other signs that end lines for some, such as those of forms and paragraphs, are text.
        return read_text(path).split("\n")
    except ValueError as error:
        raise ValueError(f"prompts can't be read: {error}") from None


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts; raises ValueError if there is none or one is blank."""
    if not prompts:
        raise ValueError("no prompt was given; write --prompt followed by one text or several")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("prompt is empty; write some text")
    return list(prompts)


def _read_entries(path: Path) -> dict[str, dict[str, str]]:
    form = f'{path} must be an object {{"id": {{"category": "...", "prompt": "..."}}, ...}}'
    try:
        entries = read_json(path)
    except ValueError as error:
        raise ValueError(f"{form}; {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{form}; it is a {type(entries).__name__}")
    for name, entry in entries.items():
        found = entry if isinstance(entry, dict) else {}
        if not all(isinstance(found.get(key), str) for key in ("category", "prompt")):
            raise ValueError(f"{form}; entry {name!r} isn't")
        if any("\ud800" <= letter <= "\udfff" for letter in found["prompt"]):
            raise ValueError(f"{form}; the prompt of {name!r} isn't valid Unicode")
    return entries


def _repeated(texts: list[str], count: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(texts), count))
