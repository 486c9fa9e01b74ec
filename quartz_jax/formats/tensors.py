"""Quantized tensors as they are stored: packed arrays, and static metadata.

What kernels multiply is defined beside them: `Int8Rows` and `PackedRows` of
`pallas_kernels.operands`. Every other format is stored as `BlockRows`.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax

from pallas_kernels.operands import Int8Rows, PackedRows, Rows, rows_dataclass

if TYPE_CHECKING:
    from quartz_jax.formats.base import Format

__all__ = ["BlockRows", "Int8Rows", "PackedRows", "Stored"]


@rows_dataclass
class BlockRows(Rows):
    """Rows in any format: codes, and what the format keeps of the scales of blocks and rows."""

    # [..., ceil(k padded / 2)], uint8: two 4-bit codes a byte, low nibble first; or 8-bit codes
    codes: jax.Array
    scales: dict[str, jax.Array]  # [..., blocks], or [..., 1] where whole rows share it
    format: "Format" = dataclasses.field(metadata={"static": True})
    padding: int = dataclasses.field(default=0, metadata={"static": True})  # codes past k

    @property
    def k(self) -> int:
        """Length of the contraction axis."""
        return self.codes.shape[-1] * 8 // self.format.code_bits - self.padding

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, that of the array that was quantized."""
        return (*self.codes.shape[:-1], self.k)


Stored = Int8Rows | PackedRows | BlockRows
