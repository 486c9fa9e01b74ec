"""Activations to decoded 8-bit operands on GPUs: a row a program, read once and kept in registers.

The same bits as `pallas_kernels.codec`: where a compiler could contract or approximate a float
operation, the PTX instruction with IEEE rounding is named. Rounding to an integer is the addition
of 2**23, which leaves it in the low bits of the mantissa. Stage 2 works on those bits as they are,
below the exponent; what is stored are the lowest ones.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import codec, device
from pallas_kernels.functions import SQRT_2_PI, Norm, Part, join, plain_why_not
from pallas_kernels.quantize import channels

MAX_K = 32768  # elements of a row that registers hold
ELEMENTS = 8  # of a thread in each part of a row: 16 bytes of bfloat16
_ALIGNED = 64  # columns: whole groups of any size
_INFINITY_BITS = 0x7F800000
_ROUNDED = 0x4B000000  # the bits of 2**23, below which an integer is found
_GELU_LINEAR = -2 * math.log2(math.e) * SQRT_2_PI
_GELU_CUBIC = _GELU_LINEAR * 0.044715
_ROUND = "add.rn.f32 t, t, 0f4B000000; mov.b32 $0, t;"  # the magnitude in the lowest bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """A power of two of elements of a row, which a thread block handles at once."""

    array: int  # where they are
    column: int  # of that array, the first of them
    start: int  # of the row
    size: int
    activation: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the kernel needs to know besides its arrays."""

    k: int  # elements of a row; the spans may hold more
    spans: tuple[_Span, ...]
    bits: int  # 4 or 8
    group_size: int
    signed: bool  # range is "absmax"
    step: str
    levels: str
    rounding: str
    rotation: int | None  # channels of a block
    packed: bool  # codes and shifts are written, else decoded values
    interpret: bool


def quantize(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
    *,
    norm: Norm | None = None,  # of [k]
    multiplier: jax.Array | None = None,  # [k]
    rotation: int | None = None,  # channels of a block
    wide: tuple[bool, ...] | None = None,  # [groups]
    **options,  # of `_quantize`
) -> tuple[jax.Array | None, ...]:
    """Quantize each row; see `reference.quantize`."""
    parts = x if isinstance(x, tuple) else (Part(array=x, start=0, size=x.shape[1]),)
    # Columns that are no whole groups, or start where no wide load can, are copied first; so are
    # products of columns.
    whole = max(_ALIGNED, rotation or 0)
    if any(part.start % _ALIGNED or part.size % whole or not part.plain for part in parts):
        joined = join(parts)
        parts = (Part(array=joined, start=0, size=joined.shape[1]),)
    arrays = tuple(part.array for part in parts)
    columns = tuple((part.start, part.size, part.activation) for part in parts)
    # An operand, so that layers with masks of their own share a program.
    mask = None if wide is None else jnp.asarray(wide, jnp.int8)
    return _quantize(arrays, norm, multiplier, mask, columns=columns, rotation=rotation, **options)


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(
    jax.jit,
    static_argnames=(
        "columns",
        "bits",
        "group_size",
        "range",
        "step",
        "levels",
        "rounding",
        "rotation",
        "packed",
        "interpret",
    ),
)
def _quantize(
    arrays: tuple[jax.Array, ...],  # [m, wide], floating
    norm: Norm | None,
    multiplier: jax.Array | None,  # [k]
    mask: jax.Array | None,  # [groups], int8: 1 where 8 bits stay
    *,
    columns: tuple[tuple[int, int, str | None], ...],  # of each array: start, size, activation
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    levels: str = "uniform",
    rotation: int | None = None,
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array | None, ...]:
    m, k = arrays[0].shape[0], sum(size for _, size, _ in columns)
    # The first elements again change no extreme of the row; those are whole blocks of a rotation.
    missing = -k % max(group_size, 16)
    if missing:
        arrays = (jnp.pad(arrays[0], [(0, 0), (0, missing)], mode="wrap"),)
        columns = ((0, k + missing, columns[0][2]),)
        vectors = norm, multiplier
        norm, multiplier = jax.tree.map(lambda v: jnp.pad(v, (0, missing), mode="wrap"), vectors)
    width = k + missing
    warps = 4 if width <= 4096 else 8
    plan = _Plan(
        k=k,
        spans=_spans(columns, ELEMENTS * 32 * warps),
        bits=bits,
        group_size=group_size,
        signed=range == "absmax",
        step=step,
        levels=levels,
        rounding=rounding,
        rotation=rotation,
        packed=packed,
        interpret=interpret,
    )
    row = jax.ShapeDtypeStruct((m,), jnp.float32)
    if packed:
        stored = [
            jax.ShapeDtypeStruct((m, n), jnp.uint8) for n in (width // 2, width // group_size)
        ]
    else:
        stored = [jax.ShapeDtypeStruct((m, width), jnp.int8)]
    stored, scale, lo = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=(stored, row, row),
        grid=(m,),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="quantize",
    )(arrays, norm, multiplier, mask)
    scale, lo = scale[:, None], None if plan.signed else lo[:, None]
    if not packed:
        return stored[0][:, :k], scale, lo
    groups = -(-k // group_size)
    return stored[0][:, : groups * group_size // 2], codec.pack(stored[1][:, :groups]), scale, lo


def why_not(
    target: device.Device,
    x: jax.Array | tuple[Part, ...],
    norm: Norm | None = None,
    **kwargs,
) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if reason := device.triton_why_not(target) or plain_why_not(norm):
        return reason
    if isinstance(x, tuple):
        rows, k = x[0].array.shape[0], sum(part.size for part in x)
    else:
        rows, k = x.shape
    if not 0 < k <= MAX_K:
        return f"needs 1 to {MAX_K} elements a row, not {k}"
    if rows * k > device.TRITON_MAX_BYTES:
        return f"takes up to 2**31 - 1 elements, not {rows} rows of {k}"
    return None if rows else "needs at least one row"


def _kernel(x_refs, norm, multiplier_ref, mask_ref, out_refs, scale_ref, lo_ref, *, plan: _Plan):
    row = pl.program_id(0)
    parts = [_load(x_refs[span.array], row, span, plan.interpret) for span in plan.spans]
    if norm is not None:
        parts = _modulate(parts, norm, plan, x_refs[0].dtype)
    if multiplier_ref is not None:
        pairs = zip(plan.spans, parts, strict=True)
        parts = [_scale_channels(part, multiplier_ref, span, plan) for span, part in pairs]
    if plan.rotation is not None:
        parts = [_rotate(part, plan.rotation) for part in parts]
        if not plan.signed:
            parts = [part * jnp.float32(channels.root(plan.rotation)) for part in parts]
    lo, multiplier = _scale_row(parts, row, scale_ref, lo_ref, plan)
    for span, part in zip(plan.spans, parts, strict=True):
        _store(part, span, row, lo, multiplier, mask_ref, out_refs, plan)


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
    if interpret:
        cubic = y * (y * y * jnp.float32(_GELU_CUBIC) + jnp.float32(_GELU_LINEAR))
        return y / (1 + jnp.exp2(cubic))  # -2 z log2(e)
    code = (
        "{ .reg .f32 t; mul.rn.f32 t, $1, $1; "
        f"fma.rn.f32 t, t, {_literal(_GELU_CUBIC)}, {_literal(_GELU_LINEAR)}; "
        "mul.rn.f32 t, t, $1; ex2.approx.ftz.f32 t, t; add.rn.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 t, t; mul.rn.f32 $0, t, $1; }"
    )
    return _assemble(code, "=f,f", [y], jnp.float32)


def _modulate(parts: list, norm: Norm, plan: _Plan, dtype) -> list:
    """Return layer_norm(x) * scale + shift, rounded to dtype; see `functions.modulate`."""

    def mean(values):
        pairs = zip(plan.spans, values, strict=True)
        inside = [_within(value, span, plan.k, 0.0) for span, value in pairs]
        return _reduce(jnp.add, jnp.sum, inside) * jnp.float32(1 / plan.k)

    center = mean(parts)
    parts = [part - center for part in parts]
    factor = lax.rsqrt(mean([part * part for part in parts]) + jnp.float32(norm.epsilon))
    vectors: tuple[Any, Any] = norm.shift, norm.scale  # in a kernel, refs
    modulated = []
    for span, part in zip(plan.spans, parts, strict=True):
        at = pl.ds(span.start, span.size)
        shift, scale = (plgpu.load(ref.at[at]).astype(jnp.float32) for ref in vectors)
        modulated.append((part * factor * scale + shift).astype(dtype).astype(jnp.float32))
    return modulated


def _scale_channels(part: jax.Array, multiplier_ref, span: _Span, plan: _Plan) -> jax.Array:
    """Return `channels.scale_channels` of a span."""
    multiplier = plgpu.load(multiplier_ref.at[pl.ds(span.start, span.size)])
    if plan.interpret:
        return channels.scale_channels(part, multiplier)
    arrays = [part, multiplier.astype(jnp.float32)]
    return _assemble("mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", arrays, jnp.float32)


def _rotate(x: jax.Array, size: int) -> jax.Array:
    """Return `channels.rotate` of whole blocks but for its factor `channels.root(size)`.

    That is a power of two: the row's multiplier takes it, which changes no integer.
    """
    distance = 1
    while distance < size:
        step = _step_in_thread if distance < ELEMENTS else _step_between_threads
        x = step(x, distance)
        distance *= 4
    return x


def _step_in_thread(x: jax.Array, distance: int) -> jax.Array:
    """Do a step of `channels.rotate`, where a thread holds both of a pair at this distance.

    Then the difference of a pair is computed and changes places with another's once.
    """
    pairs = _in_pairs(x, distance)
    other = _swap(pairs)
    low = lax.broadcasted_iota(jnp.int32, (1, *pairs.shape[1:]), 1) == 0
    difference = jnp.sum(jnp.where(low, _bits(pairs - other), 0), axis=1)
    shape = difference.shape
    difference = _swap(difference.reshape(-1, 2, *shape[1:]), bits=True).reshape(shape)
    difference = lax.bitcast_convert_type(difference, jnp.float32)[:, None]
    total = pairs + other
    return jnp.where(low, total + difference, total - difference).reshape(x.shape)


def _step_between_threads(x: jax.Array, distance: int) -> jax.Array:
    """Do a step of `channels.rotate`: the second of a pair has the difference negated."""
    other = _swap(_in_pairs(x, distance)).reshape(x.shape)
    return (x + other) + _swap(_in_pairs(x - other, 2 * distance)).reshape(x.shape)


def _in_pairs(x: jax.Array, distance: int) -> jax.Array:
    """Return elements with those at a distance along axis 1, [n, 2] or [n, 2, distance]."""
    return x.reshape(-1, 2) if distance == 1 else x.reshape(-1, 2, distance)


def _swap(pairs: jax.Array, *, bits: bool = False) -> jax.Array:
    """Return pairs with the two of axis 1 exchanged.

    The sum of both as integers less one of them is the other. Triton sums within a thread or by a
    shuffle of the warp, and the compiler sees that what is left is a move.
    """
    numbers = pairs if bits else _bits(pairs)
    other = jnp.sum(numbers, axis=1)[:, None] - numbers
    return other if bits else lax.bitcast_convert_type(other, jnp.float32)


def _scale_row(
    parts: list, row, scale_ref, lo_ref, plan: _Plan
) -> tuple[jax.Array | None, jax.Array]:
    """Write scale and lo of the row; return lo and its multiplier, 0 where no values are kept."""
    factor = jnp.float32(1)  # what the values still lack
    if plan.signed:
        lo, levels = None, 127
        if plan.rotation is not None:
            factor = jnp.float32(channels.root(plan.rotation))
        # As integers, magnitudes keep their order and NaN is the largest.
        pairwise = functools.partial(_larger_magnitude, interpret=plan.interpret)
        top = _reduce(pairwise, lambda part: jnp.max(_magnitude_bits(part)), parts, jnp.maximum)
        finite = top < _INFINITY_BITS
        extent = lax.bitcast_convert_type(top, jnp.float32) * factor
    else:
        flush = channels.without_subnormals
        lo, levels = flush(_reduce(jnp.minimum, jnp.min, parts)), 255
        extent = flush(_reduce(jnp.maximum, jnp.max, parts)) - lo
        # Zero times anything that isn't finite is NaN, and a sum keeps it.
        zero = _reduce(jnp.add, jnp.sum, [part * 0.0 for part in parts])
        finite = (zero == 0) & (_magnitude_bits(extent) < _INFINITY_BITS)
    tiny = extent < codec.TINY_RANGE
    live = finite & ~tiny
    multiplier = _divide(levels, jnp.where(live, extent, 1.0), plan.interpret) * factor
    scale = jnp.where(tiny, 0.0, extent * jnp.float32(1 / levels))
    plgpu.store(scale_ref.at[row], jnp.where(finite, scale, jnp.nan))
    if lo is not None:
        plgpu.store(lo_ref.at[row], jnp.where(finite, lo, jnp.nan))
    return lo, jnp.where(live, multiplier, 0.0)


def _store(part, span: _Span, row, lo, multiplier, mask_ref, out_refs, plan: _Plan) -> None:
    """Take a span through stage 1 and 2 and write it."""
    at = pl.ds(span.start, span.size)
    if plan.bits == 8:
        values = _round_product(part, lo, multiplier, plan.interpret, keep_sign=plan.signed)
        values = values if plan.signed else values ^ 128
        plgpu.store(out_refs[0].at[row, at], values.astype(jnp.int8))
        return
    rounded = _round_product(part, lo, multiplier, plan.interpret)
    rounded = _within(rounded, span, plan.k, _ROUNDED).reshape(-1, plan.group_size)
    decoded, shifts, codes = _encode(rounded, plan)
    groups = pl.ds(span.start // plan.group_size, len(shifts))
    if mask_ref is not None:
        keep = plgpu.load(mask_ref.at[groups]).astype(jnp.int32)[:, None] > 0
        decoded = jnp.where(keep, rounded, decoded)
    negative = _bits(part) >> 31 if plan.signed else 0
    if plan.packed:
        codes = (codes.reshape(part.shape) ^ negative) - negative
        half = pl.ds(span.start // 2, span.size // 2)
        plgpu.store(out_refs[0].at[row, half], _pack(codes))
        plgpu.store(out_refs[1].at[row, groups], shifts.reshape(-1).astype(jnp.uint8))
    else:
        decoded = decoded.reshape(part.shape)
        values = (decoded ^ negative) - negative if plan.signed else decoded ^ 128
        plgpu.store(out_refs[0].at[row, at], values.astype(jnp.int8))


def _within(values: jax.Array, span: _Span, k: int, otherwise: float) -> jax.Array:
    """Return the values of a span with another past k, where there are copies of the first."""
    if span.start + span.size <= k:
        return values
    inside = span.start + lax.iota(jnp.int32, span.size) < k
    return jnp.where(inside, values, jnp.full_like(values, otherwise))


def _encode(
    rounded: jax.Array,  # [groups, group_size], int32: `_ROUNDED` plus 0..127, or 0..255
    plan: _Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return decoded magnitudes, stored shifts [groups, 1] and codes; see `codec.encode`.

    Magnitudes are right in their lowest eight bits, codes in the lowest four.
    """
    peak = jnp.max(rounded, axis=1)[:, None] - _ROUNDED
    if plan.step == "integer":
        return _encode_integer_step(rounded, peak, plan)
    limit = codec.NIBBLE_MAX if plan.signed else codec.UNSIGNED_NIBBLE_MAX
    doublings = ((peak >= (limit + 1) << i).astype(jnp.int32) for i in range(4))
    shift = sum(doublings, jnp.int32(0))
    half = (1 << shift) >> 1 if plan.rounding == "nearest" else jnp.zeros_like(shift)
    decoded = jnp.minimum((rounded + half) & -(1 << shift), _ROUNDED + (limit << shift))
    return decoded, shift, (decoded & 255) >> shift


def _encode_integer_step(
    rounded: jax.Array, peak: jax.Array, plan: _Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Do what `_encode` does for integer steps."""
    if plan.levels == "uniform":
        p = jnp.clip((2 * peak + 7) // 15, 1, codec.MAX_STEP)
        code = jnp.minimum(_nearest_multiple(rounded, p, plan), _ROUNDED + codec.NIBBLE_MAX)
        return code * p, p - 1, code
    p = jnp.clip((4 * peak + 18) // 37, 1, codec.MAX_STRETCHED_STEP)
    code = jnp.minimum(_nearest_multiple(rounded, p, plan), _ROUNDED + codec.STRETCH_FROM)
    seven, nine = rounded >= 6 * p + _ROUNDED, rounded >= 8 * p + _ROUNDED
    decoded = jnp.where(nine, 9 * p, jnp.where(seven, 7 * p, code * p))
    return decoded, p - 1, jnp.where(nine, 7, jnp.where(seven, 6, code))


def _nearest_multiple(rounded: jax.Array, p: jax.Array, plan: _Plan) -> jax.Array:
    """Return magnitudes over the steps [groups, 1], halves rounded up, plus `_ROUNDED`.

    (m + 1/4) / p is never nearer than 1/64 to a half: an approximate reciprocal will do, and
    whether product and sum are contracted doesn't matter.
    """
    reciprocal = 1.0 / p.astype(jnp.float32)
    if plan.interpret:
        magnitude = lax.bitcast_convert_type(rounded, jnp.float32) - 2.0**23
        return _bits(magnitude * reciprocal + reciprocal * 0.25 + 2.0**23)
    code = (
        "{ .reg .f32 t; mov.b32 t, $1; sub.rn.f32 t, t, 0f4B000000; fma.rn.f32 t, t, $2, $3; "
        + _ROUND
        + " }"
    )
    factors = [jnp.broadcast_to(x, rounded.shape) for x in (reciprocal, reciprocal * 0.25)]
    return _assemble(code, "=r,r,f,f", [rounded, *factors], jnp.int32)


def _pack(codes: jax.Array) -> jax.Array:
    """Return two codes a byte, the even one in the low nibble, uint8."""
    nibbles = (codes & 15).reshape(-1, 2) << (4 * lax.broadcasted_iota(jnp.int32, (1, 2), 1))
    return jnp.sum(nibbles, axis=1).astype(jnp.uint8)


def _spans(columns: tuple[tuple[int, int, str | None], ...], largest: int) -> tuple[_Span, ...]:
    """Cut a row into spans whose lengths are powers of two, as Triton wants them."""
    spans, start = [], 0
    for array, (column, rest, activation) in enumerate(columns):
        while rest:
            size = min(largest, 1 << (rest.bit_length() - 1))
            place = {"array": array, "column": column, "start": start, "size": size}
            spans.append(_Span(activation=activation, **place))
            column, start, rest = column + size, start + size, rest - size
    return tuple(spans)


def _reduce(pairwise, total, parts: list[jax.Array], of_totals=None) -> jax.Array:
    """Reduce the parts to one number; those of the same length first to one part."""
    by_length: dict[tuple[int, ...], jax.Array] = {}
    for part in parts:
        known = by_length.get(part.shape)
        by_length[part.shape] = part if known is None else pairwise(known, part)
    return functools.reduce(of_totals or pairwise, [total(part) for part in by_length.values()])


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _magnitude_bits(x: jax.Array) -> jax.Array:
    return _bits(x) & 0x7FFFFFFF


def _larger_magnitude(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """Return max(|x|, |y|), or a NaN where one of them is."""
    if interpret:
        return lax.max(jnp.abs(x), jnp.abs(y))
    code = "{ .reg .f32 t, u; abs.f32 t, $1; abs.f32 u, $2; max.NaN.f32 $0, t, u; }"
    return _assemble(code, "=f,f,f", [x, y], jnp.float32)


def _literal(number: float) -> str:
    """Return a float32 as PTX has it."""
    return f"0f{np.float32(number).view(np.uint32):08X}"


def _divide(levels: int, extent: jax.Array, interpret: bool) -> jax.Array:
    """Divide scalars with IEEE rounding; Triton's own division is approximate."""
    if interpret:
        return levels / extent
    extent = jnp.broadcast_to(extent, (1,))  # assembly takes arrays only
    return _assemble(f"div.rn.f32 $0, {_literal(levels)}, $1;", "=f,f", [extent], jnp.float32)


def _round_product(
    x: jax.Array,
    lo: jax.Array | None,
    multiplier: jax.Array,
    interpret: bool,
    *,
    keep_sign: bool = False,
) -> jax.Array:
    """Return round_half_even(|x| * multiplier), or of x - lo, in the lowest eight bits of int32.

    Each operation is rounded by itself; x counts as zero where it is subnormal and lo is given.
    Of an x whose sign is kept they are two's complement; else what is above them is `_ROUNDED`.
    """
    base = 1.5 * 2.0**23 if keep_sign else 2.0**23
    if interpret:
        wide = x if keep_sign else jnp.abs(x)
        wide = wide if lo is None else channels.without_subnormals(x) - lo
        return _bits(jnp.round(wide * multiplier) + base)
    multiplier = jnp.broadcast_to(multiplier, x.shape)
    if keep_sign:
        code = f"{{ .reg .f32 t; mul.rn.f32 t, $1, $2; add.rn.f32 t, t, {_literal(base)}; "
        return _assemble(code + "mov.b32 $0, t; }", "=r,f,f", [x, multiplier], jnp.int32)
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
