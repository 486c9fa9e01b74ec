"""Safetensors checkpoints onto NNX modules, one tensor at a time.

A component's `params.py` holds a table of rules from our module paths to the checkpoint's names;
this file reads the tensors, checks that every one is accounted for and fills the module.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)

# Leaf of an NNX module to the suffix that torch gives the same parameter.
_LEAF_SUFFIX = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class CheckpointError(ValueError):
    """A model folder or checkpoint that can't be used; the message names the file or tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """From the path of one of our modules to the module names of a checkpoint."""

    pattern: str  # regular expression that matches our whole module path, such as r"blocks\.(\d+)"
    sources: str | tuple[str, ...]  # checkpoint module names; several are joined along the rows
    rows: tuple[int, ...] | None = None  # rows of each source, where there are several
    # applied to the joined tensor in the checkpoint's own layout; must be its own inverse
    transform: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors of one or several safetensors files, memory-mapped and read by name."""

    folder: Path
    files: dict[str, Path]  # tensor name to file
    shapes: dict[str, tuple[int, ...]]  # tensor name to shape

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in its stored dtype (bfloat16 through ml_dtypes)."""
        with safe_open(self.files[name], "np") as file:
            return file.get_tensor(name)


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


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Open the safetensors of one component folder: an index with shards, or a single file.

    Raises:
      CheckpointError: no safetensors there, a shard is missing, or a file is corrupt.
    """
    folder = Path(folder)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    singles = sorted(folder.glob("*.safetensors"))
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map", {})
        files = [folder / shard for shard in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{indexes[0]} names missing shards: {', '.join(missing)}")
    elif len(singles) == 1:
        files = singles
    else:
        raise CheckpointError(
            f"{folder} holds {len(singles)} safetensors files and no index; expected one file or "
            "one *.safetensors.index.json"
        )
    where, shapes = {}, {}
    for file in files:
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    where[name] = file
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None
    return Checkpoint(folder, where, shapes)


def load_params(
    build: Callable[[], M],
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    *,
    dtype: jnp.dtype,
    ignore: Sequence[str] = (),
) -> M:
    """Build a module and fill it from a checkpoint without ever initialising it.

    Linear kernels are stored [in, out] here and [out, in] in the checkpoint, convolutions HWIO
    here and OIHW there; both are transposed. A module path without a rule keeps its name.

    Args:
      build: makes the module; run under `nnx.eval_shape`, so it costs nothing.
      checkpoint: the opened tensors.
      rules: ordered; the first whose pattern matches the whole module path wins.
      dtype: floating dtype of every parameter.
      ignore: regular expressions of checkpoint names that have no parameter here.

    Raises:
      CheckpointError: lists all missing, misshapen and unexpected tensors together.
    """
    graphdef, state = nnx.split(nnx.eval_shape(build))
    plan, problems, used = [], [], set()
    for path, variable in nnx.to_flat_state(state):
        names, rule = _sources(path, rules)
        used.update(names)
        expected = _stored_shape(path[-1], variable.shape)
        for name, rows in zip(names, rule.rows or expected[:1], strict=True):
            found = checkpoint.shapes.get(name)
            if found is None:
                problems.append(f"missing {name}")
            elif found != (rows, *expected[1:]):
                wanted = [rows, *expected[1:]]
                problems.append(f"misshapen {name}: {list(found)}, expected {wanted}")
        plan.append((path, variable, names, rule.transform))
    unexpected = sorted(set(checkpoint.shapes) - used)
    problems += [
        f"unexpected {name}"
        for name in unexpected
        if not any(re.fullmatch(pattern, name) for pattern in ignore)
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(problems))
    filled = []
    for path, variable, names, transform in plan:
        value = np.concatenate([checkpoint.read(name) for name in names])
        value = value if transform is None else transform(value)
        value = _to_ours(path[-1], value).reshape(variable.shape)
        filled.append((path, variable.replace(jnp.asarray(value, dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def export_params(module: nnx.Module, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Return a module's tensors under checkpoint names and in checkpoint layout.

    The inverse of `load_params` with the same rules.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        names, rule = _sources(path, rules)
        value = _to_stored(path[-1], np.asarray(variable[...]))
        value = value if rule.transform is None else rule.transform(value)
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
    save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    partial.replace(folder / filename)


def _sources(path: tuple, rules: Sequence[Rule]) -> tuple[list[str], Rule]:
    module, leaf = ".".join(map(str, path[:-1])), path[-1]
    suffix = "." + _LEAF_SUFFIX[leaf] if module else _LEAF_SUFFIX[leaf]
    for rule in rules:
        match = re.fullmatch(rule.pattern, module)
        if match:
            sources = (rule.sources,) if isinstance(rule.sources, str) else rule.sources
            return [match.expand(source) + suffix for source in sources], rule
    return [module + suffix], Rule(pattern="", sources=module)


def _stored_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if leaf == "kernel" and len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return tuple(reversed(shape)) if leaf == "kernel" else tuple(shape)


def _to_ours(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if leaf == "kernel" else value


def _to_stored(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if leaf == "kernel" else value
