"""QRazor's format: the significant bits of a wide integer, group by group."""

import jax
import jax.numpy as jnp
from jax import lax

from quartz_jax.formats.base import (
    Format,
    Kept,
    Scales,
    absmax,
    check_block,
    check_choice,
    multiplier_and_scale,
)
from quartz_jax.schema import part

_KEPT_BITS = 3  # of a magnitude


@part()
class SDR(Format):
    """QRazor's significant data razoring (arXiv 2501.13331, rule of the code of 2025-06-24).

    Absolute maximum to integers of `base` bits a row; with M the largest magnitude of a group,
    step = 2**max(bit_length(M) - 3, 0) and mantissa = round(|q| / step), halves to even. A
    mantissa of 8 stays 8 if q is negative (two's complement has -8) and becomes 7 otherwise.
    """

    base: int = 8  # bits of the integer: 8 for weights, 16 for activations
    block: int = 16  # elements that share a step, the paper's group

    def __post_init__(self):
        check_choice("base", self.base, (8, 16))
        check_block("block", self.block)

    def bits(self, k: int) -> float:
        """Four, a flag of 3 bits (4 for a 16-bit base) a group, and a float32 scale a row."""
        return 4 + (3 if self.base == 8 else 4) / self.block + 32 / k

    def outer(self, rows: jax.Array) -> Scales:
        """Return multiplier and scale of the integers."""
        return multiplier_and_scale(absmax(rows), self._limit)

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the shift of each group, int32."""
        peak = absmax(self._integers(blocks, outer))
        return jnp.maximum(32 - _KEPT_BITS - lax.clz(peak), 0)

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return signed mantissas, int32."""
        q = self._integers(values, outer)
        mantissa = jnp.round(jnp.abs(q) / (1 << inner).astype(jnp.float32))
        mantissa = jnp.minimum(mantissa, jnp.where(q < 0, 8, 7)).astype(jnp.int32)
        return jnp.sign(q) * mantissa

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return shifts, and scales of rows."""
        return {"shifts": inner.astype(jnp.uint8), "row_scale": outer[1]}

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return mantissas times step and scale."""
        return (codes << kept["shifts"].astype(jnp.int32)) * kept["row_scale"]

    def exact_8(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array] | None:
        """Return mantissas times step, -128 to 112, and the row's scale: of an 8-bit base."""
        if self.base != 8:
            return None
        return (codes << kept["shifts"].astype(jnp.int32)).astype(jnp.int8), kept["row_scale"]

    def exact_16(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return mantissas times step, three significant bits, and the row's scale."""
        wide = codes << kept["shifts"].astype(jnp.int32)
        return wide.astype(jnp.bfloat16), kept["row_scale"]

    @property
    def nibbles(self) -> tuple[str, ...]:
        """Flags are stored in four bits, of which a base of 8 bits needs three."""
        return ("shifts",)

    @property
    def _limit(self) -> int:
        return 2 ** (self.base - 1) - 1

    def _integers(self, values: jax.Array, outer: Scales) -> jax.Array:
        q = jnp.clip(jnp.round(values * outer[0]), -self._limit, self._limit)
        return q.astype(jnp.int32)

    def __str__(self):
        return f"sdr{self.base} g{self.block}"
