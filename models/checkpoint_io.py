"""Safetensors checkpoints onto NNX modules, one tensor at a time.

A component's `params.py` holds a table of rules from our module paths to the checkpoint's names;
this file reads the tensors, checks that every one is accounted for and fills the module, or leaves
the reading to the caller, a parameter at a time, where the whole model is too large for memory.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from models.stored_files import (
    FLOATING,
    Checkpoint,
    CheckpointError,
    is_finite_in_bfloat16,
    refuse_quantized,
)

C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)
R = TypeVar("R")
T = TypeVar("T")

_THREADS = min(16, os.cpu_count() or 1)  # that read and check parameters; each holds one in memory
_LISTED = 20  # missing tensors that an error names, likewise misshapen and unexpected ones
# Bounds of config fields, far from what any model has, so that none is built that can't be.
WIDTHS = (1, 2**20)
BLOCKS = (0, 256)
_STORED = nnx.filterlib.Any(nnx.Param, nnx.BatchStat)  # what a checkpoint holds of a module
# Leaf of an NNX module to the suffix that torch gives the same parameter; others keep their name.
_LEAF_SUFFIX = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class TracingRngs:
    """Stands in for nnx.Rngs where a module is only traced and its initial weights are dropped.

    It has no counter: under `nnx.eval_shape` each step of a counter looks through all operations
    so far, which takes 40 of the 45 s that tracing FLUX.1 with nnx.Rngs takes.
    """

    def params(self) -> jax.Array:
        """Return a key, always the same."""
        return jax.random.key(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """From the path of one of our modules to the module names of a checkpoint."""

    pattern: str  # regular expression that matches our whole module path, such as r"blocks\.(\d+)"
    # checkpoint module names, "" for the whole; several are joined along the rows
    sources: str | tuple[str, ...]
    rows: tuple[int, ...] | None = None  # rows of each source, where there are several
    # applied to the joined tensor in the checkpoint's own layout; must be its own inverse
    transform: Callable[[np.ndarray], np.ndarray] | None = None
    leaf: str | None = None  # the parameter's name there, where it isn't torch's weight or bias
    convolution: bool = False  # a linear here, a 1x1 convolution there


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModule:
    """A module whose parameters lie in a checkpoint, every one accounted for and none read yet."""

    abstract: nnx.Module  # the module, with shapes in place of arrays
    checkpoint: Checkpoint
    sources: dict[str, tuple[list[str], Rule]]  # dotted path of a parameter to its tensors
    config: dict[str, Any]  # contents of a config.json that describes the module

    def read(self, path: str) -> np.ndarray:
        """Return one parameter in our layout and the stored dtype; float8 as bfloat16.

        A linear's kernel is a transposed view: its `.T` is contiguous. What is joined from tensors
        of several dtypes is in the float that holds them all.
        """
        names, rule = self.sources[path]
        values = [self.checkpoint.read(name) for name in names]
        value = values[0] if len(values) == 1 else _join(values)
        value = value[..., 0, 0] if rule.convolution and value.ndim == 4 else value
        value = value if rule.transform is None else rule.transform(value)
        return _to_ours(path.rpartition(".")[2], value)

    def load(self, dtype: jnp.dtype) -> nnx.Module:
        """Return the module with every parameter read, in a floating dtype.

        Raises:
          CheckpointError: a parameter holds NaN, infinity or what bfloat16 takes for it.
        """
        graphdef, state = nnx.split(self.abstract)
        flat = list(nnx.to_flat_state(state))
        read = functools.partial(self._read_checked, dtype=dtype)
        values = map(_to_device, _ahead(read, [_dotted(path) for path, _ in flat]))
        filled = [(path, x.replace(value)) for (path, x), value in zip(flat, values, strict=True)]
        return nnx.merge(graphdef, nnx.from_flat_state(filled))

    def _read_checked(self, path: str, dtype: jnp.dtype) -> np.ndarray:
        """Return a finite parameter in a dtype."""
        value = self.read(path)
        if not is_finite_in_bfloat16(value):
            self._refuse([path])
        # Cast by NumPy: on the device every shape would be a program of its own to compile.
        return value.astype(dtype, copy=False)

    def check_values(self) -> None:
        """Read every parameter once, and raise CheckpointError where a value isn't finite.

        Models here are stored in 16 bits, so what is finite in float32 only is refused too.
        """

        def is_finite(path: str) -> bool:
            return is_finite_in_bfloat16(self.read(path))

        found = zip(self.sources, _ahead(is_finite, list(self.sources)), strict=True)
        if bad := [path for path, finite in found if not finite]:
            self._refuse(bad)

    def _refuse(self, paths: Sequence[str]) -> None:
        checkpoint = self.checkpoint
        names = [name for path in paths for name in self.sources[path][0]]
        names = [x for x in names if not is_finite_in_bfloat16(checkpoint.read(x))]
        raise CheckpointError(
            f"{checkpoint.path} holds NaN, infinity or values too large for bfloat16 in "
            f"{_shorten(names, ', ')}; get another copy of the model"
        )


def config_from_json(
    cls: type[C], values: Mapping[str, Any], supported: Mapping[str, Collection] | None = None
) -> C:
    """Build a config dataclass from the keys of a config.json that it has; lists become tuples.

    Args:
      cls: the dataclass; its defaults stand in for absent keys.
      values: the parsed config.json.
      supported: the values that a key may have where our models don't cover all of them.

    Raises:
      CheckpointError: a key has a value that isn't supported.
    """
    for key, allowed in (supported or {}).items():
        if key in values and values[key] not in allowed:
            names = ", ".join(map(repr, allowed))
            raise CheckpointError(
                f"{cls.__name__}: {key} = {values[key]!r} is not supported; expected {names}"
            )
    kinds = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)} & values.keys()
    for key in sorted(known):
        if not _is_of_kind(values[key], kinds[key]):
            raise CheckpointError(
                f"{cls.__name__}: {key} = {values[key]!r} has the wrong type; expected "
                f"{_in_words(kinds[key])}"
            )
    as_static = {
        key: tuple(values[key]) if isinstance(values[key], list) else values[key] for key in known
    }
    return cls(**as_static)


def count_blocks(kind: str, names: Collection[str]) -> int:
    """Return how many blocks names such as "double_blocks.3.x" have, of a regular expression's."""
    matches = (re.match(rf"{kind}\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def check_bounds(config: Any, **bounds: tuple[float, float]) -> None:
    """Raise CheckpointError unless fields of a config lie within bounds, both included.

    Args:
      config: a dataclass; of a tuple every item is held to the bounds, None is left alone.
      **bounds: lowest and highest value by field. NaN is within none.
    """
    for name, (lowest, highest) in bounds.items():
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        if not all(item is None or lowest <= item <= highest for item in items):
            raise CheckpointError(
                f"{type(config).__name__}: {name} = {value!r} is out of range; expected "
                f"{lowest} to {highest}"
            )


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Return whether a value from JSON is of an annotation's type; an int will do for a float."""
    if isinstance(kind, types.UnionType):
        return any(_is_of_kind(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(
            _is_of_kind(item, typing.get_args(kind)[0]) for item in value
        )
    if kind is float:
        return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)
    return type(value) is kind


def _in_words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_in_words, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a list, each item " + _in_words(typing.get_args(kind)[0])
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    return names.get(kind, "null")


def match_params(
    build: Callable[[], nnx.Module],
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    *,
    config: Mapping[str, Any],
    ignore: Sequence[str] = (),
) -> StoredModule:
    """Find the tensors of every parameter of a module, without reading any.

    Linear kernels are stored [in, out] here and [out, in] in the checkpoint, convolutions HWIO
    here and OIHW there; both are transposed. A module path without a rule keeps its name.

    Args:
      build: makes the module; run under `nnx.eval_shape`, so it costs nothing.
      checkpoint: the opened tensors.
      rules: ordered; the first whose pattern matches the whole module path wins.
      config: contents of the module's config.json.
      ignore: regular expressions of checkpoint names that have no parameter here.

    Raises:
      CheckpointError: the model is quantized; or it lists all missing, misshapen and unexpected
        tensors, and those that aren't floats, together.
    """
    refuse_quantized(checkpoint.path, checkpoint.shapes, {})
    abstract = nnx.eval_shape(build)
    sources, missing, misshapen, used = {}, [], [], set()
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        names, rule = sources[_dotted(path)] = _sources(path, rules)
        used.update(names)
        for name, wanted in zip(names, _stored_shapes(path, variable.shape, rule), strict=True):
            found = checkpoint.shapes.get(name)
            if found is None:
                missing.append(f"missing {name}")
            elif found != wanted:
                misshapen.append(f"misshapen {name}: {list(found)}, expected {list(wanted)}")
            elif (stored := checkpoint.dtypes[name]) not in FLOATING:
                misshapen.append(f"{name} is stored as {stored}, which holds no weights by itself")
    unexpected = [
        f"unexpected {name}"
        for name in sorted(set(checkpoint.shapes) - used)
        if not any(re.fullmatch(pattern, name) for pattern in ignore)
    ]
    if missing or misshapen or unexpected:
        problems = [_shorten(several) for several in (missing, misshapen, unexpected)]
        raise CheckpointError(f"{checkpoint.path}: " + "; ".join(filter(None, problems)))
    return StoredModule(
        abstract=abstract, checkpoint=checkpoint, sources=sources, config=dict(config)
    )


def load_params(
    build: Callable[[], M],
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    *,
    dtype: jnp.dtype,
    ignore: Sequence[str] = (),
) -> M:
    """Build a module and fill it from a checkpoint without ever initialising it.

    Args:
      build: as for `match_params`, like `checkpoint`, `rules` and `ignore`.
      checkpoint: the opened tensors.
      rules: ordered.
      dtype: floating dtype of every parameter.
      ignore: names without a parameter here.

    Raises:
      CheckpointError: lists all missing, misshapen and unexpected tensors together.
    """
    return match_params(build, checkpoint, rules, config={}, ignore=ignore).load(dtype)


def stored_tensors(
    build: Callable[[], nnx.Module], rules: Sequence[Rule]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return leaf ("kernel", "bias", ...) and shape of all tensors of a module's checkpoint.

    Args:
      build: makes the module; only traced. The tensors come in its order.
      rules: those that the checkpoint is read with.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(nnx.eval_shape(build))):
        names, rule = _sources(path, rules)
        for name, shape in zip(names, _stored_shapes(path, variable.shape, rule), strict=True):
            tensors[name] = (path[-1], shape)
    return tensors


def export_params(module: nnx.Module, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Return a module's tensors under checkpoint names and in checkpoint layout.

    The inverse of `load_params` with the same rules.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, _STORED)):
        names, rule = _sources(path, rules)
        value = _to_stored(path[-1], np.asarray(variable[...]))
        value = value if rule.transform is None else rule.transform(value)
        value = value[..., None, None] if rule.convolution and value.ndim == 2 else value
        ends = np.cumsum(rule.rows)[:-1] if rule.rows else []
        for name, part in zip(names, np.split(value, ends), strict=True):
            tensors[name] = np.ascontiguousarray(part)
    return tensors


def save_params(
    module: nnx.Module,
    folder: Path | str,
    rules: Sequence[Rule],
    *,
    config: Mapping[str, Any],
    filename: str,
    dtype: jnp.dtype,
) -> None:
    """Write a component folder that torch's `from_pretrained` reads: weights and config.json.

    The weights get their name last, so an interrupted save has nothing that loads.

    Args:
      module: the component.
      folder: made if absent.
      rules: those that `load_params` reads it back with.
      config: contents of config.json.
      filename: of the weights, such as "model.safetensors".
      dtype: floating dtype that every tensor is stored in.

    Raises:
      CheckpointError: the folder holds weights under another name, which would be loaded instead.
      OSError: they can't be written.
    """
    folder = Path(folder)
    partial = folder / f"{filename}.partial"
    found = (file.name for file in folder.glob("*.safetensors*"))
    others = {name for name in found if name[0] != "."} - {filename, partial.name}
    if others:
        raise CheckpointError(
            f"{folder} already holds {', '.join(sorted(others))}; save to an empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.astype(dtype) for key, value in export_params(module, rules).items()}
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / filename}: {error}") from error
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    partial.replace(folder / filename)


def _ahead(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield what a function gives for each item, in their order, some computed ahead in threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        started: collections.deque[Future[R]] = collections.deque()
        for item in items:
            started.append(pool.submit(function, item))
            if len(started) > _THREADS:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()


def _to_device(value: np.ndarray) -> jax.Array:
    """Return an array on JAX's default device, in memory of its own.

    What lies transposed in memory is turned there: a host would take longer for it than for reading
    the file. A CPU takes a copy, since JAX would use the memory as it is, and that may be a file's.
    """
    if jax.default_backend() == "cpu":
        return jnp.asarray(np.array(value, order="C"))
    if value.ndim == 2 and not value.flags.c_contiguous and value.flags.f_contiguous:
        return _transposed(jnp.asarray(value.T))
    return jnp.asarray(value)


_transposed = jax.jit(jnp.transpose)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _shorten(problems: list[str], separator: str = "; ") -> str:
    """Join problems of one kind; of a wrong model every tensor is one, so there is a limit."""
    rest = len(problems) - _LISTED
    more = [f"and {rest} more like this"] if rest > 0 else []
    return separator.join([*problems[:_LISTED], *more])


def _join(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return tensors joined along the rows; of several dtypes in the one that holds them all."""
    if len({value.dtype for value in values}) > 1:
        # NumPy has no common dtype of float16 and bfloat16.
        wide = np.float64 if any(x.dtype == np.float64 for x in values) else np.float32
        values = [value.astype(wide) for value in values]
    return np.concatenate(values)


def _sources(path: tuple, rules: Sequence[Rule]) -> tuple[list[str], Rule]:
    module, leaf = _dotted(path[:-1]), path[-1]
    for rule in rules:
        match = re.fullmatch(rule.pattern, module)
        if match:
            sources = (rule.sources,) if isinstance(rule.sources, str) else rule.sources
            suffix = rule.leaf or _LEAF_SUFFIX.get(leaf, leaf)
            paths = (match.expand(source) for source in sources)
            return [f"{path}.{suffix}" if path else suffix for path in paths], rule
    name = _dotted((*path[:-1], _LEAF_SUFFIX.get(leaf, leaf)))
    return [name], Rule(pattern="", sources=module)


def _stored_shapes(path: tuple, shape: tuple[int, ...], rule: Rule) -> list[tuple[int, ...]]:
    """Return the shape of each tensor that a parameter is stored as."""
    leaf, shape = path[-1], tuple(shape)
    if leaf == "kernel" and len(shape) == 4:
        height, width, inputs, outputs = shape
        shape = (outputs, inputs, height, width)
    elif leaf == "kernel":
        shape = (*reversed(shape), 1, 1) if rule.convolution else tuple(reversed(shape))
    return [(rows, *shape[1:]) for rows in rule.rows or shape[:1]]


def _to_ours(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if leaf == "kernel" else value


def _to_stored(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if leaf == "kernel" else value
