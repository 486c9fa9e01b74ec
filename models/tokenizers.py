"""Tokenizers of transformers, refused where they would cut texts otherwise than was trained."""

import contextlib
import json
import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from models.stored_files import CheckpointError, read_json

_SHOWN = 1000  # characters of what is cut from a prompt, at its start and its end, in a warning
# Files that together are a tokenizer's vocabulary; a folder has one of these sets.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
)
# Classes of transformers, without "Fast", that read a folder as AutoTokenizer would have it read.
_PLAIN = ("CLIPTokenizer", "T5Tokenizer", "Qwen2Tokenizer", "TokenizersBackend")


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer of transformers.

    Raises:
      CheckpointError: the folder holds none that loads; or one without its vocabulary, of which
        transformers makes an empty one, without a pad token or with a wrong length.
    """
    folder = Path(folder)
    if odd := [x for x in folder.glob("*") if x.exists() and not (x.is_file() or x.is_dir())]:
        raise CheckpointError(f"{odd[0]} is no regular file; it can't be part of a tokenizer")
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        sets = ", or ".join(" with ".join(names) for names in _VOCABULARIES)
        raise CheckpointError(
            f"{folder} holds no tokenizer that loads: no vocabulary, expected {sets}"
        )
    with _tokenizer_errors(folder):
        # Code of a model's own is never run; without a word transformers asks on the terminal.
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = _reader(folder).from_pretrained(folder, **options)
    length = tokenizer.model_max_length
    if type(length) not in (int, float) or not length >= 1:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length = {length!r} must be 1 or more"
        )
    if tokenizer.pad_token is None:
        raise CheckpointError(f"{folder}: its tokenizer has no pad token; texts must be padded")
    with _tokenizer_errors(folder):
        ids = {tuple(tokenizer(letter)["input_ids"]) for letter in string.ascii_lowercase}
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Byte-level BPE (CLIP's): a piece for each byte inside and at the end of a word, one a merge.
    added = len(tokenizer.get_added_vocab())
    if model["type"] == "BPE" and len(model["vocab"]) - len(model["merges"]) > 512 + added:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(model['merges'])} merges for {len(model['vocab'])} "
            "pieces; merges are missing, so that texts would be cut otherwise"
        )
    if len(ids) == 1:
        raise CheckpointError(f"{folder}: its tokenizer knows no letter: the vocabulary is missing")
    return tokenizer


def _reader(folder: Path) -> Any:
    """Return the class of transformers that reads a tokenizer; importing it takes a second.

    AutoTokenizer takes the same for what the models here have, but imports configurations of all
    models first, and PyTorch with them where that is installed: seconds more.
    """
    import transformers

    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    plain = name in _PLAIN and "auto_map" not in config and not (folder / "config.json").exists()
    return getattr(transformers, name if plain else "AutoTokenizer")


@contextlib.contextmanager
def _tokenizer_errors(folder: Path) -> Iterator[None]:
    """Raise CheckpointError, on one line, for whatever transformers' readers happen to raise."""
    try:
        yield
    except Exception as error:
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder} holds no tokenizer that loads: {first}") from None


class Tokens(NamedTuple):
    """Texts of one length, padded."""

    ids: np.ndarray  # int32 [texts, length]
    mask: np.ndarray  # int32 [texts, length], 0 for padding

    @classmethod
    def of(cls, encoded: Mapping[str, Any]) -> Self:
        """Take what a tokenizer of transformers returns."""
        parts = (encoded["input_ids"], encoded["attention_mask"])
        return cls(*(np.asarray(part, np.int32) for part in parts))


def padded_tokens(tokenizer: Any, texts: Sequence[str], longest: int) -> Tokens:
    """Return tokens padded to the tokenizer's length or a shorter one.

    Longer texts are truncated, and a warning says what is cut.

    Args:
      tokenizer: of transformers.
      texts: one or several.
      longest: that the model takes.
    """
    length = int(min(tokenizer.model_max_length, longest))
    whole = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    for text, ids in zip(texts, whole, strict=True):
        warn_of_cut(tokenizer, text, ids, length - tokenizer.num_special_tokens_to_add())
    options = {"max_length": length, "truncation": True, "return_attention_mask": True}
    return Tokens.of(tokenizer(list(texts), padding="max_length", **options))


def warn_of_cut(tokenizer: Any, prompt: str, ids: Sequence[int], kept: int) -> None:
    """Warn if a prompt has more tokens than are kept, with the words that are dropped."""
    if len(ids) <= kept:
        return
    cut = tokenizer.decode(ids[kept:])
    cut = cut if len(cut) <= 2 * _SHOWN else f"{cut[:_SHOWN]} ... {cut[-_SHOWN:]}"
    warnings.warn(
        f"prompt {prompt[:40]!r} is too long: {type(tokenizer).__name__} takes {kept} "
        f"tokens of its {len(ids)}, and this was cut: {cut!r}",
        stacklevel=4,
    )
