"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685) for FLUX transformers.

An adapter adds `scale * alpha / rank * up(down(x))` to linears. It stays a 16-bit side branch, so
the linear itself may be quantized. Namings, as diffusers' `loaders/lora_conversion_utils.py` reads
them: diffusers' and PEFT's (`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`), kohya's
(`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`) and Black Forest Labs' module names
behind a prefix (`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`).
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from models.checkpoint_io import CheckpointError
from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.flux.params import diffusers_rules
from models.linear import EPSILON, Part, modulate

_LISTED = 20  # problems that an error names; of an adapter for another model every key is one
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_PARTS = {
    _DOWN: r"(?:lora_A|lora_down|lora\.down)(?:\.default)?\.weight",
    _UP: r"(?:lora_B|lora_up|lora\.up)(?:\.default)?\.weight",
    _ALPHA: "alpha",
}
_TEXT_ENCODERS = ("lora_te", "text_encoder")
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers stores PEFT's config, as JSON


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
    """A linear, quantized or not, with a low-rank branch beside it; called like `Linear`."""

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
        modulation: tuple[jax.Array, jax.Array] | None = None,  # shift and scale, [b, 1, k]
        activation: str | None = None,  # "gelu": its tanh form
        gate: jax.Array | None = None,  # [b, 1, n]
        residual: jax.Array | None = None,  # [..., n]
    ) -> jax.Array:
        """Return residual + gate * activation(base(x') + x' down up), x' the modulated x."""
        y = self.base(x, modulation=modulation)
        y = y + (self._narrow(x, modulation) @ self.up).astype(y.dtype)
        if activation == "gelu":
            y = nnx.gelu(y, approximate=True)
        y = y if gate is None else gate * y
        return y if residual is None else residual + y

    def _narrow(
        self,
        x: jax.Array | tuple[Part, ...],
        modulation: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        """Return x' down, [..., rank]; of parts the sum of theirs, so that nothing is joined."""
        if modulation is not None or not isinstance(x, tuple):
            whole = x
            if isinstance(x, tuple):
                whole = jnp.concatenate([part.value() for part in x], axis=-1)
            if modulation is not None:
                epsilon = getattr(self.base, "norm_epsilon", EPSILON)
                whole = modulate(whole, *modulation, epsilon)
            x = (Part(array=whole, size=whole.shape[-1]),)
        ends = np.cumsum([part.size for part in x])[:-1]
        pieces = zip(x, jnp.split(self.down.get_value(), ends), strict=True)
        return sum(part.value().astype(down.dtype) @ down for part, down in pieces)


def add_lora(
    transformer: FluxTransformer,
    adapters: Sequence[Adapter],
    scales: Sequence[float] | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
) -> FluxTransformer:
    """Return a copy of a transformer with adapters as side branches; it shares the weights.

    Args:
      transformer: with linears of any kind, quantized or not.
      adapters: from `read_lora`, with the transformer's config.
      scales: one for each adapter; 1 if None.
      dtype: of the branches.
    """
    scales = [1.0] * len(adapters) if scales is None else scales
    found: dict[str, list[Branch]] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for path, branch in adapter.branches.items():
            scaled = Branch(down=branch.down, up=np.float32(scale) * branch.up)
            found.setdefault(path, []).append(scaled)
    transformer = nnx.clone(transformer)
    for path, branches in found.items():
        down = np.concatenate([branch.down for branch in branches], axis=1)
        up = np.concatenate([branch.up for branch in branches])
        *parents, name = path.split(".")
        parent = transformer
        for step in parents:
            parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
        base = getattr(parent, name)
        setattr(parent, name, LoRALinear(base, jnp.asarray(down, dtype), jnp.asarray(up, dtype)))
    return transformer


def read_lora(path: Path | str, config: FluxConfig) -> Adapter:
    """Read and check an adapter.

    Args:
      path: a safetensors file in one of the namings above.
      config: of the transformer that it is for.

    Raises:
      CheckpointError: the file can't be read; or it lists what is wrong: unknown keys, keys of the
        text encoders, which aren't supported, and factors that are missing, misshapen or infinite.
    """
    path = Path(path)
    tensors, metadata = _read_file(path)
    targets = dict(_targets(config))
    modules, problems, of_text = {}, [], []
    for key, value in tensors.items():
        module, part = _parse(key)
        if key.startswith(_TEXT_ENCODERS):
            of_text.append(key)
        elif module not in targets:
            problems.append(f"unknown key {key}")
        else:
            modules.setdefault(module, {})[part] = value
    for module, parts in modules.items():
        problems += _check(module, parts, targets[module])
    if of_text:
        problems.append(
            f"{len(of_text)} keys such as {of_text[0]} are for text encoders, which take no "
            "adapter here; leave them out of the file"
        )
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        rest = len(problems) - _LISTED
        listed = "; ".join(problems[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
        raise CheckpointError(f"LoRA {path} doesn't fit this transformer: {listed}")
    pieces: dict[str, list[tuple[_Target, np.ndarray, np.ndarray]]] = {}
    for module, parts in modules.items():
        up = parts[_UP] * np.float32(_factor(module, parts, metadata))
        pieces.setdefault(targets[module].path, []).append((targets[module], parts[_DOWN], up))
    branches = {path: _join(several) for path, several in pieces.items()}
    return Adapter(path=path, branches=branches)


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors as float32, and PEFT's config if the file holds one."""
    if path.is_dir():
        raise CheckpointError(f"LoRA {path} is a folder; give the safetensors file in it")
    try:
        with safe_open(path, "np") as file:
            names = file.keys()
            tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
            config = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"LoRA {path} can't be read as safetensors: {error}") from None
    prefix = "transformer."
    kept = {key[len(prefix) :]: x for key, x in config.items() if key.startswith(prefix)}
    return tensors, kept


def _parse(key: str) -> tuple[str, str]:
    """Return the module of a key and what it holds; two empty texts if it is no adapter's key."""
    for part, pattern in _PARTS.items():
        if match := re.fullmatch(rf"(.+)\.{pattern}", key):
            return match[1], part
    return "", ""


def _targets(config: FluxConfig) -> Iterator[tuple[str, _Target]]:
    """Yield every name that an adapter may give a module, and what that is here."""
    rules = diffusers_rules(config)
    for path, shape in _linears(config):
        rule, match = next((x, m) for x in rules if (m := re.fullmatch(x.pattern, path)))
        sources = (rule.sources,) if isinstance(rule.sources, str) else rule.sources
        start = 0
        for source, rows in zip(sources, rule.rows or shape[:1], strict=True):
            name = match.expand(source)
            part = {"path": path, "shape": shape, "transform": rule.transform}
            target = _Target(**part, start=start, rows=rows)
            start += rows
            for prefix in ("", "transformer.", "base_model.model."):
                yield prefix + name, target
            yield "lora_transformer_" + name.replace(".", "_"), target
        name, target = _bfl_name(path), _Target(path=path, shape=shape, start=0, rows=shape[0])
        for prefix in ("", "diffusion_model.", "base_model.model."):
            yield prefix + name, target
        yield "lora_unet_" + name.replace(".", "_"), target


def _linears(config: FluxConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield dotted path and (n, k) of every linear."""
    blocks = {"double_blocks": config.num_layers, "single_blocks": config.num_single_layers}
    one = dataclasses.replace(config, num_layers=1, num_single_layers=1)  # all blocks are alike
    model = nnx.eval_shape(lambda: FluxTransformer(one, rngs=nnx.Rngs(0)))
    for path, linear in nnx.iter_modules(model):
        if not isinstance(linear, nnx.Linear):
            continue
        block = path[0] in blocks
        for i in range(blocks[path[0]] if block else 1):
            where = (path[0], i, *path[2:]) if block else path
            yield ".".join(map(str, where)), (linear.out_features, linear.in_features)


def _bfl_name(path: str) -> str:
    """Return the name of one of our linears in Black Forest Labs' code."""
    path = re.sub(r"(_mlp)\.up$", r"\1.0", path)
    path = re.sub(r"(_mlp)\.down$", r"\1.2", path)
    return re.sub(r"^final_layer\.modulation$", "final_layer.adaLN_modulation.1", path)


def _check(module: str, parts: dict[str, np.ndarray], target: _Target) -> Iterator[str]:
    """Yield what is wrong with the factors of one module."""
    if missing := [name for name in (_DOWN, _UP) if name not in parts]:
        yield f"{module} lacks lora_{missing[0]}"
        return
    down, up, inputs = parts[_DOWN].shape, parts[_UP].shape, target.shape[1]
    if len(down) != 2 or down[1] != inputs:
        yield f"{module}: lora_down is {list(down)}, expected [rank, {inputs}]"
    elif up != (target.rows, down[0]):
        yield (
            f"{module}: lora_up is {list(up)}, expected {[target.rows, down[0]]} (rank {down[0]} "
            "as in lora_down)"
        )
    if _ALPHA in parts and parts[_ALPHA].size != 1:
        yield f"{module}: alpha is {list(parts[_ALPHA].shape)}, expected one number"
    if not all(np.isfinite(part).all() for part in parts.values()):
        yield f"{module} holds NaN or infinity"


def _factor(module: str, parts: dict[str, np.ndarray], config: dict[str, Any]) -> float:
    """Return alpha / rank; without an alpha it is 1.

    The alpha is a tensor, or in PEFT's config, which may ask for alpha / sqrt(rank) (rsLoRA:
    Kalajdzievski 2023, arXiv 2312.03732).
    """
    rank = parts[_DOWN].shape[0]
    if _ALPHA in parts:
        return float(parts[_ALPHA].reshape(())) / rank
    alpha = config.get("lora_alpha", rank)
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module.removeprefix("transformer.")):
            alpha = other
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _join(pieces: list[tuple[_Target, np.ndarray, np.ndarray]]) -> Branch:
    """Put the factors of a fused linear's parts side by side; `up` gets a block for each."""
    ranks = [down.shape[0] for _, down, _ in pieces]
    joined = np.zeros((sum(ranks), pieces[0][0].shape[0]), np.float32)
    for (target, _, up), end in zip(pieces, np.cumsum(ranks), strict=True):
        up = up if target.transform is None else target.transform(up)
        joined[end - up.shape[1] : end, target.start : target.start + target.rows] = up.T
    return Branch(down=np.concatenate([down for _, down, _ in pieces]).T, up=joined)
