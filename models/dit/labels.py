"""From texts in place of prompts to classes: numbers, or names as a model has them."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from models.stored_files import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Names of classes; a class may have several, and a name several classes."""

    names: tuple[tuple[str, int], ...] = ()  # lower case, and the class

    @classmethod
    def from_index(cls, index: Mapping[str, Any]) -> "Labels":
        """Build from a model_index.json, whose `id2label` has names by number, with commas between.

        Raises:
          CheckpointError: it is there and no such object.
        """
        given = index.get("id2label") or {}
        if not isinstance(given, dict) or not all(
            isinstance(key, str) and key.isascii() and key.isdigit() and isinstance(text, str)
            for key, text in given.items()
        ):
            raise CheckpointError("id2label must be an object from numbers of classes to names")
        found = ((name, int(key)) for key, text in given.items() for name in _names(text))
        return cls(names=tuple(found))

    def find(self, text: str, classes: int) -> int:
        """Return the class of a text; `classes`, which stands for none, of an empty one.

        Args:
          text: a number, or a name in any case.
          classes: that the model was trained with.

        Raises:
          ValueError: there is no such class, or there are several.
        """
        wanted = " ".join(text.split()).casefold()
        if not wanted:
            return classes
        if wanted.isascii() and wanted.isdigit():
            if len(wanted) < 10 and int(wanted) < classes:
                return int(wanted)
            raise ValueError(f"class {text[:40]} is out of range; give 0 to {classes - 1}")
        found = sorted({number for name, number in self.names if name == wanted})
        if len(found) > 1:
            listed = " and ".join(map(str, found))
            raise ValueError(f"class {text!r} is the name of {listed}; give the number")
        if not found or found[0] >= classes:
            raise ValueError(
                f"{text[:80]!r} is no class of this model; {self._hint(wanted, classes)}"
            )
        return found[0]

    def _hint(self, wanted: str, classes: int) -> str:
        """Say what would be one."""
        numbers = f"give a number from 0 to {classes - 1}"
        names = sorted({name for name, number in self.names if number < classes})
        if not names:
            return f"{numbers} (it has no names of classes: no id2label in model_index.json)"
        near = difflib.get_close_matches(wanted, names, n=3) or names[:1]
        return f"{numbers}, or a name such as {' or '.join(map(repr, near))}"


def _names(text: str) -> Iterator[str]:
    """Yield the names in one entry, and the whole entry, in lower case."""
    whole = " ".join(text.split()).casefold()
    yield from dict.fromkeys((whole, *(part.strip() for part in whole.split(","))))
