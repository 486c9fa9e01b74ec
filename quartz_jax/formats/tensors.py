"""Quantized tensors: packed arrays, and static metadata that stays true when they are split."""

import dataclasses
import math

import jax

from quartz_jax.config import QuartzConfig


class _Stored:
    """What follows from the stored arrays alone, so also under vmap and shard_map."""

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def bits_per_element(self) -> float:
        """Stored bits, scales and padding included, for each logical element."""
        return 8 * self.nbytes / self.size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuartzTensor(_Stored):
    """A tensor in the QuaRTZ format, with the contraction axis moved last in storage.

    Invariants: codes hold whole groups, the last one padded with zeros; `axis` is negative, so
    that it stays true when leading axes come or go; the logical shape follows from the arrays.
    """

    codes: jax.Array  # [..., (k + padding) / 2], uint8: two 4-bit codes a byte, low nibble first
    shifts: jax.Array  # [..., ceil(groups / 2)], uint8: likewise; step - 1 for the integer step
    scale: jax.Array  # [..., 1 or ceil(k / scale_block)], float32
    lo: jax.Array | None = None  # of the scale's shape, float32: only for range="minmax"
    config: QuartzConfig = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(default=-1, metadata={"static": True})  # contraction, negative
    padding: int = dataclasses.field(default=0, metadata={"static": True})  # elements past k

    @property
    def k(self) -> int:
        """Length of the contraction axis."""
        return 2 * self.codes.shape[-1] - self.padding

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, that of the array that was quantized."""
        leading = self.codes.shape[:-1]
        at = len(leading) + 1 + self.axis
        return (*leading[:at], self.k, *leading[at:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class IntTensor(_Stored):
    """A tensor of plain integers with one scale a row; the contraction axis is last."""

    # [..., k], int8, minus 128 if asymmetric; 4 bits: [..., ceil(k / 2)], uint8, packed as codes
    values: jax.Array
    scale: jax.Array  # [..., 1], float32
    lo: jax.Array | None = None  # [..., 1], float32: only for range="minmax"
    bits: int = dataclasses.field(default=8, metadata={"static": True})  # 8 or 4
    padding: int = dataclasses.field(default=0, metadata={"static": True})  # nibbles past k
    # 4 if the values, before any 128 is taken off, are 4-bit codes times powers of two
    value_bits: int = dataclasses.field(default=8, metadata={"static": True})

    @property
    def k(self) -> int:
        """Length of the contraction axis."""
        return self.values.shape[-1] * 8 // self.bits - self.padding

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, that of the array that was quantized."""
        return (*self.values.shape[:-1], self.k)
