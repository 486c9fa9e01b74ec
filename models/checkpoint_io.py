"""Safetensors checkpoints onto NNX modules, one tensor at a time.

A component's `params.py` holds a table of rules from our module paths to the checkpoint's names;
this file reads the tensors, checks that every one is accounted for and fills the module, or leaves
the reading to the caller, a parameter at a time, where the whole model is too large for memory.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)

# That ComfyUI puts before every name of a transformer.
_COMFY_PREFIX = "model.diffusion_model."
_LISTED = 20  # missing tensors that an error names, likewise misshapen and unexpected ones
# Leaf of an NNX module to the suffix that torch gives the same parameter.
_LEAF_SUFFIX = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class CheckpointError(ValueError):
    """A model folder or checkpoint that can't be used; the message names the file or tensor."""


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
    sources: str | tuple[str, ...]  # checkpoint module names; several are joined along the rows
    rows: tuple[int, ...] | None = None  # rows of each source, where there are several
    # applied to the joined tensor in the checkpoint's own layout; must be its own inverse
    transform: Callable[[np.ndarray], np.ndarray] | None = None
    leaf: str | None = None  # the parameter's name there, where it isn't torch's weight or bias
    convolution: bool = False  # a linear here, a 1x1 convolution there


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors of one or several safetensors files, memory-mapped and read by name."""

    path: Path  # of the folder or the single file
    files: dict[str, Path]  # tensor name to file
    shapes: dict[str, tuple[int, ...]]  # tensor name to shape
    prefix: str = ""  # that every name has in the files and lacks here

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in its stored dtype (bfloat16 through ml_dtypes)."""
        with safe_open(self.files[name], "np") as file:
            return file.get_tensor(self.prefix + name)

    def stored_dtype(self, name: str) -> str:
        """Return a tensor's dtype in the words of safetensors, such as "BF16"."""
        with safe_open(self.files[name], "np") as file:
            return file.get_slice(self.prefix + name).get_dtype()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModule:
    """A module whose parameters lie in a checkpoint, every one accounted for and none read yet."""

    abstract: nnx.Module  # the module, with shapes in place of arrays
    checkpoint: Checkpoint
    sources: dict[str, tuple[list[str], Rule]]  # dotted path of a parameter to its tensors
    config: dict[str, Any]  # contents of a config.json that describes the module

    def read(self, path: str) -> np.ndarray:
        """Return one parameter in our layout and the stored dtype.

        A linear's kernel is a transposed view: its `.T` is contiguous.
        """
        names, rule = self.sources[path]
        value = self.checkpoint.read(names[0])
        if len(names) > 1:
            value = np.concatenate([value, *map(self.checkpoint.read, names[1:])])
        value = value[..., 0, 0] if rule.convolution and value.ndim == 4 else value
        value = value if rule.transform is None else rule.transform(value)
        return _to_ours(path.rpartition(".")[2], value)

    def load(self, dtype: jnp.dtype) -> nnx.Module:
        """Return the module with every parameter read, in a floating dtype."""
        graphdef, state = nnx.split(self.abstract)
        # Cast by NumPy: on the device every shape would be a program of its own to compile.
        filled = [
            (
                path,
                variable.replace(jnp.asarray(self.read(_dotted(path)).astype(dtype, copy=False))),
            )
            for path, variable in nnx.to_flat_state(state)
        ]
        return nnx.merge(graphdef, nnx.from_flat_state(filled))


def read_json(path: Path) -> dict:
    """Read a JSON object; raises CheckpointError naming the file if it is absent or malformed."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a diffusers model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


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
    known = {field.name for field in dataclasses.fields(cls)} & values.keys()
    as_static = {
        key: tuple(values[key]) if isinstance(values[key], list) else values[key] for key in known
    }
    return cls(**as_static)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the safetensors of a component: a folder with an index or one file, or a file itself.

    Raises:
      CheckpointError: no safetensors there, a shard is missing, or a file is corrupt or truncated.
    """
    path = Path(path)
    files = {}
    shapes = {}
    for file in _safetensors(path):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    files[name] = file
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None
    if not all(name.startswith(_COMFY_PREFIX) for name in files):
        return Checkpoint(path, files, shapes)
    length = len(_COMFY_PREFIX)
    files, shapes = ({name[length:]: x for name, x in table.items()} for table in (files, shapes))
    return Checkpoint(path, files, shapes, _COMFY_PREFIX)


def _safetensors(path: Path) -> list[Path]:
    """Return the files that together hold a component."""
    if path.is_file():
        return [path]
    indexes = sorted(path.glob("*.safetensors.index.json"))
    singles = sorted(path.glob("*.safetensors"))
    if not indexes and len(singles) == 1:
        return singles
    if not indexes:
        raise CheckpointError(
            f"{path} holds {len(singles)} safetensors files and no index; expected one file or "
            "one *.safetensors.index.json"
        )
    weight_map = read_json(indexes[0]).get("weight_map", {})
    files = [path / shard for shard in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(f"{indexes[0]} names missing shards: {', '.join(missing)}")
    return files


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
      CheckpointError: lists all missing, misshapen and unexpected tensors together.
    """
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
    unexpected = [
        f"unexpected {name}"
        for name in sorted(set(checkpoint.shapes) - used)
        if not any(re.fullmatch(pattern, name) for pattern in ignore)
    ]
    if missing or misshapen or unexpected:
        problems = [*map(_shorten, (missing, misshapen, unexpected))]
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
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
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
    others = {file.name for file in folder.glob("*.safetensors*")} - {filename, partial.name}
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


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _shorten(problems: list[str]) -> str:
    """Join problems of one kind; of a wrong model every tensor is one, so there is a limit."""
    rest = len(problems) - _LISTED
    return "; ".join(problems[:_LISTED]) + (f"; and {rest} more like this" if rest > 0 else "")


def _sources(path: tuple, rules: Sequence[Rule]) -> tuple[list[str], Rule]:
    module, leaf = _dotted(path[:-1]), path[-1]
    for rule in rules:
        match = re.fullmatch(rule.pattern, module)
        if match:
            sources = (rule.sources,) if isinstance(rule.sources, str) else rule.sources
            suffix = rule.leaf or _LEAF_SUFFIX[leaf]
            return [f"{match.expand(source)}.{suffix}" for source in sources], rule
    name = _dotted((*path[:-1], _LEAF_SUFFIX[leaf]))
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
