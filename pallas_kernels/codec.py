"""The QuaRTZ number format on plain arrays, along the last axis: its one executable definition.

Source: "Post-Training Quantization via Residual Truncation and Zero Suppression for Diffusion
Models" (arXiv 2509.26436). Stage 1 maps floats to 8 bits with one scale a row; stage 2 keeps four
bits an element and, for each group of `group_size` elements, one 4-bit shift (the paper's FLAG).
Every float step is one IEEE float32 operation rounded to nearest even, so that every backend
yields the same bits. int8 values are symmetric ("absmax"), uint8 values asymmetric ("minmax"):
the dtype of the values and codes says which.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Rows whose range lies below this are stored as zeros; 127 / range then never overflows.
TINY_RANGE = 2.0**-100
_SMALLEST_NORMAL = 2.0**-126

NIBBLE_MAX = 7  # largest 4-bit magnitude, symmetric
UNSIGNED_NIBBLE_MAX = 15  # largest 4-bit value, asymmetric
UINT8_MAX = 255  # largest asymmetric value
MAX_STEP = 16  # largest integer step: 7 * 16 = 112 still fits int8
# Stretched levels: a code's magnitude c stands for c + max(c - 5, 0), that is up to 9.
STRETCH_FROM = 5
MAX_STRETCHED_STEP = 14  # 9 * 14 = 126


def pad(values: jax.Array, multiple: int) -> jax.Array:
    """Append zeros to the last axis up to a multiple of `multiple`."""
    missing = -values.shape[-1] % multiple
    if not missing:
        return values
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


class RowScale(NamedTuple):
    """What stage 1 keeps of the range of each row; see `range_scale`."""

    scale: jax.Array  # float32 [..., 1]: of the 8-bit values, 0 or NaN where there are none
    multiplier: jax.Array  # float32 [..., 1]: of the input, 0 in rows whose values are all zero
    lo: jax.Array | None  # float32 [..., 1], the minimum: only for "minmax"


def range_scale(
    x: jax.Array,  # [..., k], floating
    *,
    range: str = "absmax",
    limit: int = 127,  # largest value of the symmetric range
) -> RowScale:
    """Find the scale of each row, the first half of stage 1.

    With a = max|x|, or d = max(x) - lo for "minmax": the multiplier is limit / a or 255 / d, and
    the scale a * float32(1 / limit) or d * float32(1 / 255). A row with a or d below 2**-100 has
    scale 0; one with a NaN, an infinity or an overflowing d has scale (and lo) NaN. For "minmax"
    subnormal inputs count as zero: some accelerators drop them, and lo must not depend on the
    machine.
    """
    x = x.astype(jnp.float32)
    if range == "absmax":
        extent, lo = jnp.max(jnp.abs(x), axis=-1, keepdims=True), None
    else:
        x = _without_subnormals(x)
        lo = jnp.min(x, axis=-1, keepdims=True)
        extent, limit = jnp.max(x, axis=-1, keepdims=True) - lo, UINT8_MAX
    extent = _nan_unless_finite(x, extent)
    live = (extent >= TINY_RANGE) & jnp.isfinite(extent)
    scale = extent * jnp.float32(1 / limit)
    scale = jnp.where(extent < TINY_RANGE, 0, jnp.where(live, scale, jnp.nan))
    multiplier = jnp.where(live, divide(limit, jnp.where(live, extent, 1)), 0)
    lo = None if lo is None else jnp.where(jnp.isnan(scale), jnp.nan, lo)
    return RowScale(scale=scale, multiplier=multiplier, lo=lo)


def to_8bit(
    x: jax.Array,  # [..., k], floating; any part of the rows
    row: RowScale,
    *,
    limit: int = 127,  # as `range_scale` had it
) -> jax.Array:
    """Round to 8 bits under the scales of the rows, the second half of stage 1.

    Returns:
      int8 clip(round_half_even(x * multiplier), -limit, limit), or if the rows have a lo uint8
      clip(round_half_even((x - lo) * multiplier), 0, 255); [..., k].
    """
    x = x.astype(jnp.float32)
    if row.lo is None:
        lowest, dtype = -limit, jnp.int8
    else:
        x, lowest, limit, dtype = _without_subnormals(x) - row.lo, 0, UINT8_MAX, jnp.uint8
    values = jnp.clip(jnp.round(x * row.multiplier), lowest, limit)
    return jnp.where(row.multiplier > 0, values, 0).astype(dtype)


def quantize_absmax(
    x: jax.Array,  # [..., k], floating
    limit: int = 127,
) -> tuple[jax.Array, jax.Array]:
    """Stage 1, symmetric: int8 [..., k] in -limit..limit, and scale float32 [..., 1]."""
    row = range_scale(x, limit=limit)
    return to_8bit(x, row, limit=limit), row.scale


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
    row = range_scale(blocks, range=range)
    values = to_8bit(blocks, row).reshape(x.shape)[..., :k]
    return values, row.scale[..., 0], None if row.lo is None else row.lo[..., 0]


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
    levels: str = "uniform",
    rounding: str = "nearest",
    search: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Stage 2: 8-bit values to 4-bit codes and one shift a group; see `group_step`, `code_of`.

    Returns:
      codes [..., k padded to whole groups], of the dtype of `values`; shifts uint8
      [..., groups]: 0..4, or p - 1 in 0..15 for the integer step, in 0..13 with stretched levels.
    """
    padded = pad(values, group_size)
    signed = values.dtype == jnp.int8
    groups = _split(padded, group_size).astype(jnp.int32)
    kind = {"step": step, "levels": levels}
    shifts = group_step(jnp.abs(groups), **kind, signed=signed, search=search)
    codes = code_of(groups, shifts, **kind, rounding=rounding, signed=signed)
    return codes.reshape(padded.shape).astype(values.dtype), shifts[..., 0].astype(jnp.uint8)


def group_step(
    magnitude: jax.Array,  # [..., group_size], int32: 0..127, or 0..255 if not signed
    *,
    step: str = "power",
    levels: str = "uniform",
    signed: bool = True,
    search: bool = False,
) -> jax.Array:
    """Return what is stored of the step of each group, int32 [..., 1].

    With M the maximum over the group:
      power: the shift max(bit_length(M) - b, 0), b = 3 bits if signed and else 4;
      integer (an extension of the paper, signed only): p - 1 with
        p = clip((2 M + 7) // 15, 1, 16), that is M / 7.5 rounded;
      integer with stretched levels: p - 1 with p = clip((4 M + 18) // 37, 1, 14), M / 9.25
        rounded.
    With `search`, p is the integer step of least squared error: `search_step`.
    """
    if step == "integer" and search:
        return search_step(magnitude, levels=levels) - 1
    peak = jnp.max(magnitude, axis=-1, keepdims=True)
    if step == "power":
        return jnp.maximum(32 - (3 if signed else 4) - lax.clz(peak), 0)
    if levels == "stretched":
        return jnp.clip((4 * peak + 18) // 37, 1, MAX_STRETCHED_STEP) - 1
    return jnp.clip((2 * peak + 7) // 15, 1, MAX_STEP) - 1


def search_step(
    magnitude: jax.Array,  # [..., group_size], int32: 0..127
    *,
    levels: str = "uniform",
) -> jax.Array:
    """Return the integer step of least squared error, the smallest on a tie, int32 [..., 1]."""

    def compare(p, best):
        error, step = best
        rest = magnitude - p * level_of(_divide_by_step(magnitude, p, levels), levels)
        candidate = jnp.sum(rest * rest, axis=-1, keepdims=True)
        return jnp.minimum(error, candidate), jnp.where(candidate < error, p, step)

    # Derived from the input, so that under shard_map the loop's carry varies as its body does.
    start = jnp.zeros_like(magnitude[..., :1])
    worst = start + jnp.iinfo(jnp.int32).max
    last = MAX_STRETCHED_STEP if levels == "stretched" else MAX_STEP
    return lax.fori_loop(1, last + 1, compare, (worst, start))[1]


def code_of(
    values: jax.Array,  # [..., elements], int32: 8-bit values, any of a group's
    shifts: jax.Array,  # [..., 1], int32: what is stored of the group's step
    *,
    step: str = "power",
    levels: str = "uniform",
    rounding: str = "nearest",
    signed: bool = True,
) -> jax.Array:
    """Return the code of each value for a step that is given: sign * t, int32 [..., elements].

    With m the magnitude and b = 3 bits, or 4 if not signed:
      power: t = m >> shift for "truncate", and for "nearest"
        t = min((m + (1 << shift >> 1)) >> shift, 2**b - 1);
      integer: t = min((2 m + p) // 2p, 7);
      stretched levels: the same up to 5 where m < 6 p, then 6 where m < 8 p, else 7.
    """
    magnitude = jnp.abs(values)
    if step == "integer":
        t = _divide_by_step(magnitude, shifts + 1, levels)
    elif rounding == "truncate":
        t = magnitude >> shifts
    else:
        top = NIBBLE_MAX if signed else UNSIGNED_NIBBLE_MAX
        t = jnp.minimum((magnitude + ((1 << shifts) >> 1)) >> shifts, top)
    return jnp.sign(values) * t


def level_of(codes: jax.Array, levels: str) -> jax.Array:
    """Return what codes stand for, times the step: themselves, or 0, 1, 2, 3, 4, 5, 7, 9."""
    if levels == "uniform":
        return codes
    return codes + jnp.sign(codes) * jnp.maximum(jnp.abs(codes) - STRETCH_FROM, 0)


def decode(
    codes: jax.Array,  # [..., groups * group_size], int8 or uint8
    shifts: jax.Array,  # [..., groups], uint8
    *,
    step: str = "power",
    levels: str = "uniform",
) -> jax.Array:
    """Stage 2 backwards, exact: code * 2**shift, or level(code) * (shift + 1) for integer steps.

    Returns:
      8-bit values of the shape and dtype of `codes`: -112..112, -126..126 with stretched levels,
      or 0..240 if asymmetric.
    """
    groups = _split(codes, codes.shape[-1] // shifts.shape[-1]).astype(jnp.int32)
    shifts = shifts[..., None].astype(jnp.int32)
    groups = level_of(groups, levels)
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
    levels: str = "uniform",
    signed: bool = True,
) -> jax.Array:
    """Decode packed codes to the int8 operand of a matmul, [..., k], k a multiple of group_size."""
    codes = unpack(codes, signed=signed)
    shifts = unpack(shifts, signed=False)[..., : codes.shape[-1] // group_size]
    return to_operand(decode(codes, shifts, step=step, levels=levels))


def _split(values: jax.Array, size: int) -> jax.Array:
    """Cut the last axis into pieces, [..., k] to [..., k / size, size]."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def _nan_unless_finite(x: jax.Array, extent: jax.Array) -> jax.Array:
    """Return extent, NaN where the row isn't finite: XLA's maximum drops NaN on CPUs."""
    return jnp.where(jnp.isfinite(x).all(axis=-1, keepdims=True), extent, jnp.nan)


def _without_subnormals(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, 0, x)


def _divide_by_step(magnitude: jax.Array, p: jax.Array, levels: str) -> jax.Array:
    """Return the code of the level nearest to magnitude / p, halves rounded up, saturating."""
    p = jnp.broadcast_to(p, magnitude.shape)
    if levels == "uniform":
        return jnp.minimum(lax.div(2 * magnitude + p, 2 * p), NIBBLE_MAX)
    code = jnp.minimum(lax.div(2 * magnitude + p, 2 * p), STRETCH_FROM)
    return jnp.where(magnitude < 6 * p, code, jnp.where(magnitude < 8 * p, 6, NIBBLE_MAX))
