"""Activations to decoded 8-bit operands on GPUs: a row a program, read once and kept in registers.

The same bits as `pallas_kernels.codec`: where a compiler could contract or approximate a float
operation, the PTX instruction with IEEE rounding is named. Rounding to an integer is the addition
of 2**23, which leaves it in the low bits of the mantissa.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import codec, device
from pallas_kernels.quantize.reference import NORM_EPSILON

MAX_K = 32768  # elements of a row that registers hold
ELEMENTS = 8  # of a thread in each part of a row: 16 bytes of bfloat16
_INFINITY_BITS = 0x7F800000
_SMALLEST_NORMAL = 2.0**-126
_ROUND = "add.rn.f32 t, t, 0f4B000000; mov.b32 $0, t;"  # the magnitude in the lowest bits


def quantize(
    x: jax.Array,  # [m, k], floating
    *,
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    norm: tuple[jax.Array, jax.Array] | None = None,  # shift [k], scale [k]
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array | None, ...]:
    """Quantize each row; see `pallas_kernels.quantize.quantize`."""
    m, k = x.shape
    signed = range == "absmax"
    # The last element again changes neither extreme of the row, nor of its group.
    missing = -k % max(group_size, 16)
    x = jnp.pad(x, [(0, 0), (0, missing)], mode="edge") if missing else x
    width = x.shape[1]
    warps = 4 if width <= 4096 else 8
    spans = _spans(width, ELEMENTS * 32 * warps)
    config = {"step": step, "rounding": rounding, "signed": signed}
    kernel = functools.partial(
        _kernel,
        k=k,
        spans=spans,
        encode=functools.partial(_encode, **config) if bits == 4 else None,
        group_size=group_size,
        signed=signed,
        packed=packed,
        interpret=interpret,
    )
    row = jax.ShapeDtypeStruct((m,), jnp.float32)
    if packed:
        groups = width // group_size
        wide = [jax.ShapeDtypeStruct((m, size), jnp.uint8) for size in (width // 2, groups)]
    else:
        wide = [jax.ShapeDtypeStruct((m, width), jnp.int8)]
    norm = () if norm is None else [jnp.pad(v, (0, missing), mode="edge") for v in norm]
    *wide, scale, lo = pl.pallas_call(
        kernel,
        out_shape=(*wide, row, row),
        grid=(m,),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="quantize",
    )(x, *norm)
    scale, lo = scale[:, None], None if signed else lo[:, None]
    if not packed:
        return wide[0][:, :k], scale, lo
    codes = wide[0][:, : -(-k // group_size) * group_size // 2]
    return codes, codec.pack(wide[1][:, : -(-k // group_size)]), scale, lo


def why_not(target: device.Device, x: jax.Array, **kwargs) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if target.platform != "gpu":
        return f"needs a GPU, not {target.platform}"
    if not 0 < x.shape[1] <= MAX_K:
        return f"needs 1 to {MAX_K} elements a row, not {x.shape[1]}"
    return None if x.shape[0] else "needs at least one row"


def _kernel(x_ref, *refs, k, spans, encode, group_size, signed, packed, interpret):
    norm, (*wide_refs, scale_ref, lo_ref) = refs[: len(refs) - 3 - packed], refs[-3 - packed :]
    row = pl.program_id(0)
    parts = [plgpu.load(x_ref.at[row, span]).astype(jnp.float32) for span in spans]
    if norm:
        parts = _modulate(parts, spans, norm, k, x_ref.dtype)
    if signed:
        lo, levels = None, 127
        # As integers, magnitudes keep their order and NaN is the largest.
        top = _reduce(jnp.maximum, jnp.max, [_magnitude_bits(part) for part in parts])
        extent, finite = lax.bitcast_convert_type(top, jnp.float32), top < _INFINITY_BITS
    else:
        lo, levels = _flush(_reduce(jnp.minimum, jnp.min, parts)), 255
        extent = _flush(_reduce(jnp.maximum, jnp.max, parts)) - lo
        # Zero times anything that isn't finite is NaN, and a sum keeps it.
        zero = _reduce(jnp.add, jnp.sum, [part * 0.0 for part in parts])
        finite = (zero == 0) & (_magnitude_bits(extent) < _INFINITY_BITS)
    tiny = extent < codec.TINY_RANGE
    live = finite & ~tiny
    multiplier = _divide(levels, jnp.where(live, extent, 1.0), interpret)
    scale = jnp.where(tiny, 0.0, extent * jnp.float32(1 / levels))
    plgpu.store(scale_ref.at[row], jnp.where(finite, scale, jnp.nan))
    if not signed:
        plgpu.store(lo_ref.at[row], jnp.where(finite, lo, jnp.nan))
    kept = -live.astype(jnp.int32)  # a mask of bits
    for span, part in zip(spans, parts, strict=True):
        magnitude = _round_product(part, lo, multiplier, interpret) & 255 & kept
        magnitude = _within(magnitude, span, k)
        negative = lax.bitcast_convert_type(part, jnp.int32) >> 31 if signed else 0
        if encode is not None:
            shape = (-1, group_size)
            magnitude, shifts, codes = encode(magnitude.reshape(shape))
            magnitude = magnitude.reshape(part.shape)
        if packed:
            start, size = span.start, span.size
            codes = (codes.reshape(part.shape) ^ negative) - negative
            half, group = pl.ds(start // 2, size // 2), pl.ds(start // group_size, len(shifts))
            plgpu.store(wide_refs[0].at[row, half], _pack(codes))
            plgpu.store(wide_refs[1].at[row, group], shifts.reshape(-1).astype(jnp.uint8))
        else:
            values = (magnitude ^ negative) - negative if signed else magnitude ^ 128
            plgpu.store(wide_refs[0].at[row, span], values.astype(jnp.int8))


def _modulate(parts: list, spans: list, norm, k: int, dtype) -> list:
    """Return layer_norm(x) * (1 + scale) + shift, rounded to dtype; see `reference.modulate`."""

    def mean(values):
        inside = [_within(value, span, k) for span, value in zip(spans, values, strict=True)]
        return _reduce(jnp.add, jnp.sum, inside) * jnp.float32(1 / k)

    center = mean(parts)
    parts = [part - center for part in parts]
    factor = lax.rsqrt(mean([part * part for part in parts]) + NORM_EPSILON)
    modulated = []
    for span, part in zip(spans, parts, strict=True):
        shift, scale = (plgpu.load(ref.at[span]).astype(jnp.float32) for ref in norm)
        modulated.append((part * factor * (1 + scale) + shift).astype(dtype).astype(jnp.float32))
    return modulated


def _within(values: jax.Array, span: pl.Slice, k: int) -> jax.Array:
    """Return the values of a span with zeros past k, where there are copies of the last one."""
    if span.start + span.size <= k:
        return values
    inside = span.start + lax.iota(jnp.int32, span.size) < k
    return jnp.where(inside, values, jnp.zeros_like(values))


def _encode(
    magnitude: jax.Array,  # [groups, group_size], int32, 0..127, or 0..255 if not signed
    *,
    step: str,
    rounding: str,
    signed: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return decoded magnitudes, stored shifts [groups, 1] and codes; see `codec.encode`."""
    peak = jnp.max(magnitude, axis=1)[:, None]
    limit = codec.NIBBLE_MAX if signed else codec.UNSIGNED_NIBBLE_MAX
    if step == "integer":
        p = jnp.clip((2 * peak + 7) // 15, 1, codec.MAX_STEP)
        # (2m + p + 1/2) / 2p is never nearer than 1/64 to an integer: an approximate quotient does.
        quotient = (2 * magnitude + p).astype(jnp.float32) + 0.5
        codes = (quotient * (0.5 / p.astype(jnp.float32))).astype(jnp.int32)
        codes = jnp.minimum(codes, limit)
        return codes * p, p - 1, codes
    shift = sum((peak >= (limit + 1) << i).astype(jnp.int32) for i in range(4))
    half = (1 << shift) >> 1 if rounding == "nearest" else jnp.zeros_like(shift)
    decoded = jnp.minimum((magnitude + half) & -(1 << shift), limit << shift)
    return decoded, shift, decoded >> shift


def _pack(codes: jax.Array) -> jax.Array:
    """Return two codes a byte, the even one in the low nibble, uint8."""
    nibbles = (codes & 15).reshape(-1, 2) << (4 * lax.broadcasted_iota(jnp.int32, (1, 2), 1))
    return jnp.sum(nibbles, axis=1).astype(jnp.uint8)


def _spans(k: int, largest: int) -> list:
    """Cut a row into parts whose lengths are powers of two, as Triton wants them."""
    spans, start = [], 0
    while start < k:
        size = min(largest, 1 << ((k - start).bit_length() - 1))
        spans.append(pl.ds(start, size))
        start += size
    return spans


def _reduce(pairwise, total, parts: list[jax.Array]) -> jax.Array:
    """Reduce the parts to one number; those of the same length first to one part."""
    by_length = {}
    for part in parts:
        known = by_length.get(part.shape)
        by_length[part.shape] = part if known is None else pairwise(known, part)
    return functools.reduce(pairwise, [total(part) for part in by_length.values()])


def _magnitude_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def _flush(x: jax.Array) -> jax.Array:
    """Return zero in place of a subnormal: the format counts those as zero."""
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, 0.0, x)


def _divide(levels: int, extent: jax.Array, interpret: bool) -> jax.Array:
    """Divide scalars with IEEE rounding; Triton's own division is approximate."""
    if interpret:
        return levels / extent
    numerator = f"0f{np.float32(levels).view(np.uint32):08X}"
    extent = jnp.broadcast_to(extent, (1,))  # assembly takes arrays only
    return _assemble(f"div.rn.f32 $0, {numerator}, $1;", "=f,f", [extent], jnp.float32)


def _round_product(x: jax.Array, lo: jax.Array | None, multiplier: jax.Array, interpret: bool):
    """Return round_half_even(|x| * multiplier), or of x - lo, in the lowest eight bits of int32.

    Each operation is rounded by itself; x counts as zero where it is subnormal and lo is given.
    """
    if interpret:
        wide = jnp.abs(x) if lo is None else _flush(x) - lo
        return lax.bitcast_convert_type(jnp.round(wide * multiplier) + 2.0**23, jnp.int32)
    multiplier = jnp.broadcast_to(multiplier, x.shape)
    if lo is None:
        code = "{ .reg .f32 t; abs.f32 t, $1; mul.rn.f32 t, t, $2; " + _ROUND + " }"
        return _assemble(code, "=r,f,f", [x, multiplier], jnp.int32)
    lo = jnp.broadcast_to(lo, x.shape)
    code = "{ .reg .f32 t; sub.rn.ftz.f32 t, $1, $2; mul.rn.f32 t, t, $3; " + _ROUND + " }"
    return _assemble(code, "=r,f,f,f", [x, lo, multiplier], jnp.int32)


def _assemble(code: str, constraints: str, args: list[jax.Array], dtype) -> jax.Array:
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plgpu.elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=1, result_shape_dtypes=(result,)
    )[0]
