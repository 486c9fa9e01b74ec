"""The linears and convolutions of a model: where they are, and what they are in it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from flax import nnx

from pallas_kernels.windows import Window

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
    "projection": "into and out of the transformer blocks between convolutions",
    "conv": "of a residual block",
    "shortcut": "beside the convolutions of a residual block, where their widths differ",
    "resample": "halves an image's sides, or follows their doubling",
    "linear": "any of a model that states no roles",
}
# Layers of flax that hold matmuls of another form than nnx.Linear.
_OTHERS = (nnx.LinearGeneral, nnx.Einsum)
_LAYERS = (nnx.Linear, nnx.Conv)


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
    kind: str  # "linear" or "conv"
    n: int  # outputs
    k: int  # inputs: of a convolution, pixels of a window times channels
    block: int | None  # of the list that it lies in; None outside of lists
    role: str  # one of `ROLES`
    obstacle: str | None = None  # why it can't be quantized
    mixture: Mixture | None = None  # whose mixtures its input begins with


def sites(model: nnx.Module) -> list[Site]:
    """Return the linears and convolutions of a model in the order in which it holds them.

    A model that states the role of none is taken to have plain linears; of one that does, those
    without a role are left alone, as "embed". So are convolutions without one in any model.
    """
    found = [
        (path, module, getattr(module, "role", None))
        for path, module in _named(model)
        if isinstance(module, (*_LAYERS, *_OTHERS))
    ]
    stated = any(role is not None for _, _, role in found)
    mixtures = _mixtures(model)
    return [
        _site(
            path,
            module,
            role or ("embed" if stated or is_conv(module) else "linear"),
            mixtures.get(path),
        )
        for path, module, role in found
    ]


def _site(path: str, module: Any, role: str, mixture: Mixture | None) -> Site:
    n, k = (0, 0) if isinstance(module, _OTHERS) else sizes(module)
    kind = "conv" if is_conv(module) else "linear"
    return Site(
        path=path,
        kind=kind,
        n=n,
        k=k,
        block=block_of(path),
        role=role,
        obstacle=_obstacle(path, module),
        mixture=mixture,
    )


def layers(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear | nnx.Conv]]:
    """Yield path and module of each linear and convolution; of one that stands twice, once."""
    for path, module in _named(model):
        if isinstance(module, _LAYERS):
            yield path, module


def _mixtures(model: nnx.Module) -> dict[str, Mixture]:
    """Return mixtures by the paths of the layers that read them.

    Raises:
      ValueError: one is of layers or channels that aren't there, or that another has, too.
    """
    names = {id(module): path for path, module in layers(model) if not is_conv(module)}
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


def is_conv(module: nnx.Module) -> TypeGuard[nnx.Conv]:
    """Whether a layer is a convolution."""
    return isinstance(module, nnx.Conv)


def sizes(layer: Any) -> tuple[int, int]:
    """Return n and k of a linear or convolution, whose weight is [n, k]."""
    taps = math.prod(layer.kernel_size) if is_conv(layer) else 1
    return layer.out_features, taps * layer.in_features


def weight_rows(kernel: Any) -> Any:
    """Return a kernel [k, n], or a convolution's [rows, columns, channels, n], as [n, k]."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def window_of(conv: nnx.Conv) -> Window:
    """Return what a convolution sees at once.

    Raises:
      ValueError: it is none that `Window` describes; why is said.
    """
    size = tuple(conv.kernel_size)
    if len(size) != 2:
        raise ValueError(f"it is a convolution over {len(size)} axes, and not over two")
    dilated = {*_both(conv.input_dilation), *_both(conv.kernel_dilation)} != {1}
    if conv.feature_group_count != 1 or dilated or conv.mask is not None:
        raise ValueError("it is a convolution of groups, or a dilated or masked one")
    strides, padding = _both(conv.strides), conv.padding
    if padding == "VALID":
        return Window(size, strides)
    if padding == "SAME" and strides == (1, 1):
        down, across = (((side - 1) // 2, side // 2) for side in size)
        return Window(size, strides, (down, across))
    if isinstance(padding, str):
        raise ValueError(f"it pads {padding!r} with strides of {strides}, not by numbers of pixels")
    down, across = map(_both, _both(padding))
    return Window(size, strides, (down, across))


def _both(value: Any) -> tuple[Any, Any]:
    """Return what is given for two axes, or once for both, as flax reads it; 1 for nothing."""
    if value is None or isinstance(value, int):
        return (1, 1) if value is None else (value, value)
    given = tuple(value)
    return given if len(given) == 2 else given * 2


def _named(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for path, module in nnx.iter_modules(model):
        yield ".".join(map(str, path)), module


def _obstacle(path: str, module: nnx.Module) -> str | None:
    """Say why quantization would break a layer, or return None."""
    name = type(module).__name__
    if not isinstance(module, _LAYERS):
        return f"it is an nnx.{name}, and only nnx.Linear and nnx.Conv can be quantized"
    # A subclass computes something more, which would be lost, unless it says it doesn't.
    if type(module) not in _LAYERS and not getattr(module, "quantizable", False):
        plain = "nnx.Conv" if is_conv(module) else "nnx.Linear"
        return f"it is a {name}, and what that adds to {plain} would be lost"
    if not path:
        return "it is the model itself; put it into a module"
    if isinstance(module, nnx.Conv):
        try:
            window_of(module)
        except ValueError as error:
            return str(error)
        return None
    if len(module.kernel.shape) != 2:
        return (
            f"its kernel has shape {list(module.kernel.shape)}: scanned stacks can't be quantized"
        )
    return None


def block_of(path: str) -> int | None:
    """Return which block of its list a layer lies in, or None outside of lists."""
    return next((int(name) for name in path.split(".") if name.isdigit()), None)
