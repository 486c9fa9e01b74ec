"""From 16-bit files to a quantized checkpoint, one part of the model at a time.

Memory holds two parts at most, the one that is quantized and the one that is read ahead. A killed
conversion goes on where it was when it is run again; its arrays are those of an uninterrupted one
(its files aren't: Orbax names and stamps them anew). A calibrated one holds its samples too, as
they are between two blocks, and one block's statistics: see `calibrate`.
"""

import collections
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from quartz_jax import schema
from quartz_jax.conversion import calibrate, checkpoint
from quartz_jax.conversion.calibrate import Calibration
from quartz_jax.conversion.checkpoint import Component, Manifest
from quartz_jax.conversion.model import Part, plan_parts
from quartz_jax.conversion.report import LayerReport, Report
from quartz_jax.formats.storage import WeightError
from quartz_jax.io.files import (
    WorkFolder,
    check_space,
    copy_synced,
    hash_file,
    hash_files,
    join_hashes,
    recover_folder,
    resumable_folder,
    stamps,
    sync,
    tree_bytes,
    work_folder,
)
from quartz_jax.recipes.recipe import Recipe
from quartz_jax.recipes.sites import sites

_PART_OVERHEAD = 2**17  # bytes at most of Orbax's own files in a part
_LAYER_OVERHEAD = 2**11  # of its lines in quartz.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A 16-bit component that is quantized while it is read."""

    name: str  # of the component, and of its folder in the checkpoint
    recipe: Recipe
    model: nnx.Module  # the component with shapes in place of arrays
    read: Callable[[str], np.ndarray]  # gives a parameter by dotted path, kernels [k, n]
    config: dict[str, Any]  # contents of its config.json
    files: tuple[Path, ...]  # the safetensors files that hold it
    calibration: Calibration | None = None  # for recipes that are calibrated

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The parts to quantize, in the order in which they are.

        Raises:
          ValueError: a rule matches nothing, or the recipe needs a calibration that isn't there or
            that the model can't have.
        """
        parts = plan_parts(self.model, self.recipe)
        if not any(layer.needs for part in parts for layer in part.layers.values()):
            return parts
        model = calibrate.check(self.model, self.recipe, parts, self.calibration)
        return calibrate.in_order(model, parts)

    @property
    def calibrated(self) -> bool:
        """Whether its parts are quantized one after another, with statistics."""
        return any(layer.needs for part in self.parts for layer in part.layers.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
    """A file or folder of the checkpoint that is only copied, or written from something else."""

    name: str  # in the checkpoint
    bytes: int  # about
    write: Callable[[Path], object]  # makes it at a path
    source: Path | None = None  # the file or folder that it is made from

    @classmethod
    def copy(cls, path: Path, name: str | None = None) -> "Carried":
        """Carry a file or folder as it is, under its own name if no other is given.

        Raises:
          ValueError: the folder holds no files.
        """
        if path.is_dir() and not any(file.is_file() for file in path.rglob("*")):
            raise ValueError(f"{path} is empty; expected the files of a component")
        write = functools.partial(copy_synced, path)
        return cls(name=name or path.name, bytes=tree_bytes(path), write=write, source=path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a checkpoint is made of."""

    base_name: str  # of the 16-bit model
    sources: tuple[Source, ...]
    carried: tuple[Carried, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the checkpoint, Orbax's own included."""
        parts = [part for source in self.sources for part in source.parts]
        stored = sum(
            part.bytes + _PART_OVERHEAD + _LAYER_OVERHEAD * len(part.layers) for part in parts
        )
        return stored + sum(item.bytes for item in self.carried)

    def plan(self) -> str:
        """Return as text what would be made: layers, formats, bytes."""
        lines = []
        for source in self.sources:
            stored = sum(part.bytes for part in source.parts)
            before = sum(part.bytes_bf16 for part in source.parts)
            rows = [
                (path, layer.words(), layer.input_words(), *_layer_bytes(part, path))
                for part in source.parts
                for path, layer in part.layers.items()
            ]
            kept = stored - sum(row[3] for row in rows)
            rows.append(("everything else", "bf16", "bf16", kept, kept))
            table = [("layer", "weight", "input", "bytes", "in bf16")]
            table += [(*row[:3], f"{row[3]:,}", f"{row[4]:,}") for row in rows]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += [
                f"{source.name}: recipe {source.recipe.name}, {len(rows) - 1} layers, "
                f"{stored:,} bytes of {before:,} in bf16",
                *(
                    "  " + "  ".join(map(_align, row, widths, range(len(row)))).rstrip()
                    for row in table
                ),
                *_rotated_online(source),
            ]
        lines += [f"{item.name}: {item.bytes:,} bytes, carried along" for item in self.carried]
        return "\n".join(
            [*lines, f"total: {self.bytes:,} bytes at most; on the disk arrays are compressed"]
        )

    def check(self, out: Path, *, overwrite: bool = False) -> None:
        """Raise ValueError where a checkpoint can't be written, or doesn't fit on the disk."""
        inputs = [file for source in self.sources for file in source.files]
        # of a component's folder all of it, though only some files are read
        inputs += [x.parent for x in inputs if (x.parent / "config.json").exists()]
        inputs += [item.source for item in self.carried if item.source]
        checkpoint.check_target(out, inputs, overwrite=overwrite)
        done = work_folder(out) / "contents"
        check_space(out, self.bytes - (tree_bytes(done) if done.exists() else 0))

    def run(self, out: Path, *, overwrite: bool = False, progress: bool = False) -> Manifest:
        """Write the checkpoint, or go on with it.

        Args:
          out: the folder to make; nothing is there before it is complete.
          overwrite: replace a checkpoint that exists, and unfinished work of another conversion.
          progress: show a bar over the bytes read on stderr.

        Raises:
          ValueError: the output can't be made here, as `check` says.
          WeightError: a weight holds a NaN or an infinity; the unfinished work is removed.
          OSError: a file can't be read or written, on a full disk for example; run again to go on.
        """
        out = out.resolve()
        recover_folder(out)
        self.check(out, overwrite=overwrite)
        with resumable_folder(
            out, self._identity(), incurable=WeightError, overwrite=overwrite
        ) as work:
            with _hashing(self.sources, work) as hashes:
                self._write_parts(work, progress)
                for item in self.carried:
                    _carry(item, work)
                components = {
                    source.name: _component(source, work, hashes[source.name]())
                    for source in self.sources
                }
            return checkpoint.write_manifest(work.contents, self.base_name, components)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for unfinished work to be gone on with."""
        files = [file for source in self.sources for file in source.files]
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            "recipes": {source.name: source.recipe.to_json() for source in self.sources},
            "configs": {source.name: source.config for source in self.sources},
            "calibration": {
                source.name: schema.to_json(source.calibration.record)
                for source in self.sources
                if source.calibration and source.calibrated
            },
            "files": [stamp for file in files for stamp in stamps(file)],
            "carried": [
                [item.name, item.bytes, stamps(item.source) if item.source else []]
                for item in self.carried
            ],
        }

    def _write_parts(self, work: WorkFolder, progress: bool) -> None:
        total = sum(part.bytes_bf16 for source in self.sources for part in source.parts)
        done = sum(
            part.bytes_bf16
            for source in self.sources
            for part in source.parts
            if _is_finished(work, source, part)
        )
        bar = {"total": total, "initial": done, "unit": "B", "unit_scale": True}
        with (
            ThreadPoolExecutor(1, "read") as reader,
            tqdm(desc="quantizing", disable=not progress, **bar) as shown,
        ):
            for source in self.sources:
                write = _write_calibrated if source.calibrated else _write_plain
                write(work, source, reader, shown)


def _write_plain(work: WorkFolder, source: Source, reader: ThreadPoolExecutor, shown: tqdm) -> None:
    """Write the parts of a component that aren't there yet."""
    todo = collections.deque(x for x in source.parts if not _is_finished(work, source, x))
    ahead = _read_ahead(reader, source, todo)
    while todo:
        part = todo.popleft()
        params = ahead.result()
        ahead = _read_ahead(reader, source, todo)
        _write_part(work, source.name, part, params)
        shown.update(part.bytes_bf16)


def _write_calibrated(
    work: WorkFolder, source: Source, reader: ThreadPoolExecutor, shown: tqdm
) -> None:
    """Write the parts in their order, each with statistics of what those before it made.

    Parts that are there already only hand the samples on.
    """
    assert source.calibration is not None
    todo = collections.deque(source.parts)
    last = max((i for i, x in enumerate(todo) if not _is_finished(work, source, x)), default=-1)
    if last < 0:
        return
    samples = source.calibration.load(work.records / f"{source.name}.samples.npz")
    run = calibrate.BlockRun(source.model, samples)
    ahead = _read_ahead(reader, source, todo)
    for _ in range(last + 1):
        part = todo.popleft()
        params = ahead.result()
        ahead = _read_ahead(reader, source, todo)
        folder = work.contents / source.name / part.name
        if not _is_finished(work, source, part):
            seen = run.observe(part, params)
            _write_part(work, source.name, part, params, seen)
            shown.update(part.bytes_bf16)
        quantized = None
        if source.calibration.record.propagate and part.layers:
            quantized = functools.partial(checkpoint.read_part, folder)
        run.advance(part, params, source.recipe, quantized)


def _read_ahead(reader: ThreadPoolExecutor, source: Source, todo: collections.deque) -> Future:
    """Start to read the next part's parameters."""
    part = todo[0] if todo else None
    return reader.submit(
        lambda: {path: source.read(path) for path in (part.params if part else ())}
    )


def _write_part(
    work: WorkFolder, component: str, part: Part, params: dict, seen: dict | None = None
) -> None:
    folder = work.contents / component / part.name
    arrays, layers = part.quantize(params, seen)
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    sha256 = checkpoint.write_part(folder, arrays)
    layers = [schema.to_json(layer) for layer in layers]
    work.write_record(f"{component}.{part.name}", {"sha256": sha256, "layers": layers})


def _is_finished(work: WorkFolder, source: Source, part: Part) -> bool:
    """Return whether a part's files are what its record says, whatever happened since."""
    record = work.read_record(f"{source.name}.{part.name}")
    return bool(record) and record["sha256"] == hash_files(
        work.contents / source.name / part.name, "*"
    )


def _carry(item: Carried, work: WorkFolder) -> None:
    target = work.contents / item.name
    if target.exists():
        return
    item.write(work.scratch)
    sync(work.scratch)
    work.scratch.rename(target)


@contextmanager
def _hashing(
    sources: tuple[Source, ...], work: WorkFolder
) -> Iterator[dict[str, Callable[[], str]]]:
    """Hash the sources' files beside the other work; gives by component what waits for the hash."""
    with ThreadPoolExecutor(1, "hash") as hasher:
        futures = {
            source.name: [(file, hasher.submit(_hash_once, file, work)) for file in source.files]
            for source in sources
        }

        def wait(name: str) -> str:
            return join_hashes((file.name, future.result()) for file, future in futures[name])

        try:
            yield {name: functools.partial(wait, name) for name in futures}
        finally:
            hasher.shutdown(wait=False, cancel_futures=True)


def _hash_once(file: Path, work: WorkFolder) -> str:
    name = f"base.{file.parent.name}.{file.name}"
    value = work.read_record(name) or hash_file(file)
    work.write_record(name, value)
    return value


def _component(source: Source, work: WorkFolder, base_sha256: str) -> Component:
    records = {part.name: work.read_record(f"{source.name}.{part.name}") for part in source.parts}
    layers = [
        schema.from_json(LayerReport, layer)
        for record in records.values()
        for layer in record["layers"]
    ]
    elements_bf16 = sum(part.bytes_bf16 for part in source.parts)
    other = elements_bf16 - sum(layer.bytes_bf16 for layer in layers)
    return Component(
        recipe=source.recipe,
        report=Report(recipe=source.recipe.name, layers=tuple(layers), other_bytes=other),
        config=source.config,
        base_sha256=base_sha256,
        parts={name: record["sha256"] for name, record in records.items()},
        calibration=source.calibration.record if source.calibration and source.calibrated else None,
    )


def _rotated_online(source: Source) -> list[str]:
    """Return a line for each reason why a rotation isn't folded though the recipe asks for it."""
    paths: dict[str, list[str]] = {}
    for path, reason in source.recipe.online(sites(source.model)).items():
        paths.setdefault(reason, []).append(path)
    return [
        f"  rotated online, since {reason}: {', '.join(names)}" for reason, names in paths.items()
    ]


def _layer_bytes(part: Part, path: str) -> tuple[int, int]:
    """Bytes of a layer as stored and in bfloat16."""
    stored, before = (
        sum(x.size * x.dtype.itemsize for name, x in table.items() if name.startswith(f"{path}."))
        for table in (part.arrays, part.params)
    )
    return stored, before


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)
