"""Activations to decoded 8-bit operands on GPUs: a row a program, read once and kept in registers.

The same bits as `pallas_kernels.codec`: where a compiler could contract or approximate a float
operation, the PTX instruction with IEEE rounding is named. Rounding to an integer is the addition
of 2**23, which leaves it in the low bits of the mantissa.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import codec, device
from pallas_kernels.functions import NORM_EPSILON, SQRT_2_PI, Part, join

MAX_K = 32768  # elements of a row that registers hold
ELEMENTS = 8  # of a thread in each part of a row: 16 bytes of bfloat16
_ALIGNED = 64  # columns: whole groups of any size
_INFINITY_BITS = 0x7F800000
_SMALLEST_NORMAL = 2.0**-126
_GELU_LINEAR = -2 * math.log2(math.e) * SQRT_2_PI
_GELU_CUBIC = _GELU_LINEAR * 0.044715
_ROUND = "add.rn.f32 t, t, 0f4B000000; mov.b32 $0, t;"  # the magnitude in the lowest bits


def quantize(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
    *,
    norm: tuple[jax.Array, jax.Array] | None = None,  # shift [k], scale [k]
    **options,  # of `_quantize`
) -> tuple[jax.Array | None, ...]:
    """Quantize each row; see `pallas_kernels.quantize.quantize`."""
    parts = x if isinstance(x, tuple) else (Part(array=x, start=0, size=x.shape[1]),)
    # Columns that are no whole groups, or start where no wide load can, are copied first.
    if any(part.start % _ALIGNED or part.size % _ALIGNED for part in parts):
        joined = join(parts)
        parts = (Part(array=joined, start=0, size=joined.shape[1]),)
    arrays = tuple(part.array for part in parts)
    columns = tuple((part.start, part.size, part.activation) for part in parts)
    return _quantize(arrays, norm, columns=columns, **options)


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(
    jax.jit,
    static_argnames=(
        "columns",
        "bits",
        "group_size",
        "range",
        "step",
        "rounding",
        "packed",
        "interpret",
    ),
)
def _quantize(
    arrays: tuple[jax.Array, ...],  # [m, wide], floating
    norm: tuple[jax.Array, jax.Array] | None,
    *,
    columns: tuple[tuple[int, int, str | None], ...],  # of each array: start, size, activation
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array | None, ...]:
    m, k = arrays[0].shape[0], sum(size for _, size, _ in columns)
    signed = range == "absmax"
    # The last element again changes neither extreme of the row, nor of its group.
    missing = -k % max(group_size, 16)
    if missing:
        arrays = (jnp.pad(arrays[0], [(0, 0), (0, missing)], mode="edge"),)
        columns = ((0, k + missing, columns[0][2]),)
    width = k + missing
    warps = 4 if width <= 4096 else 8
    spans = _spans(columns, ELEMENTS * 32 * warps)
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
    norm = None if norm is None else tuple(jnp.pad(v, (0, missing), mode="edge") for v in norm)
    wide, scale, lo = pl.pallas_call(
        kernel,
        out_shape=(wide, row, row),
        grid=(m,),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="quantize",
    )(arrays, norm)
    scale, lo = scale[:, None], None if signed else lo[:, None]
    if not packed:
        return wide[0][:, :k], scale, lo
    groups = -(-k // group_size)
    return wide[0][:, : groups * group_size // 2], codec.pack(wide[1][:, :groups]), scale, lo


def why_not(target: device.Device, x: jax.Array | tuple[Part, ...], **kwargs) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if reason := device.triton_why_not(target):
        return reason
    parts = isinstance(x, tuple)
    rows, k = (x[0].array.shape[0], sum(p.size for p in x)) if parts else x.shape
    if not 0 < k <= MAX_K:
        return f"needs 1 to {MAX_K} elements a row, not {k}"
    if rows * k > device.TRITON_MAX_BYTES:
        return f"takes up to 2**31 - 1 elements, not {rows} rows of {k}"
    return None if rows else "needs at least one row"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """A power of two of elements of a row, which a thread block handles at once."""

    array: int  # where they are
    column: int  # of that array, the first of them
    start: int  # of the row
    size: int
    activation: str | None


def _kernel(
    x_refs,
    norm,
    wide_refs,
    scale_ref,
    lo_ref,
    *,
    k,
    spans,
    encode,
    group_size,
    signed,
    packed,
    interpret,
):
    row = pl.program_id(0)
    parts = [_load(x_refs[span.array], row, span, interpret) for span in spans]
    if norm is not None:
        parts = _modulate(parts, spans, norm, k, x_refs[0].dtype)
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
        start, size = span.start, span.size
        if packed:
            codes = (codes.reshape(part.shape) ^ negative) - negative
            half, group = pl.ds(start // 2, size // 2), pl.ds(start // group_size, len(shifts))
            plgpu.store(wide_refs[0].at[row, half], _pack(codes))
            plgpu.store(wide_refs[1].at[row, group], shifts.reshape(-1).astype(jnp.uint8))
        else:
            values = (magnitude ^ negative) - negative if signed else magnitude ^ 128
            plgpu.store(wide_refs[0].at[row, pl.ds(start, size)], values.astype(jnp.int8))


def _load(x_ref, row, span: _Span, interpret: bool) -> jax.Array:
    """Return float32 elements, through the activation and rounded to their dtype."""
    x = plgpu.load(x_ref.at[row, pl.ds(span.column, span.size)])
    wide = x.astype(jnp.float32)
    if span.activation is None:
        return wide
    return _gelu(wide, interpret).astype(x.dtype).astype(jnp.float32)


def _gelu(y: jax.Array, interpret: bool) -> jax.Array:
    """Return `functions.gelu(y)`, y / (1 + exp(-2 z)), from two approximate instructions.

    Each is within a few units in the last place (PTX ISA: ex2.approx 2**-22, rcp.approx 2**-23);
    with the accurate exponential and quotient, arithmetic takes longer than memory does.
    """
    cubic = y * (y * y * jnp.float32(_GELU_CUBIC) + jnp.float32(_GELU_LINEAR))  # -2 z log2(e)
    if interpret:
        return y / (1 + jnp.exp2(cubic))
    code = "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.rn.f32 t, t, 0f3F800000; "
    return y * _assemble(code + "rcp.approx.ftz.f32 $0, t; }", "=f,f", [cubic], jnp.float32)


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
        at = pl.ds(span.start, span.size)
        shift, scale = (plgpu.load(ref.at[at]).astype(jnp.float32) for ref in norm)
        modulated.append((part * factor * (1 + scale) + shift).astype(dtype).astype(jnp.float32))
    return modulated


def _within(values: jax.Array, span: _Span, k: int) -> jax.Array:
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


def _spans(columns: tuple[tuple[int, int, str | None], ...], largest: int) -> list[_Span]:
    """Cut a row into spans whose lengths are powers of two, as Triton wants them."""
    spans, start = [], 0
    for array, (column, rest, activation) in enumerate(columns):
        while rest:
            size = min(largest, 1 << (rest.bit_length() - 1))
            place = {"array": array, "column": column, "start": start, "size": size}
            spans.append(_Span(activation=activation, **place))
            column, start, rest = column + size, start + size, rest - size
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
