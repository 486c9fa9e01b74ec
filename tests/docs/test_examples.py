"""The examples of docs/ and README run as they stand, each page in one namespace."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "models"))


EXAMPLE = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))


def run_examples(page: Path) -> dict:
    """Run a page's examples in its order, with its own line numbers; return their names."""
    text, names = page.read_text(), {"__name__": page.stem}
    for found in EXAMPLE.finditer(text):
        lines = text[: found.start(1)].count("\n")
        exec(compile("\n" * lines + found[1], page, "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page):
    assert len(run_examples(page)) > 2, "no example is marked to be run"
