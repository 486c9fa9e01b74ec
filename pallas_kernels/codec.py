"""The QuaRTZ number format on plain arrays, along the last axis: its one executable definition.

Source: "Post-Training Quantization via Residual Truncation and Zero Suppression for Diffusion
Models" (arXiv 2509.26436). Stage 1 maps floats to 8 bits with one scale a row; stage 2 keeps four
bits an element and, for each group of `group_size` elements, one 4-bit shift (the paper's FLAG).
Every float step is one IEEE float32 operation rounded to nearest even, so that every backend
yields the same bits. int8 values are symmetric ("absmax"), uint8 values asymmetric ("minmax"):
the dtype of the values and codes says which.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Rows whose range lies below this are stored as zeros; 127 / range then never overflows.
TINY_RANGE = 2.0**-100
_SMALLEST_NORMAL = 2.0**-126

NIBBLE_MAX = 7  # largest 4-bit magnitude, symmetric
UNSIGNED_NIBBLE_MAX = 15  # largest 4-bit value, asymmetric
MAX_STEP = 16  # largest integer step: 7 * 16 = 112 still fits int8


def pad(values: jax.Array, multiple: int) -> jax.Array:
    """Append zeros to the last axis up to a multiple of `multiple`."""
    missing = -values.shape[-1] % multiple
    if not missing:
        return values
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def quantize_absmax(
    x: jax.Array,  # [..., k], floating
    limit: int = 127,
) -> tuple[jax.Array, jax.Array]:
    """Stage 1, symmetric: q = clip(round_half_even(x * (limit / a)), -limit, limit), a = max|x|.

    Returns:
      q int8 [..., k], and scale float32 [..., 1], which is a * float32(1 / limit). A row with
      a < 2**-100 is all zeros with scale 0; a row with a NaN or an infinity has scale NaN.
    """
    x = x.astype(jnp.float32)
    a = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale, multiplier, live = _scale(_nan_unless_finite(x, a), limit)
    q = jnp.clip(jnp.round(x * multiplier), -limit, limit)
    return jnp.where(live, q, 0).astype(jnp.int8), scale


def quantize_minmax(
    x: jax.Array,  # [..., k], floating
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stage 1, asymmetric: u = clip(round_half_even((x - lo) * (255 / d)), 0, 255), d = max - lo.

    Returns:
      u uint8 [..., k], scale float32 [..., 1], which is d * float32(1 / 255), and lo float32
      [..., 1], the minimum. A row with d < 2**-100 is all zeros with scale 0; a row with a NaN,
      an infinity or an overflowing d has scale and lo NaN. Subnormal inputs count as zero: some
      accelerators drop them, and lo must not depend on the machine.
    """
    x = x.astype(jnp.float32)
    x = jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, 0, x)
    lo = jnp.min(x, axis=-1, keepdims=True)
    extent = jnp.max(x, axis=-1, keepdims=True) - lo
    scale, multiplier, live = _scale(_nan_unless_finite(x, extent), 255)
    u = jnp.clip(jnp.round((x - lo) * multiplier), 0, 255)
    lo = jnp.where(jnp.isnan(scale), jnp.nan, lo)
    return jnp.where(live, u, 0).astype(jnp.uint8), scale, lo


def quantize_8bit(
    x: jax.Array,  # [..., k], floating
    *,
    range: str,
    scale_block: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Stage 1 with one scale a row, or one for each `scale_block` elements of a row.

    Returns:
      values int8 ("absmax") or uint8 ("minmax") [..., k]; scale float32
      [..., ceil(k / scale_block)] or [..., 1]; lo of the scale's shape, or None for "absmax".
    """
    k = x.shape[-1]
    block = scale_block or k
    # A short last block repeats its last element, which changes neither extreme.
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -k % block)], mode="edge")
    blocks = _split(x, block)
    values, *scales = quantize_absmax(blocks) if range == "absmax" else quantize_minmax(blocks)
    scale, lo = (*(s[..., 0] for s in scales), None)[:2]
    return values.reshape(x.shape)[..., :k], scale, lo


def divide(
    levels: int,  # 1..255
    extent: jax.Array,  # float32, normal and positive, at least 2**-100
) -> jax.Array:
    """Return levels / extent correctly rounded, whatever the device's own division does.

    XLA's division may be two units in the last place off on GPU and TPU.
    """
    return correct_quotient(levels / extent, levels, extent)


def correct_quotient(
    quotient: jax.Array,  # float32, at most two units in the last place off
    levels: int,  # 1..255
    extent: jax.Array,  # float32, normal and positive, at least 2**-100
) -> jax.Array:
    """Return the float32 nearest to levels / extent, given one nearby.

    With 24-bit integers n and m for levels and extent, and g for the quotient, n * 2**23 - g * m
    tells how far g is off. It is below 2**26, so that 32-bit products that wrap give it exactly.
    A quotient of two floats never lies halfway between two others.
    """
    bits = lax.bitcast_convert_type(extent, jnp.int32)
    guess_bits = lax.bitcast_convert_type(quotient, jnp.int32)
    mantissa = (bits & 0x7FFFFF) | 0x800000
    numerator = jnp.int32(levels << (24 - levels.bit_length()))
    below = (numerator < mantissa).astype(jnp.int32)  # doubled, so that the quotient is 1 to 2
    exponent = 253 + levels.bit_length() - (bits >> 23) - below
    guess = guess_bits - ((exponent - 1) << 23)
    twice = 2 * ((numerator << (23 + below)) - guess * mantissa)
    up = (twice > mantissa).astype(jnp.int32) + (twice > 3 * mantissa)
    down = (twice < -mantissa).astype(jnp.int32) + (twice < -3 * mantissa)
    return lax.bitcast_convert_type(guess_bits + up - down, jnp.float32)


def encode(
    values: jax.Array,  # [..., k], int8 or uint8
    *,
    group_size: int,
    step: str = "power",
    rounding: str = "nearest",
    search: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Stage 2: 8-bit values to 4-bit codes and one shift a group.

    With m the magnitude (the value itself if asymmetric), M its maximum over the group and
    b = 3 bits (asymmetric 4):
      power: shift = max(bit_length(M) - b, 0); t = m >> shift for "truncate", and for "nearest"
        t = min((m + (1 << shift >> 1)) >> shift, 2**b - 1).
      integer (an extension of the paper, symmetric only): p = clip((2M + 7) // 15, 1, 16), or with
        `search` the p in 1..16 of least squared error, the smallest on a tie;
        t = min((2m + p) // 2p, 7).
    The code is sign * t.

    Returns:
      codes [..., k padded to whole groups], of the dtype of `values`; shifts uint8
      [..., groups], 0..4, or p - 1 in 0..15 for the integer step.
    """
    padded = pad(values, group_size)
    groups = _split(padded, group_size).astype(jnp.int32)
    magnitude = jnp.abs(groups)
    peak = jnp.max(magnitude, axis=-1, keepdims=True)
    if step == "integer":
        p = search_step(magnitude) if search else jnp.clip((2 * peak + 7) // 15, 1, MAX_STEP)
        t, shifts = _divide_by_step(magnitude, p), p - 1
    else:
        t, shifts = _shift_right(magnitude, peak, rounding, signed=values.dtype == jnp.int8)
    codes = (jnp.sign(groups) * t).reshape(padded.shape).astype(values.dtype)
    return codes, shifts[..., 0].astype(jnp.uint8)


def search_step(magnitude: jax.Array) -> jax.Array:
    """Return the integer step 1..16 of least squared error, the smallest on a tie.

    Args:
      magnitude: int32 [..., group_size], 0..127.

    Returns:
      int32 [..., 1].
    """

    def compare(p, best):
        error, step = best
        rest = magnitude - p * _divide_by_step(magnitude, p)
        candidate = jnp.sum(rest * rest, axis=-1, keepdims=True)
        return jnp.minimum(error, candidate), jnp.where(candidate < error, p, step)

    # Derived from the input, so that under shard_map the loop's carry varies as its body does.
    start = jnp.zeros_like(magnitude[..., :1])
    worst = start + jnp.iinfo(jnp.int32).max
    return lax.fori_loop(1, MAX_STEP + 1, compare, (worst, start))[1]


def decode(
    codes: jax.Array,  # [..., groups * group_size], int8 or uint8
    shifts: jax.Array,  # [..., groups], uint8
    *,
    step: str = "power",
) -> jax.Array:
    """Stage 2 backwards, exact: code * 2**shift, or code * (shift + 1) for the integer step.

    Returns:
      8-bit values of the shape and dtype of `codes`: -112..112, or 0..240 if asymmetric.
    """
    groups = _split(codes, codes.shape[-1] // shifts.shape[-1]).astype(jnp.int32)
    shifts = shifts[..., None].astype(jnp.int32)
    values = groups * (shifts + 1) if step == "integer" else groups << shifts
    return values.astype(codes.dtype).reshape(codes.shape)


def to_operand(values: jax.Array) -> jax.Array:
    """Return 8-bit values as the int8 operand of a matmul: asymmetric ones minus 128."""
    return values if values.dtype == jnp.int8 else (values.astype(jnp.int16) - 128).astype(jnp.int8)


def pack(codes: jax.Array) -> jax.Array:
    """Pack 4-bit values, two a byte: element 2j in byte j's low nibble, 2j + 1 in its high one.

    Args:
      codes: int8 (two's complement) or uint8 [..., n]; an odd n is padded with a zero.

    Returns:
      uint8 [..., ceil(n / 2)].
    """
    codes = pad(codes, 2)
    pairs = _split(codes.astype(jnp.uint8), 2) & 15
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: jax.Array, *, signed: bool) -> jax.Array:
    """Undo `pack`: uint8 [..., n / 2] to int8 -8..7 if `signed`, else uint8 0..15, [..., n]."""
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1)
    nibbles = nibbles.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return (nibbles.astype(jnp.int8) ^ 8) - 8 if signed else nibbles


def decode_packed(
    codes: jax.Array,  # [..., k / 2], uint8
    shifts: jax.Array,  # [..., ceil(groups / 2)], uint8
    *,
    group_size: int,
    step: str = "power",
    signed: bool = True,
) -> jax.Array:
    """Decode packed codes to the int8 operand of a matmul, [..., k], k a multiple of group_size."""
    codes = unpack(codes, signed=signed)
    shifts = unpack(shifts, signed=False)[..., : codes.shape[-1] // group_size]
    return to_operand(decode(codes, shifts, step=step))


def _split(values: jax.Array, size: int) -> jax.Array:
    """Cut the last axis into pieces, [..., k] to [..., k / size, size]."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def _nan_unless_finite(x: jax.Array, extent: jax.Array) -> jax.Array:
    """Return extent, NaN where the row isn't finite: XLA's maximum drops NaN on CPUs."""
    return jnp.where(jnp.isfinite(x).all(axis=-1, keepdims=True), extent, jnp.nan)


def _scale(extent: jax.Array, levels: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return scale, multiplier and whether codes are kept, all of the shape of `extent`."""
    live = (extent >= TINY_RANGE) & jnp.isfinite(extent)
    scale = extent * jnp.float32(1 / levels)
    scale = jnp.where(extent < TINY_RANGE, 0, jnp.where(live, scale, jnp.nan))
    return scale, divide(levels, jnp.where(live, extent, 1)), live


def _shift_right(
    magnitude: jax.Array, peak: jax.Array, rounding: str, signed: bool
) -> tuple[jax.Array, jax.Array]:
    bits = 3 if signed else 4
    shift = jnp.maximum(32 - bits - lax.clz(peak), 0)
    if rounding == "truncate":
        return magnitude >> shift, shift
    half = (1 << shift) >> 1
    top = NIBBLE_MAX if signed else UNSIGNED_NIBBLE_MAX
    return jnp.minimum((magnitude + half) >> shift, top), shift


def _divide_by_step(magnitude: jax.Array, p: jax.Array) -> jax.Array:
    """Divide non-negative integers by a step, halves rounded up, saturating."""
    p = jnp.broadcast_to(p, magnitude.shape)
    return jnp.minimum(lax.div(2 * magnitude + p, 2 * p), NIBBLE_MAX)
