"""Making inputs non-negative."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from quartz_jax.schema import part
from quartz_jax.transforms.base import Layer, Offset, Transform

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe


@part("shift")
class Shift(Transform):
    """Adds a constant to the input and takes it back from the output.

    Behind GELU, whose least value is above -0.171875, it makes inputs non-negative, so that
    unsigned codes fit them (SVDQuant, arXiv 2411.05007, and its released code).
    """

    amount: float = 0.171875

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind an `Offset`."""
        amount = jnp.float32(self.amount)
        bias = -amount * layer.weight.sum(axis=1)
        return layer.then(Offset(amount=amount, bias=bias), layer.weight)
