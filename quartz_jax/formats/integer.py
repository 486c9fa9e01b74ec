"""Plain integers with a scale a row or a block."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from pallas_kernels.operands import Int8Rows
from quartz_jax.formats.base import (
    Format,
    Kept,
    Scales,
    absmax,
    check_block,
    check_choice,
    join,
    multiplier_and_scale,
)
from quartz_jax.formats.tensors import Stored
from quartz_jax.schema import part

_SCALE_BITS = {"float32": 32, "float16": 16}


@part()
class Int(Format):
    """Round to nearest integer, halves to even, under one scale a row or a block.

    absmax: q = clip(round(x / s), -L, L) with L = 2**(width - 1) - 1 and s = max|x| / L.
    minmax: u = clip(round((x - lo) / s), 0, U) with U = 2**width - 1 and s = (max - lo) / U.
    unsigned: the same with lo = 0, for x >= 0 (negative values become 0).
    Eight bits of a whole row are stage 1 of QuaRTZ, bit for bit.
    """

    width: int = 4  # bits of a code, 2 to 8
    block: int | None = None  # elements that share a scale; None for the whole row
    scale: Literal["float32", "float16"] = "float32"  # its dtype, to which it is rounded first
    range: Literal["absmax", "minmax", "unsigned"] = "absmax"

    def __post_init__(self):
        check_choice("width", self.width, tuple(range(2, 9)))
        check_block("block", self.block, optional=True)
        check_choice("scale", self.scale, tuple(_SCALE_BITS))
        check_choice("range", self.range, ("absmax", "minmax", "unsigned"))

    @property
    def code_bits(self) -> int:
        """Bits of a stored code: 4 or 8."""
        return 4 if self.width <= 4 else 8

    @property
    def signed_codes(self) -> bool:
        """Whether codes are two's complement."""
        return self.range == "absmax"

    @property
    def is_operand(self) -> bool:
        """Whether it is the int8 operand of kernels: 8 bits and one float32 scale a row."""
        row = self.block is None and self.scale == "float32"
        return row and self.width == 8 and self.range != "unsigned"

    def bits(self, k: int) -> float:
        """Stored bits an element; minmax stores an offset beside the scale."""
        stored = _SCALE_BITS[self.scale] * (2 if self.range == "minmax" else 1)
        return self.width + stored / (self.block or k)

    def outer(self, rows: jax.Array) -> Scales:
        """Return the `codec.RowScale` of a kernel's operand; other scales are of blocks."""
        return codec.range_scale(rows, range=self.range) if self.is_operand else ()

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return multiplier, scale and offset of each block."""
        if self.is_operand:
            return outer.multiplier, outer.scale, outer.lo
        lo = jnp.min(blocks, axis=-1, keepdims=True) if self.range == "minmax" else None
        top = absmax(blocks) if self.range == "absmax" else jnp.max(blocks, -1, keepdims=True)
        extent = top if lo is None else top - lo
        multiplier, scale = multiplier_and_scale(extent, self._limits[1])
        if self.scale == "float16":
            scale = jnp.minimum(scale, jnp.finfo(jnp.float16).max)
            scale = scale.astype(jnp.float16).astype(jnp.float32)
            multiplier = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
        return multiplier, scale, lo

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return integers, int32."""
        if self.is_operand:
            return codec.to_8bit(values, outer).astype(jnp.int32)
        multiplier, _, lo = inner
        values = values if lo is None else values - lo
        return jnp.clip(jnp.round(values * multiplier), *self._limits).astype(jnp.int32)

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return the scale, and the offset of minmax, of each block."""
        _, scale, lo = inner
        kept = {"scale": scale.astype(self.scale)}
        return kept if lo is None else kept | {"lo": lo.astype(self.scale)}

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return integers times scale plus offset."""
        y = codes.astype(jnp.float32) * kept["scale"].astype(jnp.float32)
        return y + kept["lo"].astype(jnp.float32) if "lo" in kept else y

    def exact_8(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array] | None:
        """Return symmetric integers under one scale a row, whatever their width."""
        if self.block is not None or self.range != "absmax":
            return None
        return codes.astype(jnp.int8), kept["scale"].astype(jnp.float32)

    def assemble(self, codes: jax.Array, kept: Kept, k: int) -> Stored:
        """Return int8 rows where kernels multiply them, else rows in blocks."""
        if not self.is_operand:
            return super().assemble(codes, kept, k)
        wide = join(codes)
        values = wide if self.range == "absmax" else wide - 128
        scales = {name: leaf[..., 0] for name, leaf in kept.items()}
        return Int8Rows(values=values.astype(jnp.int8), scale=scales["scale"], lo=scales.get("lo"))

    @property
    def _limits(self) -> tuple[int, int]:
        if self.range == "absmax":
            top = 2 ** (self.width - 1) - 1
            return -top, top
        return 0, 2**self.width - 1

    def __str__(self):
        words = [f"int{self.width}"] + [f"g{self.block}"] * bool(self.block)
        return " ".join(words + [self.range] * (self.range != "absmax"))
