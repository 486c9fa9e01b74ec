"""The linears of a model: where they are, and what they are in it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

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
class Mixture:
    """Layers that one attention joins: what it makes of values, head by head, others read.

    A module states them as `mixtures`, of paths in itself, as `models.attention.Mixture` has them.
    """

    values: tuple[tuple[str, int], ...]  # layers, and the first of their rows that is a value
    rows: int  # of values in each
    outputs: tuple[str, ...]  # layers whose input begins with the mixtures
    columns: int  # of mixtures there
    head_dim: int  # channels of a head, which divide both

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all of them in the model."""
        return (*(path for path, _ in self.values), *self.outputs)


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
    mixture: Mixture | None = None  # whose mixtures its input begins with


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
    mixtures = _mixtures(model)
    return [
        Site(
            path=path,
            kind="linear",
            n=getattr(module, "out_features", 0),
            k=getattr(module, "in_features", 0),
            block=block_of(path),
            role=role or ("embed" if stated else "linear"),
            obstacle=_obstacle(path, module),
            mixture=mixtures.get(path),
        )
        for path, module, role in found
    ]


def linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    """Yield path and module of each linear of a model; of one that stands twice, its first path."""
    for path, module in _named(model):
        if isinstance(module, nnx.Linear):
            yield path, module


def _mixtures(model: nnx.Module) -> dict[str, Mixture]:
    """Return mixtures by the paths of the layers that read them.

    Raises:
      ValueError: one is of layers or channels that aren't there, or that another has, too.
    """
    names = {id(module): path for path, module in linears(model)}
    found: dict[str, Mixture] = {}
    values: set[str] = set()
    for path, module in _named(model):
        for stated in getattr(module, "mixtures", ()):
            mixture = _in_model(stated, path, module, names)
            sources = {name for name, _ in mixture.values}
            if twice := sources & values or set(mixture.outputs) & found.keys():
                raise ValueError(f"mixtures of {path} have {sorted(twice)[0]}, as others do")
            values |= sources
            found |= dict.fromkeys(mixture.outputs, mixture)
    return found


def _in_model(stated: Any, path: str, module: nnx.Module, names: dict[int, str]) -> Mixture:
    """Return a module's mixture with paths in the model."""

    def of_model(name: str, first: int, size: int, axis: int) -> str:
        linear: Any = module
        for step in name.split("."):
            linear = linear[int(step)] if step.isdigit() else getattr(linear, step, None)
        where = f"mixtures of {path or 'the model'}: {name!r}"
        if id(linear) not in names:
            raise ValueError(f"{where} is no linear of it")
        there = (linear.out_features, linear.in_features)[axis]
        if first + size > there or size % stated.head_dim:
            raise ValueError(
                f"{where} has {there} channels, which {size} from {first} on, in heads of "
                f"{stated.head_dim}, don't fit"
            )
        return names[id(linear)]

    values = tuple((of_model(v, first, stated.rows, 0), first) for v, first in stated.values)
    return Mixture(
        values=values,
        rows=stated.rows,
        outputs=tuple(of_model(name, 0, stated.columns, 1) for name in stated.outputs),
        columns=stated.columns,
        head_dim=stated.head_dim,
    )


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
