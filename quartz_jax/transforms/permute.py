"""Putting channels of like size side by side."""

from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp

from quartz_jax.schema import part
from quartz_jax.transforms.base import Layer, Need, Permute, Transform

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe


@part("sort")
class Sort(Transform):
    """Sorts channels by the largest magnitude of their inputs, largest first (as ARCQuant does).

    Groups then hold channels of like size (arXiv 2601.07475, its reordering).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"absmax"})

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind a `Permute`."""
        assert layer.seen.absmax is not None
        order = jnp.argsort(-layer.seen.absmax).astype(jnp.int32)
        return layer.then(Permute(index=order), layer.weight[:, order])
