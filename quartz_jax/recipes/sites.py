"""The linears of a model: where they are, and what they are in it."""

import dataclasses
from collections.abc import Iterator

from flax import nnx

# What a layer is in its model; models say so themselves. "linear" are those of models that don't.
ROLES = {
    "embed": "brings inputs to the model's width",
    "modulation": "shifts, scales and gates from a condition: one row an image",
    "attention_in": "queries, keys and values",
    "attention_out": "behind attention",
    "mlp_in": "first of an MLP",
    "mlp_out": "last of an MLP, behind its activation",
    "mixed_in": "attention_in and mlp_in in one",
    "mixed_out": "attention_out and mlp_out in one",
    "outlier_out": "last of an MLP whose inputs are known to overflow 16-bit floats",
    "head": "to the model's outputs",
    "linear": "any of a model that states no roles",
}
# Layers of flax that hold matmuls of another form than nnx.Linear.
_OTHERS = (nnx.LinearGeneral, nnx.Einsum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A layer that can be quantized, or that a recipe might mean."""

    path: str  # in the model, such as "double_blocks.0.img_attn.qkv"
    kind: str  # "linear"
    n: int  # outputs
    k: int  # inputs
    block: int | None  # of the list that it lies in; None outside of lists
    role: str  # one of `ROLES`
    obstacle: str | None = None  # why it can't be quantized


def sites(model: nnx.Module) -> list[Site]:
    """Return the linears of a model in the order in which it holds them.

    A model that states the role of none is taken to have plain linears; of one that does, those
    without a role are left alone, as "embed".
    """
    found = [
        (path, module, getattr(module, "role", None))
        for path, module in _named(model)
        if isinstance(module, (nnx.Linear, *_OTHERS))
    ]
    stated = any(role is not None for _, _, role in found)
    return [
        Site(
            path=path,
            kind="linear",
            n=getattr(module, "out_features", 0),
            k=getattr(module, "in_features", 0),
            block=block_of(path),
            role=role or ("embed" if stated else "linear"),
            obstacle=_obstacle(path, module),
        )
        for path, module, role in found
    ]


def linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    """Yield path and module of each linear of a model; of one that stands twice, its first path."""
    for path, module in _named(model):
        if isinstance(module, nnx.Linear):
            yield path, module


def _named(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for path, module in nnx.iter_modules(model):
        yield ".".join(map(str, path)), module


def _obstacle(path: str, module: nnx.Module) -> str | None:
    """Say why quantization would break a layer, or return None."""
    name = type(module).__name__
    if not isinstance(module, nnx.Linear):
        return f"it is an nnx.{name}, and only nnx.Linear can be quantized"
    # A subclass computes something more, which would be lost, unless it says it doesn't.
    if type(module) is not nnx.Linear and not getattr(module, "quantizable", False):
        return f"it is a {name}, and what that adds to nnx.Linear would be lost"
    if not path:
        return "it is the model itself; put it into a module"
    if len(module.kernel.shape) != 2:
        return (
            f"its kernel has shape {list(module.kernel.shape)}: scanned stacks can't be quantized"
        )
    return None


def block_of(path: str) -> int | None:
    """Return which block of its list a layer lies in, or None outside of lists."""
    return next((int(name) for name in path.split(".") if name.isdigit()), None)
