"""Number formats to compare with, simulated exactly: floats in, the stored values back as floats.

A format is a frozen dataclass that says how scales and codes are found; calling it gives the
values that a tensor has after it was stored and read back. New formats subclass `NumberFormat`.
"""

from quartz_jax.formats.base import NumberFormat
from quartz_jax.formats.floating import MXFP4, NVFP4
from quartz_jax.formats.integer import Int
from quartz_jax.formats.leading_zero import SDR, Quartz

__all__ = ["MXFP4", "NVFP4", "SDR", "Int", "NumberFormat", "Quartz"]
