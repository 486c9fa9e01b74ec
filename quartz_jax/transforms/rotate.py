"""Rotating blocks of channels."""

from typing import TYPE_CHECKING, ClassVar

from pallas_kernels.quantize.channels import rotate
from quartz_jax.schema import part
from quartz_jax.transforms.base import BlockRotation, Layer, Need, Transform

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe


@part("rotate")
class Rotate(Transform):
    """Multiplies blocks of channels by a Hadamard matrix (QuaRot, arXiv 2404.00456).

    The matrix is ConvRot's regular one (arXiv 2512.03673), `pallas_kernels.quantize.channels`. The
    block is the largest power of four that divides k and isn't above `block`; blocks of 16, 64 and
    256 are rotated in the pass that quantizes the input.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    block: int = 256  # at most this many channels

    def __post_init__(self):
        if type(self.block) is not int or self.block < 4:
            raise ValueError(f"block is {self.block!r}; it must be a whole number of at least 4")

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind a `BlockRotation`; raises ValueError if 4 doesn't divide k."""
        k = layer.weight.shape[1]
        powers = [4**i for i in range(1, 8) if 4**i <= self.block and k % 4**i == 0]
        if not powers:
            raise ValueError(f"rotation needs a multiple of 4 channels; the layer has {k}")
        return layer.then(BlockRotation(size=powers[-1]), rotate(layer.weight, powers[-1]))
