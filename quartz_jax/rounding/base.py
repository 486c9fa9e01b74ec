"""How the weight of a layer becomes a stored tensor."""

import abc
from typing import ClassVar

from quartz_jax.formats import Format, Stored
from quartz_jax.transforms.base import Layer, Need


class Rounding(abc.ABC):
    """A way to round weights: a frozen dataclass, `schema.part`."""

    needs: ClassVar[frozenset[Need]] = frozenset()  # the statistics that `store` reads

    @abc.abstractmethod
    def store(self, layer: Layer, format: Format) -> Stored:
        """Return the layer's weight [n, k] in a format; traceable."""
