"""Checkpoints with random weights: every name, shape and dtype as published, no training.

For testing what is too large to download: conversion, memory and speed at full size. Pictures made
with them are noise.
"""

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from scipy.special import ndtri
from tqdm import tqdm

from models.checkpoint_io import CheckpointError
from models.component import Component
from models.family import Family, Tokenizer
from models.stored_files import read_json

_DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}
_STEPS = 2**16  # quantiles of the normal distribution that weights are drawn from
_MARKER = ".random_weights"  # a file in every folder that is made here, from the start
LAYOUTS = ("diffusers", "file")
# Bytes that stand for themselves as letters in byte-level BPE; the others are letters from 256.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name to leaf ("kernel", "bias" ...) and shape


def write_random_model(
    folder: Path | str,
    family: Family,
    sizes: Mapping[str, Any],
    *,
    tokenizers: Path | str | None = None,
    layout: str = "diffusers",
    schedule: str | None = None,
    name: str = "",
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write a random model, one tensor at a time; the same arguments give the same bytes.

    Linears and convolutions are normal with deviation 1 / sqrt(inputs), embeddings and biases with
    0.02, norms one: activations stay of order one.

    Args:
      folder: made here; must not exist.
      family: of the model.
      sizes: configs by component; of a published model `family.sizes` has them.
      tokenizers: a model folder whose tokenizers are copied, lengthened to what the family takes,
        where it has no such that are made; their vocabularies need not fill the encoders'.
      layout: "diffusers" for the whole model, bfloat16, sharded as published; "file" for the single
        files of the main component and the autoencoder, in their makers' naming and dtypes.
      schedule: of the family's, that the model is to be sampled by; None for the one that goes with
        the sizes.
      name: of the single file; "" for that of the family's first published model.
      seed: of the weights.
      progress: show a bar on stderr.

    Raises:
      ValueError: an unknown layout, or one that the family isn't published in; an unknown schedule.
      CheckpointError: the folder exists, or a tokenizer is missing.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; use one of {', '.join(LAYOUTS)}")
    if layout == "file" and family.components[family.main].file is None:
        raise ValueError(f"layout is 'file', and {family.name} has no single files")
    chosen = schedule or family.schedule_of(sizes, family.index)[0]
    if chosen not in family.schedules:
        known = ", ".join(family.schedules)
        raise ValueError(f"schedule is {schedule!r}; of {family.name} there are {known}")
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another folder")
    _check_tokenizers(family, tokenizers)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()
    write = _Writer(seed=seed, progress=progress)
    if layout == "file":
        stem = name or next(iter(family.sizes), family.main)
        files = {family.main: f"{stem}.safetensors", family.autoencoder: family.autoencoder_file}
        for part, file in files.items():
            component = family.components[part]
            if (naming := component.file) is not None:
                tensors = component.tensors(sizes[part], naming)
                write.file(folder / file, tensors, naming.dtype)
        return
    for part, component in family.components.items():
        write.folder(folder / part, component, sizes[part])
    found = family.schedules[chosen]
    _write_json(folder / "scheduler" / "scheduler_config.json", found.scheduler)
    for part, tokenizer in family.tokenizers.items():
        _write_tokenizer(folder / part, tokenizer, tokenizers)
    _write_json(folder / "model_index.json", {**family.index, **found.index})


def is_random_model(folder: Path) -> bool:
    """Return whether `write_random_model` made a folder, be it only in part."""
    return (folder / _MARKER).exists()


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], np.ndarray],
    dtype: str = "BF16",
) -> None:
    """Write a safetensors file, one tensor at a time; it gets its name when it is complete.

    The format: github.com/huggingface/safetensors, README, "Format".

    Args:
      path: the file.
      shapes: of its tensors by name, in the order they are written in.
      make: returns a tensor, of its shape and dtype.
      dtype: of all, in the words of the format: "BF16" or "F32".
    """
    size = np.dtype(_DTYPES[dtype]).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(np.ascontiguousarray(make(name)).view(np.uint8).data)
    partial.replace(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Writer:
    seed: int
    progress: bool

    def folder(self, folder: Path, component: Component, config: Any) -> None:
        """Write a component folder: one file or shards with an index, and config.json."""
        folder.mkdir()
        tensors, stem = component.tensors(config, component.folder), component.weights_stem
        shards = _split(tensors, component.shard_bytes)
        files = [f"{stem}.safetensors"]
        if len(shards) > 1:
            files = [
                f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
            ]
            weight_map = {
                name: file for file, shard in zip(files, shards, strict=True) for name in shard
            }
            size = sum(2 * math.prod(shape) for _, shape in tensors.values())
            index = {
                "metadata": {"total_size": size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            _write_json(folder / f"{stem}.safetensors.index.json", index)
        for file, shard in zip(files, shards, strict=True):
            self.file(folder / file, shard)
        _write_json(folder / "config.json", component.whole(config).to_json())

    def file(self, path: Path, tensors: Tensors, dtype: str = "BF16") -> None:
        """Write one file of random tensors."""
        table = ndtri((np.arange(_STEPS) + 0.5) / _STEPS)
        shapes = {name: shape for name, (_, shape) in tensors.items()}
        total = sum(np.dtype(_DTYPES[dtype]).itemsize * math.prod(x) for x in shapes.values())
        bar = {"total": total, "unit": "B", "unit_scale": True, "disable": not self.progress}
        with tqdm(desc=path.name, **bar) as shown:

            def make(name: str) -> np.ndarray:
                value = self._draw(name, *tensors[name], table, _DTYPES[dtype])
                shown.update(value.nbytes)
                return value

            write_safetensors(path, shapes, make, dtype)

    def _draw(self, name: str, leaf: str, shape: tuple[int, ...], table, dtype) -> np.ndarray:
        """Return a tensor that depends on its name and the seed, not on its place in a file."""
        if leaf in ("scale", "running_var"):
            return np.ones(shape, dtype)
        deviation = math.prod(shape[1:]) ** -0.5 if leaf == "kernel" else 0.02
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return (deviation * table).astype(dtype)[rng.integers(0, _STEPS, shape, np.uint16)]


def _split(tensors: Tensors, shard_bytes: int) -> list[Tensors]:
    """Fill shards in order, none above a size, as the libraries that publish do."""
    shards: list[Tensors] = [{}]
    filled = 0
    for name, (leaf, shape) in tensors.items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (leaf, shape)
        filled += size
    return shards


def _check_tokenizers(family: Family, source: Path | str | None) -> None:
    for name, tokenizer in family.tokenizers.items():
        if tokenizer.specials:
            continue
        if source is None:
            raise CheckpointError(f"{family.name} needs a folder with a {name} to copy")
        read_json(Path(source) / name / "tokenizer_config.json")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, source: Path | str | None) -> None:
    """Copy a tokenizer with the published length, or make one of bytes and special tokens."""
    path = folder / "tokenizer_config.json"
    if not tokenizer.specials:
        shutil.copytree(Path(source or "") / folder.name, folder)
        _write_json(path, read_json(path) | {"model_max_length": tokenizer.length})
        return
    others = (256 + i for i in range(256 - len(_PRINTABLE)))
    vocab = {chr(point): i for i, point in enumerate((*_PRINTABLE, *others))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocab) + i, "content": text, "special": True, **flags}
        for i, text in enumerate(tokenizer.specials)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    parts = {"pre_tokenizer": level, "decoder": level, "model": model}
    _write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": added, **parts})
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": tokenizer.specials[0]}
    _write_json(path, config | {"model_max_length": tokenizer.length})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
