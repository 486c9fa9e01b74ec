"""Formats that quantize to a wide integer first and then drop low bits group by group.

Both keep four bits from the leading one of the largest magnitude in a group; they differ in the
width of the integer and in how the rest is rounded.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codec
from quartz_jax.formats.base import (
    NumberFormat,
    Scales,
    absmax,
    check_block,
    check_choice,
    multiplier_and_scale,
)
from quartz_jax.schema import part

_KEPT = 3  # magnitude bits of a symmetric code


@part
class Quartz(NumberFormat):
    """QuaRTZ (arXiv 2509.26436) as `pallas_kernels.codec` defines it, for any group size."""

    group_size: int = 16  # elements that share a shift
    rounding: str = "nearest"  # or "truncate"
    range: str = "absmax"  # or "minmax", for one-sided data
    step: str = "power"  # or "integer"
    search: bool = False  # choose an integer step by least squared error, for weights
    scale_block: int | None = None  # elements that share the 8-bit scale; None for the row

    def __post_init__(self):
        check_block("group_size", self.group_size)
        check_choice("rounding", self.rounding, ("nearest", "truncate"))
        check_choice("range", self.range, ("absmax", "minmax"))
        check_choice("step", self.step, ("power", "integer"))
        if self.step == "integer" and (self.range, self.rounding) != ("absmax", "nearest"):
            raise ValueError("step is 'integer'; it needs range='absmax' and rounding='nearest'")
        if self.search and self.step != "integer":
            raise ValueError("search is True; it needs step='integer'")
        if self.scale_block is not None and self.scale_block % self.group_size:
            raise ValueError(
                f"scale_block is {self.scale_block}; it must be a multiple of "
                f"group_size={self.group_size}"
            )

    @property
    def block(self) -> int:
        """Elements that share a shift."""
        return self.group_size

    def bits(self, k: int) -> float:
        """Four, four for a group's shift, and a float32 scale (minmax: and offset) a row."""
        row = 64 if self.range == "minmax" else 32
        return 4 + 4 / self.group_size + row / (self.scale_block or k)

    def outer(self, rows: jax.Array) -> Scales:
        """Return multiplier, scale and offset of the 8-bit stage."""
        if self.range == "absmax":
            multiplier, scale = multiplier_and_scale(absmax(rows), 127)
            return multiplier, scale, jnp.zeros_like(scale)
        lo = jnp.min(rows, axis=-1, keepdims=True)
        multiplier, scale = multiplier_and_scale(jnp.max(rows, axis=-1, keepdims=True) - lo, 255)
        return multiplier, scale, lo

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the step of each group, int32."""
        magnitude = jnp.abs(self.integers(blocks, outer))
        peak = jnp.max(magnitude, axis=-1, keepdims=True)
        if self.search:
            return codec.search_step(magnitude)
        if self.step == "integer":
            return jnp.clip((2 * peak + 7) // 15, 1, codec.MAX_STEP)
        return 1 << shift_of(peak, _KEPT + (self.range == "minmax"))

    def round(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return codes times the group's step and the row's scale, plus the offset."""
        _, scale, lo = outer
        return self.decoded(values, outer, inner).astype(jnp.float32) * scale + lo

    def integers(self, values: jax.Array, outer: Scales) -> jax.Array:
        """Return the 8-bit stage's integers, int32."""
        multiplier, _, lo = outer
        limits = (-127, 127) if self.range == "absmax" else (0, 255)
        return jnp.clip(jnp.round((values - lo) * multiplier), *limits).astype(jnp.int32)

    def decoded(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return codes times the group's step, int32."""
        q = self.integers(values, outer)
        magnitude = jnp.abs(q)
        doubled = 2 * magnitude + (inner if self.rounding == "nearest" else 0)
        top = codec.NIBBLE_MAX if self.range == "absmax" else codec.UNSIGNED_NIBBLE_MAX
        step = jnp.broadcast_to(inner, magnitude.shape)
        return jnp.sign(q) * jnp.minimum(lax.div(doubled, 2 * step), top) * step

    def __str__(self):
        words = ["quartz", f"g{self.group_size}"]
        words += ["truncate"] * (self.rounding == "truncate")
        words += ["integer"] * (self.step == "integer") + ["search"] * self.search
        words += [f"block{self.scale_block}"] * bool(self.scale_block)
        return " ".join(words + ["minmax"] * (self.range == "minmax"))


@part
class SDR(NumberFormat):
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
        """Return the step of each group, int32."""
        return 1 << shift_of(absmax(self._integers(blocks, outer)), _KEPT)

    def round(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return mantissas times step and scale."""
        q = self._integers(values, outer)
        mantissa = jnp.round(jnp.abs(q) / inner.astype(jnp.float32))
        mantissa = jnp.minimum(mantissa, jnp.where(q < 0, 8, 7))
        return jnp.sign(q) * mantissa * inner * outer[1]

    @property
    def _limit(self) -> int:
        return 2 ** (self.base - 1) - 1

    def _integers(self, values: jax.Array, outer: Scales) -> jax.Array:
        q = jnp.clip(jnp.round(values * outer[0]), -self._limit, self._limit)
        return q.astype(jnp.int32)

    def __str__(self):
        return f"sdr{self.base} g{self.block}"


def shift_of(peak: jax.Array, kept: int) -> jax.Array:  # int32, at least 0
    """Return how many low bits a group drops to keep `kept` bits of its largest magnitude."""
    return jnp.maximum(32 - kept - lax.clz(peak), 0)
