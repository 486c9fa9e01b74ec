"""Keeping a few channels in 16 bits."""

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from quartz_jax.formats.base import check_block
from quartz_jax.schema import part
from quartz_jax.transforms.base import Layer, Need, TakeOut, Transform

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe


@part("residual")
class ResidualChannels(Transform):
    """The channels of largest magnitude stay 16-bit, so that a row's scale needn't span them.

    LLM.int8() does so with channels above a threshold (arXiv 2208.07339); a fixed count keeps
    shapes known without data.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"absmax"})

    count: int = 16  # channels, all of a layer's if it has fewer

    def __post_init__(self):
        check_block("count", self.count)

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind a `TakeOut`."""
        assert layer.seen.absmax is not None
        count = min(self.count, layer.weight.shape[1])
        index = jax.lax.top_k(layer.seen.absmax, count)[1].astype(jnp.int32)
        taken = layer.weight[:, index].astype(jnp.bfloat16)
        return layer.then(TakeOut(index=index, weight=taken), layer.weight.at[:, index].set(0))
