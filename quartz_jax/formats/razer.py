"""RaZeR: NVFP4 with another value in the place of -0."""

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

_EXTRA = 5.0  # between E2M1's 4 and 6, the widest gap
_NEGATIVE_ZERO = 8  # the code that stands for it
_SIGN = 7  # the bit of an E4M3 scale, never negative, that makes a block's extra value negative


@part()
class RaZeR(TwoLevel):
    """Redundant zero remapping (arXiv 2501.04052): E2M1 whose code for -0 stands for 5 or -5.

    g and the E4M3 scale of a block are NVFP4's: its maximum becomes 6. With t = x / (scale g), an
    element is E2M1(t), or the block's extra value where that is no further from t; the extra
    value is -5 if the sum of squared errors is less so than with 5, and then the sign bit of the
    scale is set. As in the authors' code for E4M3 scales, but for its error, which is taken to
    the scale there.
    """

    block: int = 16  # elements that share a scale; 16 in the paper

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the E4M3 scale of each block, as float32, and its extra value."""
        scale = self.scale_for(blocks, outer, E2M1_MAX)
        plus, minus = (jnp.full_like(scale, sign * _EXTRA) for sign in (1, -1))
        errors = [
            squared_error(self.round(blocks, outer, (scale, extra)), blocks)
            for extra in (plus, minus)
        ]
        return scale, jnp.where(errors[1] < errors[0], minus, plus)

    def step(self, outer: Scales, inner: Scales) -> jax.Array:
        """Return both scales' product."""
        return inner[0] * outer

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return E2M1 codes, 8 for the extra value."""
        step, extra = self.step(outer, inner), inner[1]
        t = jnp.where(step > 0, values / jnp.where(step > 0, step, 1), 0)
        codes = encode_e2m1(t)
        codes = jnp.where(codes == _NEGATIVE_ZERO, 0, codes)
        nearer = jnp.abs(t - extra) <= jnp.abs(t - decode_e2m1(codes))
        return jnp.where(nearer, _NEGATIVE_ZERO, codes)

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return the blocks' scales in E4M3, the extra value's sign in theirs, and g."""
        scale, extra = inner
        negative = (extra < 0).astype(jnp.uint8)
        return {"scale": store_e4m3(scale) | negative << _SIGN, "row_scale": outer}

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return elements times both scales."""
        elements, scale = self._elements(codes, kept)
        return elements * (scale * kept["row_scale"])

    def exact_16(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return elements times the blocks' scales, seven significant bits, and g."""
        elements, scale = self._elements(codes, kept)
        return (elements * scale).astype(jnp.bfloat16), kept["row_scale"]

    def _elements(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return the elements, and the blocks' scales."""
        extra = jnp.where(kept["scale"] >> _SIGN == 1, -_EXTRA, _EXTRA)
        elements = jnp.where(codes == _NEGATIVE_ZERO, extra, decode_e2m1(codes))
        return elements, load_e4m3(kept["scale"] & 127)

    def __str__(self):
        return "razer" + f" g{self.block}" * (self.block != 16)
