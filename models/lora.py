"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685).

An adapter adds `scale * alpha / rank * up(down(x))` to linears. It stays a 16-bit side branch, so
the linear itself may be quantized; one that has a `with_branch` computes it in its own product.
Namings, as diffusers' `loaders/lora_conversion_utils.py` reads them: diffusers' and PEFT's
(`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`), kohya's
(`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`) and the makers' module names behind a
prefix (`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`). Which module names there are,
the family says (`models.family.AdapterNaming`).

The alpha is a tensor beside the factors, or stands in PEFT's config: in the file's metadata, as
diffusers stores it, or in adapter_config.json beside the file, as PEFT does.
"""

import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoint_io import Rule
from models.component import Component
from models.family import Family
from models.linear import ACTIVATIONS, Norm, Part, join, normalize
from models.stored_files import (
    FLOATING,
    Checkpoint,
    CheckpointError,
    is_finite_in_bfloat16,
    open_checkpoint,
    read_json,
    weights_in,
)

M = TypeVar("M", bound=nnx.Module)

_LISTED = 20  # problems that an error names; of an adapter for another model every key is one
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_PARTS = {
    _DOWN: r"(?:lora_A|lora_down|lora\.down)(?:\.default)?\.weight",
    _UP: r"(?:lora_B|lora_up|lora\.up)(?:\.default)?\.weight",
    _ALPHA: "alpha",
}
_TEXT_ENCODERS = ("lora_te", "text_encoder")
_INTEGER = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")  # that an alpha may have
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers stores PEFT's config, as JSON
_PEFT_PREFIX = "base_model.model."  # of keys that PEFT saved itself
_PEFT_CONFIG = "adapter_config.json"
_PEFT_ALPHA = 8  # PEFT's lora_alpha where its config gives none
# What PEFT's config may ask for that isn't a plain branch beside the weights as they are.
_UNLIKE_LORA = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication")
_UNLIKE_LORA += ("arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens")
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to initialise, too
_LARGEST = float(np.finfo(np.float32).max)  # number that a scale may be
# Unbounded repetitions in a pattern: matching takes up to this power of a name's length.
_REPETITIONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """What one adapter adds to one of our linears: `x @ down @ up`, all factors included."""

    down: np.ndarray  # float32 [k, rank]
    up: np.ndarray  # float32 [rank, n]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was read and checked; nothing of it is on the device."""

    path: Path
    branches: dict[str, Branch]  # dotted path of our linear to what is added to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Target:
    """The rows of one of our linears that a module of the adapter's naming stands for."""

    path: str  # of our linear
    shape: tuple[int, int]  # of our linear, (n, k)
    start: int  # the first row
    rows: int
    transform: Callable[[np.ndarray], np.ndarray] | None = None  # of the rows, to our order


class LoRALinear(nnx.Module):
    """A linear with a low-rank branch beside it; called like `Linear`."""

    def __init__(
        self,
        base: nnx.Module,
        down: jax.Array,  # [k, rank]
        up: jax.Array,  # [rank, n]
    ):
        self.base = base
        self.down = nnx.Param(down)
        self.up = nnx.Param(up)

    def __call__(
        self,
        x: jax.Array | tuple[Part, ...],  # [..., k], or parts that lie side by side
        *,
        norm: Norm | None = None,  # of [k] or [b, 1, k]
        activation: str | None = None,  # "gelu": its tanh form
        gate: jax.Array | None = None,  # [b, 1, n]
        residual: jax.Array | None = None,  # [..., n]
    ) -> jax.Array:
        """Return residual + gate * activation(base(x') + x' down up), x' the normed x."""
        y = self.base(x) if norm is None else self.base(x, norm=norm)
        y = y + (self._narrow(x, norm) @ self.up).astype(y.dtype)
        y = y if activation is None else ACTIVATIONS[activation](y)
        y = y if gate is None else gate * y
        return y if residual is None else residual + y

    def _narrow(
        self,
        x: jax.Array | tuple[Part, ...],
        norm: Norm | None,
    ) -> jax.Array:
        """Return x' down, [..., rank]; of parts the sum of theirs, so that nothing is joined."""
        if norm is not None or not isinstance(x, tuple):
            whole = join(x) if norm is None else normalize(join(x), norm)
            x = (Part(array=whole, size=whole.shape[-1]),)
        ends = np.cumsum([part.size for part in x])[:-1]
        pieces = zip(x, jnp.split(self.down.get_value(), ends), strict=True)
        return sum(part.value().astype(down.dtype) @ down for part, down in pieces)


def add_lora(
    model: M,
    adapters: Sequence[Adapter],
    scales: Sequence[float] | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
) -> M:
    """Return a copy of a model with adapters as side branches; it shares the weights.

    Args:
      model: with linears of any kind, quantized or not.
      adapters: from `read_lora`, with the model's config.
      scales: one for each adapter; 1 if None.
      dtype: of the branches.

    Raises:
      ValueError: a scale is no finite number, or makes a factor infinite.
    """
    scales = [1.0] * len(adapters) if scales is None else scales
    for scale in scales:
        if not abs(scale) <= _LARGEST:
            raise ValueError(f"scales holds {scale}; every scale must be a finite number")
    found: dict[str, list[Branch]] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for path, branch in adapter.branches.items():
            with np.errstate(over="ignore"):
                scaled = Branch(down=branch.down, up=np.float32(scale) * branch.up)
            if not is_finite_in_bfloat16(scaled.up):
                raise ValueError(f"scales holds {scale}, too large for {path} of {adapter.path}")
            found.setdefault(path, []).append(scaled)
    model = nnx.clone(model)
    for path, branches in found.items():
        down = np.concatenate([branch.down for branch in branches], axis=1)
        up = np.concatenate([branch.up for branch in branches])
        *parents, name = path.split(".")
        parent: Any = model
        for step in parents:
            parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
        base = getattr(parent, name)
        if hasattr(base, "with_branch"):  # a layer that takes a branch into its product
            setattr(parent, name, base.with_branch(down, up, dtype))
        else:
            setattr(
                parent, name, LoRALinear(base, jnp.asarray(down, dtype), jnp.asarray(up, dtype))
            )
    return model


def read_lora(
    path: Path | str, family: Family, config: Any, *, transformer_only: bool = False
) -> Adapter:
    """Read and check an adapter.

    Args:
      path: a safetensors file in one of the family's namings.
      family: of the model that it is for.
      config: of the family's main component.
      transformer_only: leave out keys of the text encoders, which take no adapter here.

    Raises:
      CheckpointError: the file or PEFT's config can't be used; or it lists what is wrong: unknown
        keys, keys of the text encoders, linears that are given twice, and factors that are missing,
        misshapen, no floats or infinite.
    """
    path = Path(path)
    checkpoint = _open(path)
    peft = _peft_config(path, checkpoint)
    targets = dict(_targets(family, config))
    modules, problems = _modules(checkpoint, targets, transformer_only)
    pieces: dict[str, list[tuple[_Target, np.ndarray, np.ndarray]]] = {}
    given: dict[str, list[tuple[str, _Target]]] = {}
    for module, keys in modules.items():
        target = targets[module]
        wrong = list(_check(module, keys, checkpoint, target))
        wrong += _check_twice(module, target, given.setdefault(target.path, []))
        problems += wrong
        if wrong:
            continue
        parts = {part: _read(checkpoint, key) for part, key in keys.items()}
        if not parts[_DOWN].size:
            continue  # of rank 0, as scripts that resize adapters leave them: adds nothing
        try:
            factor = _factor(module, parts, peft)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            parts[_UP] = parts[_UP] * np.float32(factor)
        if not all(map(is_finite_in_bfloat16, parts.values())):
            problems.append(f"{module} holds NaN or infinity, or its alpha makes it infinite")
        pieces.setdefault(target.path, []).append((target, parts[_DOWN], parts[_UP]))
    if problems:
        rest = len(problems) - _LISTED
        listed = "; ".join(problems[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
        raise CheckpointError(f"LoRA {path} doesn't fit this transformer: {listed}")
    if not peft and any(x.startswith(_PEFT_PREFIX) for x in modules) and not _has_alphas(modules):
        warnings.warn(
            f"LoRA {path} was saved by PEFT, whose {_PEFT_CONFIG} holds its scale, and isn't there;"
            " it is taken as 1",
            stacklevel=2,
        )
    return Adapter(path=path, branches={path: _join(several) for path, several in pieces.items()})


def _has_alphas(modules: Mapping[str, Mapping[str, str]]) -> bool:
    return any(_ALPHA in keys for keys in modules.values())


def _modules(
    checkpoint: Checkpoint, targets: Mapping[str, Any], transformer_only: bool
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the keys of each module by what they hold, and what is wrong with the others."""
    modules: dict[str, dict[str, str]] = {}
    problems, of_text = [], []
    for key in checkpoint.shapes:
        module, part = _parse(key)
        if key.startswith(_TEXT_ENCODERS):
            of_text.append(key)
        elif module not in targets:
            problems.append(f"unknown key {key}")
        elif part in modules.setdefault(module, {}):
            problems.append(f"{modules[module][part]} and {key} are the same factor")
        else:
            modules[module][part] = key
    if of_text and not transformer_only:
        problems.append(
            f"{len(of_text)} keys such as {of_text[0]} are for text encoders, which take no "
            "adapter here; leave them out with transformer_only (--lora-transformer-only)"
        )
    if not modules and not problems:
        problems.append("it holds no tensors" + " for the transformer" * bool(of_text))
    return modules, problems


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        raise CheckpointError(f"LoRA {path} is a folder; give the safetensors file in it")
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"LoRA {path} can't be read as safetensors: {error}") from None


def _read(checkpoint: Checkpoint, key: str) -> np.ndarray:
    """Return a factor or an alpha as float32; a linear's may be stored as a 1x1 convolution's."""
    value = checkpoint.read(key)
    value = value[..., 0, 0] if value.ndim == 4 else value
    with np.errstate(over="ignore"):  # what is infinite then is refused
        return value.astype(np.float32)


def _peft_config(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return PEFT's config of an adapter for the transformer, checked; {} if there is none.

    Raises:
      CheckpointError: it can't be read, or asks for what isn't a low-rank branch.
    """
    where, found = f"LoRA {path}: {_METADATA_KEY}", _config_in_metadata(path, checkpoint)
    beside = path.parent / _PEFT_CONFIG
    if not found and beside.exists() and _is_of(path, checkpoint):
        where, found = str(beside), read_json(beside)
    _check_peft(where, found)
    return found


def _config_in_metadata(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what diffusers stored of PEFT's config for the transformer; {} for nothing."""
    where = f"LoRA {path}: {_METADATA_KEY}"
    try:
        found = json.loads(checkpoint.metadata.get(_METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} must be a JSON object, not {type(found).__name__}")
    # Of a pipeline's adapter the keys have the component's name, of a model's own none.
    prefix = "transformer."
    of_model = {key[len(prefix) :]: x for key, x in found.items() if key.startswith(prefix)}
    return of_model or {key: x for key, x in found.items() if "." not in key}


def _is_of(path: Path, checkpoint: Checkpoint) -> bool:
    """Return whether the adapter_config.json beside a file is the file's."""
    return (
        path.name == "adapter_model.safetensors"
        or any(key.startswith(_PEFT_PREFIX) for key in checkpoint.shapes)
        or len(weights_in(path.parent)) == 1
    )


def _check_peft(where: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless PEFT's config is that of a plain LoRA, with usable numbers."""
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config['peft_type']!r}; expected 'LORA'")
    if asked := [name for name in _UNLIKE_LORA if config.get(name)]:
        raise CheckpointError(f"{where} asks for {', '.join(asked)}, which isn't supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
        raise CheckpointError(
            f"{where}: init_lora_weights is {start!r}, which changes the model's own weights; "
            "convert the adapter to a plain LoRA"
        )
    if not isinstance(config.get("use_rslora") or False, bool):
        raise CheckpointError(f"{where}: use_rslora is {config['use_rslora']!r}; expected a bool")
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{where}: {name} is {patterns!r}; expected a JSON object")
        for pattern, number in patterns.items():
            _check_pattern(f"{where}: {name}", pattern)
            _check_number(f"{where}: {name}[{pattern!r}]", number)
    for name in ("lora_alpha", "r"):
        if name in config:
            _check_number(f"{where}: {name}", config[name])


def _check_number(where: str, value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise CheckpointError(f"{where} is {value!r}; expected a finite number")


def _check_pattern(where: str, pattern: str) -> None:
    """Raise CheckpointError for no regular expression, or one that may take for ever to match."""
    nested = re.search(r"\)[*+{?]", pattern)
    if nested or len(re.findall(r"[*+{]", pattern)) > _REPETITIONS or len(pattern) > 1000:
        raise CheckpointError(f"{where}: the pattern {pattern[:100]!r} is too intricate")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: {pattern[:100]!r} is no regular expression: {error}"
        ) from None


def _parse(key: str) -> tuple[str, str]:
    """Return the module of a key and what it holds; two empty texts if it is no adapter's key."""
    for part, pattern in _PARTS.items():
        if match := re.fullmatch(rf"(.+)\.{pattern}", key):
            return match[1], part
    return "", ""


def _targets(family: Family, config: Any) -> Iterator[tuple[str, _Target]]:
    """Yield every name that an adapter may give a module, and what that is here."""
    linears = _linears(family.components[family.main], config)
    for naming in family.adapters:
        rules = [(re.compile(rule.pattern), rule) for rule in naming.rules(config)]
        for path, shape in linears:
            for name, target in _named(path, shape, rules):
                for prefix in naming.prefixes:
                    yield prefix + name, target
                yield naming.flat + name.replace(".", "_"), target


def _named(
    path: str, shape: tuple[int, int], rules: Sequence[tuple[re.Pattern, Rule]]
) -> Iterator[tuple[str, _Target]]:
    """Yield a naming's modules for one of our linears."""
    found = ((x, match) for pattern, x in rules if (match := pattern.fullmatch(path)))
    rule, match = next(found, (None, None))
    if rule is None or match is None:
        yield path, _Target(path=path, shape=shape, start=0, rows=shape[0])
        return
    sources = (rule.sources,) if isinstance(rule.sources, str) else rule.sources
    start = 0
    for source, rows in zip(sources, rule.rows or shape[:1], strict=True):
        part: dict[str, Any] = {"path": path, "shape": shape, "transform": rule.transform}
        yield match.expand(source), _Target(**part, start=start, rows=rows)
        start += rows


@functools.lru_cache(maxsize=8)
def _linears(component: Component, config: Any) -> list[tuple[str, tuple[int, int]]]:
    """Return dotted path and (n, k) of every linear."""
    model = nnx.eval_shape(lambda: component.build(config))
    found = ((path, x) for path, x in nnx.iter_modules(model) if isinstance(x, nnx.Linear))
    return [(".".join(map(str, path)), (x.out_features, x.in_features)) for path, x in found]


def _check(
    module: str, keys: Mapping[str, str], checkpoint: Checkpoint, target: _Target
) -> Iterator[str]:
    """Yield what is wrong with the factors of one module."""
    if missing := [name for name in (_DOWN, _UP) if name not in keys]:
        yield f"{module} lacks lora_{missing[0]}"
        return
    shapes = {part: checkpoint.shapes[key] for part, key in keys.items()}
    shapes = {part: x[:2] if x[2:] == (1, 1) else x for part, x in shapes.items()}
    down, up, inputs = shapes[_DOWN], shapes[_UP], target.shape[1]
    if len(down) != 2 or down[1] != inputs:
        yield f"{module}: lora_down is {list(down)}, expected [rank, {inputs}]"
    elif up != (target.rows, down[0]):
        yield (
            f"{module}: lora_up is {list(up)}, expected {[target.rows, down[0]]} (rank {down[0]} "
            "as in lora_down)"
        )
    if _ALPHA in keys and math.prod(shapes[_ALPHA]) != 1:
        yield f"{module}: alpha is {list(shapes[_ALPHA])}, expected one number"
    for part, key in keys.items():
        if checkpoint.dtypes[key] not in FLOATING + (_INTEGER if part == _ALPHA else ()):
            yield f"{key} is stored as {checkpoint.dtypes[key]}, expected floats"


def _check_twice(module: str, target: _Target, given: list[tuple[str, _Target]]) -> Iterator[str]:
    """Yield a module that stands for the same rows of a linear; note this one's."""
    for other, rows in given:
        if target.start < rows.start + rows.rows and rows.start < target.start + target.rows:
            yield f"{other} and {module} are the same linear in two namings"
    given.append((module, target))


def _factor(module: str, parts: dict[str, np.ndarray], config: dict[str, Any]) -> float:
    """Return alpha / rank; without an alpha or PEFT's config it is 1.

    PEFT's config may ask for alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732).

    Raises:
      CheckpointError: the config has another rank, so it isn't this file's.
    """
    rank = parts[_DOWN].shape[0]
    if _ALPHA in parts:
        return float(parts[_ALPHA].reshape(())) / rank
    if not config:
        return 1.0
    name = re.sub(r"^(transformer|base_model\.model|diffusion_model)\.", "", module)
    wanted = _of_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    if wanted != rank:
        raise CheckpointError(f"{module} has rank {rank}, and PEFT's config says {wanted}")
    alpha = _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", _PEFT_ALPHA))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the number of the first pattern that a module's name ends with, as PEFT finds it."""
    found = (x for pattern, x in (patterns or {}).items() if _ends_with(pattern).fullmatch(name))
    return next(found, default)


@functools.lru_cache(maxsize=4096)
def _ends_with(pattern: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({pattern})")


def _join(pieces: list[tuple[_Target, np.ndarray, np.ndarray]]) -> Branch:
    """Put the factors of a fused linear's parts side by side; `up` gets a block for each."""
    ranks = [down.shape[0] for _, down, _ in pieces]
    joined = np.zeros((sum(ranks), pieces[0][0].shape[0]), np.float32)
    for (target, _, up), end in zip(pieces, np.cumsum(ranks), strict=True):
        up = up if target.transform is None else target.transform(up)
        joined[end - up.shape[1] : end, target.start : target.start + target.rows] = up.T
    return Branch(down=np.concatenate([down for _, down, _ in pieces]).T, up=joined)
