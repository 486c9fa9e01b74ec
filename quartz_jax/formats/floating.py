"""Four-bit floating point in blocks: MXFP4 and NVFP4, and what formats like them share.

Both store elements in E2M1, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.codec import TINY_RANGE
from quartz_jax.formats.base import (
    Format,
    Kept,
    Scales,
    absmax,
    check_block,
    check_choice,
    squared_error,
)
from quartz_jax.schema import part

E2M1_MAX = 6.0
_E2M1_MAX_EXPONENT = 2  # of 6 = 1.5 * 2**2
_E4M3_MAX = 448.0
_E4M3_MAX_FOUR_OVER_SIX = 256.0  # 1.5 times as much is a value too
_E4M3_MIN_EXPONENT = -6  # of normal values


def round_e2m1(x: jax.Array) -> jax.Array:  # float32
    """Return the nearest E2M1 value, ties to the even mantissa, saturating at 6."""
    magnitude = jnp.abs(x)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    return jnp.sign(x) * jnp.minimum(jnp.round(magnitude / step) * step, E2M1_MAX)


def encode_e2m1(x: jax.Array) -> jax.Array:  # float32
    """Return the code of `round_e2m1(x)`: its index among the magnitudes, plus 8 if negative."""
    doubled = (2 * jnp.abs(round_e2m1(x))).astype(jnp.int32)  # 0, 1, 2, 3, 4, 6, 8 or 12
    index = jnp.where(
        doubled < 4, doubled, jnp.where(doubled < 8, 2 + doubled // 2, 4 + doubled // 4)
    )
    return jnp.where(x < 0, index + 8, index)


def decode_e2m1(codes: jax.Array) -> jax.Array:  # int32, 0..15
    """Return the value of an E2M1 code, float32."""
    index = codes & 7
    magnitude = jnp.where(
        index < 4, index * 0.5, jnp.where(index < 6, index - 2.0, 2.0 * index - 8)
    )
    return jnp.where(codes >= 8, -magnitude, magnitude)


def round_e4m3(x: jax.Array) -> jax.Array:  # float32, 0 to 448
    """Return the nearest float8_e4m3fn value, ties to the even mantissa, as float32.

    In arithmetic, since conversions to 8 bits round twice on some machines.
    """
    step = power_of_two(jnp.maximum(floor_log2(x), _E4M3_MIN_EXPONENT) - 3)
    return jnp.minimum(jnp.round(x / step) * step, _E4M3_MAX)


def floor_log2(x: jax.Array) -> jax.Array:  # float32, at least 0
    """Return floor(log2(x)), exact for normal x, and -127 for what is smaller."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:  # int32, -126 to 127
    """Return 2**exponent as float32, exact."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def store_e4m3(x: jax.Array) -> jax.Array:  # float32 values that float8_e4m3fn holds
    """Return the bits of E4M3 values, uint8."""
    return lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)


def load_e4m3(bits: jax.Array) -> jax.Array:  # uint8
    """Undo `store_e4m3`."""
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


class E2M1(Format):
    """A format whose codes are E2M1: sign in bit 3, index of the magnitude below it."""

    signed_codes = False

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return the codes of values over the step of their block, 0 where that is 0."""
        step = self.step(outer, inner)
        codes = encode_e2m1(values / jnp.where(step > 0, step, 1))
        return jnp.where(step > 0, codes, 0)

    def step(self, outer: Scales, inner: Scales) -> jax.Array:
        """Return what an element of 1 stands for in each block, float32."""
        raise NotImplementedError


@part()
class MXFP4(E2M1):
    """OCP Microscaling Formats v1.0, section 6.3: one power-of-two scale (E8M0) for 32 elements.

    scale = 2**(floor(log2(max|x|)) - 2), element = E2M1(x / scale). Values above 6 scales, which
    this rule allows up to 8, saturate. A block with max|x| < 2**-100 is all zeros.
    """

    block: int = 32  # elements that share a scale; 32 in the standard

    def __post_init__(self):
        check_block("block", self.block)

    def bits(self, k: int) -> float:
        """Four, and eight for the scale."""
        return 4 + 8 / self.block

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the scale of each block, 0 where the block is all zeros."""
        peak = absmax(blocks)
        live = peak >= TINY_RANGE
        exponent = floor_log2(jnp.where(live, peak, 1)) - _E2M1_MAX_EXPONENT
        return jnp.where(live, power_of_two(exponent), 0)

    def step(self, outer: Scales, inner: Scales) -> jax.Array:
        """Return the scale."""
        return inner

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return the E8M0 scale: the exponent plus 127."""
        return {"scale": jnp.clip(floor_log2(inner) + 127, 0).astype(jnp.uint8)}

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return elements times scale."""
        return decode_e2m1(codes) * power_of_two(kept["scale"].astype(jnp.int32) - 127)

    def exact_16(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return elements times scale, two significant bits, and a row scale of one."""
        values = self.decode(codes, kept)
        return values.astype(jnp.bfloat16), jnp.ones_like(values[..., :1, :1])

    def __str__(self):
        return "mxfp4" + f" g{self.block}" * (self.block != 32)


class TwoLevel(E2M1):
    """Blocks under an E4M3 scale, and a float32 scale g for the tensor.

    g = max|tensor| / (6 * largest scale), so that every block's scale is in reach of E4M3. A
    tensor is the last two axes of an array: a whole weight, or one image's tokens, so that a
    result never depends on what else is in the batch. g is found online for activations.
    """

    rows_apart = False

    block: int = 16  # elements that share a scale

    def __post_init__(self):
        check_block("block", self.block)

    def bits(self, k: int) -> float:
        """Four, and eight for the scale; the tensor's scale is too little to count."""
        return 4 + 8 / self.block

    def outer(self, rows: jax.Array) -> Scales:
        """Return g, the same for all rows of a tensor."""
        tensor = tuple(range(-min(rows.ndim, 2), 0))
        peak = jnp.max(jnp.abs(rows), axis=tensor, keepdims=True, initial=0)
        # The barrier keeps XLA from multiplying by a rounded 1 / 2688 instead.
        largest = lax.optimization_barrier(jnp.float32(self._largest_scale * E2M1_MAX))
        return jnp.broadcast_to(peak / largest, (*rows.shape[:-1], 1))

    @property
    def _largest_scale(self) -> float:
        """The scale that the tensor's largest block gets."""
        return _E4M3_MAX

    def scale_for(self, blocks: jax.Array, outer: Scales, top: float) -> jax.Array:
        """Return the E4M3 scale, as float32, that takes each block's maximum to `top`."""
        live = outer >= TINY_RANGE
        scale = absmax(blocks) / (top * jnp.where(live, outer, 1))
        return jnp.where(live, round_e4m3(jnp.minimum(scale, _E4M3_MAX)), 0)


@part()
class NVFP4(TwoLevel):
    """NVIDIA's two-level format: an E4M3 scale for 16 elements and a float32 one for the tensor.

    g = max|tensor| / (448 * 6), scale = E4M3(max|block| / (6 g)), element = E2M1(x / (scale g)).

    With `block_max="4or6"`, four over six (Cook et al., arXiv 2512.02010): E2M1 has no value
    between 4 and 6, so that a block's next largest values err by up to a sixth of its maximum.
    Each block takes the scale E4M3(max|block| / (4 g)) instead if the sum of its squared errors
    is less so; then g = max|tensor| / (256 * 6), as the authors' code has it, which leaves the
    larger scale, at most 384, in reach of E4M3. Storage is the same.
    """

    block: int = 16  # elements that share a scale; 16 in the standard
    block_max: Literal["6", "4or6"] = "6"  # what a block's maximum becomes before rounding

    def __post_init__(self):
        super().__post_init__()
        check_choice("block_max", self.block_max, ("6", "4or6"))

    @property
    def _largest_scale(self) -> float:
        return _E4M3_MAX if self.block_max == "6" else _E4M3_MAX_FOUR_OVER_SIX

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the E4M3 scale of each block, as float32."""
        to_six = self.scale_for(blocks, outer, 6)
        if self.block_max == "6":
            return to_six
        to_four = self.scale_for(blocks, outer, 4)
        less = self._error(blocks, outer, to_four) < self._error(blocks, outer, to_six)
        return jnp.where(less, to_four, to_six)

    def _error(self, blocks: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        return squared_error(self.round(blocks, outer, inner), blocks)

    def step(self, outer: Scales, inner: Scales) -> jax.Array:
        """Return both scales' product."""
        return inner * outer

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return the blocks' scales in E4M3, and g."""
        return {"scale": store_e4m3(inner), "row_scale": outer}

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return elements times both scales."""
        return decode_e2m1(codes) * (load_e4m3(kept["scale"]) * kept["row_scale"])

    def exact_16(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return elements times the blocks' scales, six significant bits, and g."""
        values = decode_e2m1(codes) * load_e4m3(kept["scale"])
        return values.astype(jnp.bfloat16), kept["row_scale"]

    def __str__(self):
        words = ["nvfp4"] + [f"g{self.block}"] * (self.block != 16)
        return " ".join(words + ["4or6"] * (self.block_max == "4or6"))
