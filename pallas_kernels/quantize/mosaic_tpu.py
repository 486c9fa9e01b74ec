"""Activation quantization on TPU in one pass over memory: floats to the int8 operand of a matmul.

Two things here are not what one would write first.
- 127 / a is an integer long division: the format wants the correctly rounded quotient, and the
  chip's own division isn't specified to give it. It runs once a row.
- The largest level (step) of a group is found by the matrix unit, since lanes can't be regrouped
  cheaply. Level L becomes 2**(8 L - 127), a float whose bits are L << 26; up to 64 of them add up
  to less than the next level's, so the top bits of the sum are the largest L.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import codec, compat, device

_LANES = 128
_BLOCK_ELEMENTS = 3 * 2**18  # of x that one grid step takes
_BLOCK_ROWS = 128
_CHUNK_ELEMENTS = 2**15  # in flight at once: more would spill registers
_VMEM_BYTES = 48 * 2**20
_INFINITY_BITS = 0x7F800000


def quantize(
    x: jax.Array,  # [m, k], floating
    *,
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantize each row; see `pallas_kernels.quantize.quantize`."""
    m, k = x.shape
    width = -(-k // _LANES) * _LANES
    rows = min(max(_BLOCK_ELEMENTS // width // 32, 1) * 32, _BLOCK_ROWS, m)
    chunk = _LANES * _largest_divisor(width // _LANES, _CHUNK_ELEMENTS // _LANES // rows)
    asymmetric = range == "minmax"
    column = jax.ShapeDtypeStruct((m, 1), jnp.float32)
    column_spec = pl.BlockSpec((rows, 1), lambda i: (i, 0))
    wide_spec = pl.BlockSpec((rows, width), lambda i: (i, 0))
    values, *scales = pl.pallas_call(
        functools.partial(
            _kernel,
            k=k,
            chunk=chunk,
            bits=bits,
            group_size=group_size,
            asymmetric=asymmetric,
            step=step,
            rounding=rounding,
        ),
        grid=(-(-m // rows),),
        in_specs=[wide_spec, pl.BlockSpec((_LANES, _LANES), lambda i: (0, 0))],
        out_specs=[wide_spec] + [column_spec] * (1 + asymmetric),
        out_shape=[jax.ShapeDtypeStruct((m, width), jnp.int8)] + [column] * (1 + asymmetric),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=device.current().platform != "tpu",
        name="quartz_quantize",
    )(jnp.pad(x, [(0, 0), (0, width - k)]), _same_group(group_size))
    return values[:, :k], scales[0], scales[1] if asymmetric else None


def why_not(target: device.Device, x: jax.Array, **kwargs) -> str | None:
    """Say why the device can't run the kernel, or return None."""
    if target.platform != "tpu":
        return f"needs a TPU, not {target.platform}"
    return None if 0 not in x.shape else "needs at least one element"


def _kernel(x_ref, same_group_ref, values_ref, scale_ref, lo_ref=None, *, k, chunk, **config):
    asymmetric = config.pop("asymmetric")
    lo, extent, finite = _extremes(x_ref, k, chunk, asymmetric)
    live = finite & (extent >= codec.TINY_RANGE) & (extent < jnp.inf)
    levels = 255 if asymmetric else 127
    scale = jnp.where(live, extent * jnp.float32(1 / levels), jnp.nan)
    scale_ref[...] = jnp.where(finite & (extent < codec.TINY_RANGE), 0, scale)
    multiplier = _divide(levels, jnp.where(live, extent, 1.0))
    if lo_ref is not None:
        lo_ref[...] = lo
    kept = jnp.where(live, -1, 0)  # a mask of bits

    def body(i, _):
        at = pl.ds(pl.multiple_of(i * chunk, _LANES), chunk)
        x = _load(x_ref, at, asymmetric)
        scaled = (x - lo if asymmetric else jnp.abs(x)) * multiplier
        magnitude = jnp.round(scaled).astype(jnp.int32) & kept
        if k % _LANES:
            magnitude = jnp.where(_column(i, x.shape) < k, magnitude, 0)
        values = _through_four_bits(magnitude, same_group_ref[...], asymmetric, **config)
        values = values - 128 if asymmetric else jnp.where(x < 0, -values, values)
        values_ref[:, at] = values.astype(jnp.int8)
        return _

    lax.fori_loop(0, x_ref.shape[1] // chunk, body, 0)


def _load(x_ref, at, asymmetric: bool) -> jax.Array:
    x = x_ref[:, at].astype(jnp.float32)
    return jnp.where(jnp.abs(x) < 2.0**-126, 0, x) if asymmetric else x


def _column(i: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Return the column of x that each element of chunk i is."""
    return i * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)


def _extremes(x_ref, k: int, chunk: int, asymmetric: bool):
    """Return lo, max - lo (or max|x|) and whether all of the row is finite, each [rows, 1]."""

    def body(i, carry):
        low, high, peak = carry
        at = pl.ds(pl.multiple_of(i * chunk, _LANES), chunk)
        x = _load(x_ref, at, asymmetric)
        bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
        if asymmetric:
            inside = _column(i, x.shape) < k
            low = jnp.minimum(low, jnp.where(inside, x, jnp.inf) if k % _LANES else x)
            high = jnp.maximum(high, jnp.where(inside, x, -jnp.inf) if k % _LANES else x)
        return low, high, jnp.maximum(peak, bits)

    full = functools.partial(jnp.full, (x_ref.shape[0], chunk))
    start = (full(jnp.inf), full(-jnp.inf), full(0)) if asymmetric else (0.0, 0.0, full(0))
    low, high, peak = lax.fori_loop(0, x_ref.shape[1] // chunk, body, start)
    # As integers a NaN is the largest; none is left when the lanes are compared as floats.
    peak = lax.bitcast_convert_type(jnp.minimum(peak, _INFINITY_BITS), jnp.float32)
    peak = jnp.max(peak, axis=1, keepdims=True)
    if not asymmetric:
        return None, peak, peak < jnp.inf
    low = jnp.min(low, axis=1, keepdims=True)
    return low, jnp.max(high, axis=1, keepdims=True) - low, peak < jnp.inf


def _divide(levels: int, extent: jax.Array) -> jax.Array:
    """Return levels / extent, correctly rounded, for extents from 2**-100 to the largest float."""
    bits = lax.bitcast_convert_type(extent, jnp.int32)
    divisor = (bits & 0x7FFFFF) | 0x800000
    align = 24 - levels.bit_length()
    rest, quotient = jnp.full_like(bits, levels << align), jnp.zeros_like(bits)
    for _ in range(26):
        fits = rest >= divisor
        quotient = (quotient << 1) + jnp.where(fits, 1, 0)
        rest = (rest - jnp.where(fits, divisor, 0)) << 1
    # 25 or 26 bits, of which float32 keeps 24. What the division left counts as more than half.
    drop = jnp.where(quotient >= 1 << 25, 2, 1)
    kept = lax.shift_right_logical(quotient, drop)
    tail = 2 * (quotient - (kept << drop)) + jnp.where(rest > 0, 1, 0)
    half = 1 << drop
    up = (tail > half) | ((tail == half) & ((kept & 1) == 1))
    kept = kept + jnp.where(up, 1, 0)
    exponent = drop + (275 - align) - lax.shift_right_logical(bits, 23)
    return lax.bitcast_convert_type((exponent << 23) + kept - 0x800000, jnp.float32)


def _through_four_bits(
    magnitude: jax.Array,  # [rows, chunk], int32: magnitudes, or the values if asymmetric
    same_group: jax.Array,  # [128, 128], bfloat16
    asymmetric: bool,
    *,
    bits: int,
    group_size: int,
    step: str,
    rounding: str,
) -> jax.Array:
    """Return what stage 2 and its decoding make of magnitudes, int32; see `codec.encode`."""
    if bits == 8:
        return magnitude
    code_bits = 4 if asymmetric else 3
    top = (1 << code_bits) - 1
    if step == "integer":
        # (2 m + 7) // 15 by multiplication, exact in this range.
        level = jnp.clip(lax.shift_right_logical((2 * magnitude + 7) * 4370, 16), 1, codec.MAX_STEP)
    else:
        level = 33 - code_bits - lax.clz(magnitude | top)
    level = _largest_of_group(level, same_group)
    if step == "integer":
        # Multiples of 1/64 away from an integer, so that an approximate reciprocal will do.
        ratio = (2 * magnitude + level).astype(jnp.float32) + 0.5
        ratio = ratio * compat.tpu_reciprocal((2 * level).astype(jnp.float32))
        return jnp.minimum(ratio.astype(jnp.int32), top) * level
    shift = level - 1
    half = 0 if rounding == "truncate" else (1 << shift) >> 1
    return jnp.minimum(lax.shift_right_logical(magnitude + half, shift), top) << shift


def _largest_of_group(level: jax.Array, same_group: jax.Array) -> jax.Array:
    """Return the largest level, 1..16, of each element's group."""
    powers = lax.bitcast_convert_type(level << 26, jnp.float32).astype(jnp.bfloat16)
    parts = [powers[:, i : i + _LANES] for i in range(0, level.shape[1], _LANES)]
    sums = [jnp.dot(part, same_group, preferred_element_type=jnp.float32) for part in parts]
    return lax.shift_right_logical(
        lax.bitcast_convert_type(jnp.concatenate(sums, axis=1), jnp.int32), 26
    )


def _same_group(group_size: int) -> jax.Array:
    """Return a [128, 128] matrix with 1 where row and column belong to one group."""
    group = jnp.arange(_LANES) // group_size
    return (group[:, None] == group).astype(jnp.bfloat16)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(max(min(number, limit), 1), 0, -1) if number % d == 0)
