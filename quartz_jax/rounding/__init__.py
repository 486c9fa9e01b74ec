"""How weights are rounded to a format, one method a file; see `base`."""

from quartz_jax.rounding.base import Rounding
from quartz_jax.rounding.gptq import Gptq
from quartz_jax.rounding.nearest import Nearest

__all__ = ["Gptq", "Nearest", "Rounding"]
