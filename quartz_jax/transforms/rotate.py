"""Rotating blocks of channels."""

import dataclasses
from typing import TYPE_CHECKING

from quartz_jax.schema import part
from quartz_jax.transforms.base import BlockRotation, Layer, Transform, TurnedRows

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe


@part("rotate")
class Rotate(Transform):
    """Multiplies blocks of channels by a Hadamard matrix (QuaRot, arXiv 2404.00456).

    The matrix is ConvRot's regular one (arXiv 2512.03673), `pallas_kernels.quantize.channels`. The
    block is the largest power of four that divides k and isn't above `block`; blocks of 16, 64 and
    256 are rotated in the pass that quantizes the input.

    What attention made of values can be rotated for nothing, inside its heads: by the rows of the
    layer that makes the values, offline. With `fold` it is, where the transform is a layer's first;
    which layers these are the model says, and `recipes.fold` which of them can't.
    """

    block: int = 256  # at most this many channels
    fold: int = 0  # the same inside heads of attention, of what is folded; 0 folds nothing

    def __post_init__(self):
        for name, least in (("block", 4), ("fold", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least or 0 < value < 4:
                also = " (or 0)" if name == "fold" else ""
                raise ValueError(
                    f"{name} is {value!r}; it must be a whole number of at least 4{also}"
                )

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind a `BlockRotation`; raises ValueError if 4 doesn't divide k."""
        size = block_size(self.block, layer.weight.shape[1])
        return _behind(layer, BlockRotation(size=size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded(Transform):
    """What `Rotate` becomes where the channels before `first` are rotated in the layers before.

    No part of recipes: `recipes.fold` puts it there.
    """

    size: int  # channels of a block from `first` on, which are rotated online
    first: int
    folded: int  # channels of a block before `first`

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind a `BlockRotation`; raises ValueError if it isn't the first op."""
        if any(not isinstance(op, TurnedRows) for op in layer.ops):
            raise ValueError("a folded rotation must be the first transform of a layer")
        op = BlockRotation(size=self.size, first=self.first, folded=self.folded)
        return _behind(layer, op)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turned(Transform):
    """The other side of `Folded`, in the layer that makes the values; no part of recipes either."""

    size: int  # channels of a block
    first: int  # row
    rows: int

    @property
    def op(self) -> TurnedRows:
        """What it leaves behind."""
        return TurnedRows(size=self.size, first=self.first, rows=self.rows)

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer with those rows, and their biases, rotated."""
        layer = layer.then(self.op, self.op.turned(layer.weight.T).T)
        bias = layer.bias
        return layer if bias is None else dataclasses.replace(layer, bias=self.op.turned(bias))


def block_size(most: int, *multiples: int) -> int:
    """Return the largest power of four up to `most` that divides all.

    Raises:
      ValueError: 4 is larger, or doesn't.
    """
    powers = [4**i for i in range(1, 8) if 4**i <= most and not any(m % 4**i for m in multiples)]
    if not powers:
        raise ValueError(f"rotation needs a multiple of 4 channels; the layer has {multiples[0]}")
    return powers[-1]


def _behind(layer: Layer, op: BlockRotation) -> Layer:
    return layer.then(op, op.back(layer.weight))
