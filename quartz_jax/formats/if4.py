"""IF4: blocks of NVFP4 that may hold integers instead."""

import jax
import jax.numpy as jnp

from quartz_jax.formats.base import Kept, Scales, squared_error
from quartz_jax.formats.floating import (
    E2M1_MAX,
    TwoLevel,
    decode_e2m1,
    encode_e2m1,
    load_e4m3,
    store_e4m3,
)
from quartz_jax.schema import part

_INT4_MAX = 7
_SIGN = 7  # the bit of an E4M3 scale, never negative, that says that a block holds integers


@part()
class IF4(TwoLevel):
    """Each block is E2M1 or a 4-bit integer, whichever errs less (arXiv 2603.28765).

    g and the E4M3 scale of a block are NVFP4's: its maximum becomes 6. With t = x / (scale g), an
    element is E2M1(t), or 6/7 of the integer clip(round(7/6 t), -7, 7); the block is of integers
    if the sum of its squared errors is less so, and then the sign bit of its scale is set. As in
    the authors' code, mit-han-lab/fouroversix. There is no `exact_16`: sevenths are whole under a
    row scale of g / 7 only, under which E2M1 times the scale takes nine significant bits.
    """

    block: int = 16  # elements that share a scale; 16 in the paper

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the E4M3 scale of each block, as float32, and 1 where it holds integers."""
        scale = self.scale_for(blocks, outer, E2M1_MAX)
        floats, integers = ((scale, jnp.full_like(scale, kind, jnp.int32)) for kind in (0, 1))
        errors = [
            squared_error(self.round(blocks, outer, inner), blocks) for inner in (floats, integers)
        ]
        return scale, (errors[1] < errors[0]).astype(jnp.int32)

    def step(self, outer: Scales, inner: Scales) -> jax.Array:
        """Return both scales' product, for E2M1 blocks."""
        return inner[0] * outer

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return E2M1 codes, or integers in two's complement."""
        step = self.step(outer, inner)
        t = jnp.where(step > 0, values / jnp.where(step > 0, step, 1), 0)
        integer = jnp.clip(jnp.round(t * (_INT4_MAX / E2M1_MAX)), -_INT4_MAX, _INT4_MAX)
        return jnp.where(inner[1] == 1, integer.astype(jnp.int32) & 15, encode_e2m1(t))

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return the blocks' scales in E4M3, the kind in their sign bits, and g."""
        scale, kind = inner
        return {
            "scale": store_e4m3(scale) | kind.astype(jnp.uint8) << _SIGN,
            "row_scale": outer,
        }

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return elements times both scales."""
        kind, scale = kept["scale"] >> _SIGN, load_e4m3(kept["scale"] & 127)
        integer = ((codes ^ 8) - 8) * jnp.float32(E2M1_MAX / _INT4_MAX)
        return jnp.where(kind == 1, integer, decode_e2m1(codes)) * (scale * kept["row_scale"])

    def __str__(self):
        return "if4" + f" g{self.block}" * (self.block != 16)
