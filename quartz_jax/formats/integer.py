"""Plain integers with a scale a row or a block."""

import jax
import jax.numpy as jnp

from quartz_jax.formats.base import (
    NumberFormat,
    Scales,
    absmax,
    check_block,
    check_choice,
    multiplier_and_scale,
)
from quartz_jax.schema import part

_SCALE_BITS = {"float32": 32, "float16": 16}


@part
class Int(NumberFormat):
    """Round to nearest integer, halves to even, under one scale a row or a block.

    absmax: q = clip(round(x / s), -L, L) with L = 2**(width - 1) - 1 and s = max|x| / L.
    minmax: u = clip(round((x - lo) / s), 0, U) with U = 2**width - 1 and s = (max - lo) / U.
    unsigned: the same with lo = 0, for x >= 0 (negative values become 0).
    """

    width: int = 4  # bits of a code, 2 to 8
    block: int | None = None  # elements that share a scale; None for the whole row
    scale: str = "float32"  # its dtype: "float32" or "float16", to which it is rounded first
    range: str = "absmax"  # or "minmax", "unsigned"

    def __post_init__(self):
        check_choice("width", self.width, tuple(range(2, 9)))
        check_block("block", self.block, optional=True)
        check_choice("scale", self.scale, tuple(_SCALE_BITS))
        check_choice("range", self.range, ("absmax", "minmax", "unsigned"))

    def bits(self, k: int) -> float:
        """Stored bits an element; minmax stores an offset beside the scale."""
        stored = _SCALE_BITS[self.scale] * (2 if self.range == "minmax" else 1)
        return self.width + stored / (self.block or k)

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return multiplier, scale and offset of each block."""
        lo = jnp.min(blocks, axis=-1, keepdims=True) if self.range == "minmax" else 0.0
        top = absmax(blocks) if self.range == "absmax" else jnp.max(blocks, -1, keepdims=True)
        multiplier, scale = multiplier_and_scale(top - lo, self._limits[1])
        if self.scale == "float16":
            scale = jnp.minimum(scale, jnp.finfo(jnp.float16).max)
            scale = scale.astype(jnp.float16).astype(jnp.float32)
            multiplier = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
        return multiplier, scale, jnp.broadcast_to(lo, scale.shape)

    def round(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return codes times scale plus offset."""
        multiplier, scale, lo = inner
        return jnp.clip(jnp.round((values - lo) * multiplier), *self._limits) * scale + lo

    @property
    def _limits(self) -> tuple[int, int]:
        if self.range == "absmax":
            top = 2 ** (self.width - 1) - 1
            return -top, top
        return 0, 2**self.width - 1

    def __str__(self):
        words = [f"int{self.width}"] + [f"g{self.block}"] * bool(self.block)
        return " ".join(words + [self.range] * (self.range != "absmax"))
