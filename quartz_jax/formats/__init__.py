"""Number formats: what is stored of a tensor, exactly, and how.

A format is a frozen dataclass that says how scales and codes are found. Calling it gives the
values that a tensor has after it was stored and read back; `store` gives the packed arrays. New
formats subclass `Format`, a file each.
"""

from quartz_jax.formats.base import Format
from quartz_jax.formats.fitted_table import FittedTable
from quartz_jax.formats.floating import MXFP4, NVFP4
from quartz_jax.formats.hif4 import HiF4
from quartz_jax.formats.if4 import IF4
from quartz_jax.formats.integer import Int
from quartz_jax.formats.quartz import Quartz
from quartz_jax.formats.razer import RaZeR
from quartz_jax.formats.sdr import SDR
from quartz_jax.formats.table import Table
from quartz_jax.formats.tensors import BlockRows, Int8Rows, PackedRows, Stored

__all__ = [
    "IF4",
    "MXFP4",
    "NVFP4",
    "SDR",
    "BlockRows",
    "FittedTable",
    "Format",
    "HiF4",
    "Int",
    "Int8Rows",
    "PackedRows",
    "Quartz",
    "RaZeR",
    "Stored",
    "Table",
]
