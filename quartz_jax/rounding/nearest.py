"""Every weight to the nearest value."""

from quartz_jax.formats import Format, Stored
from quartz_jax.rounding.base import Rounding
from quartz_jax.schema import part
from quartz_jax.transforms.base import Layer


@part()
class Nearest(Rounding):
    """Every weight to the nearest value of the format."""

    def store(self, layer: Layer, format: Format) -> Stored:
        """Return the weight, rounded."""
        return format.store(layer.weight)
