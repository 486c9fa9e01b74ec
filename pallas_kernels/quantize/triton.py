"""Activations to decoded 8-bit operands on GPUs: a row a program, read once and kept in registers.

The same bits as `pallas_kernels.codec`: where a compiler could contract or approximate a float
operation, the PTX instruction with IEEE rounding is named. Rounding to an integer is the addition
of 2**23, which leaves it in the low bits of the mantissa. Stage 2 works on those bits as they are,
below the exponent; what is stored are the lowest ones.

A pass is bound by instructions before it is by memory, so what layers use most does several
elements in one: pairs of bfloat16 are widened and rounded together, and stage 2 of symmetric rows
works on four bytes of a word. Interpreted, the plain forms compute the same.
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
from pallas_kernels.functions import SQRT_2_PI, Norm, Part, join
from pallas_kernels.quantize import channels, reference

MAX_K = 32768  # elements of a row that registers hold
ELEMENTS = 8  # of a thread in each part of a row: 16 bytes of bfloat16
_ALIGNED = 64  # columns: whole groups of any size
_INFINITY_BITS = 0x7F800000
_ROUNDED = 0x4B000000  # the bits of 2**23, below which an integer is found
_GELU_LINEAR = -2 * math.log2(math.e) * SQRT_2_PI
_GELU_CUBIC = _GELU_LINEAR * 0.044715
_LOG2_E = math.log2(math.e)
_ROUND = "add.rn.f32 t, t, 0f4B000000; mov.b32 $0, t;"  # the magnitude in the lowest bits


# The bytes of w, 0 to 127, with the signs of the words $5 to $8, into $0: a permute copies a sign
# to a whole byte, and bytes are negated without borrowing from each other.
_SIGNED = (
    "prmt.b32 e, $5, $6, 0x00fb; prmt.b32 f, $7, $8, 0x00fb; prmt.b32 n, e, f, 0x5410; "
    "sub.u32 v, 0x80808080, w; xor.b32 v, v, 0x80808080; lop3.b32 $0, n, v, w, 0xca; }"
)
# start, size, activation and times of a part, and the channels of a block that is rotated
_Columns = tuple[int, int, str | None, int | None, int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """A power of two of elements of a row, which a thread block handles at once."""

    array: int  # where they are
    column: int  # of that array, the first of them
    start: int  # of the row
    size: int
    activation: str | None
    times: int | None  # of that array, the first column of those that multiply
    rotation: int | None  # channels of a block

    def lacking(self, plan: "_Plan") -> float:
        """Return what values behind the rotation are still to be multiplied by.

        That is a power of two: the row's multiplier takes it, which changes no integer.
        """
        return 1.0 if self.rotation is None or not plan.signed else channels.root(self.rotation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the kernel needs to know besides its arrays."""

    k: int  # elements of a row; the spans may hold more
    rows: int  # that share the vectors of a norm
    spans: tuple[_Span, ...]
    bits: int  # 4 or 8
    group_size: int
    signed: bool  # range is "absmax"
    step: str
    levels: str
    rounding: str
    packed: bool  # codes and shifts are written, else decoded values
    interpret: bool

    @property
    def in_bytes(self) -> bool:
        """Whether stage 2 takes four elements at once."""
        form = self.step == "power" or self.levels == "stretched"
        plain = self.signed and self.rounding == "nearest" and not self.packed
        return form and plain and not self.interpret


def quantize(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
    *,
    norm: Norm | None = None,  # of [k] or [images, k]
    multiplier: jax.Array | None = None,  # [k]
    rotation: int | None = None,  # channels of a block
    rotated_from: int = 0,  # first channel that is rotated
    wide: jax.Array | None = None,  # bool [groups]
    **options,  # of `_quantize`
) -> tuple[jax.Array | None, ...]:
    """Quantize each row; see `reference.quantize`."""
    parts = _as_parts(x)
    # Columns that are no whole groups, or start where no wide load can, are copied first.
    whole = max(_ALIGNED, rotation or 0)
    starts = {start for part in parts for start in (part.start, part.times or 0)}
    odd = any(start % _ALIGNED for start in starts) or any(part.size % whole for part in parts)
    if rotated_from and (odd or rotated_from % whole):
        rotated: dict[str, Any] = {"rotation": rotation, "rotated_from": rotated_from}
        parts = _as_parts(reference.before(x, norm, multiplier, **rotated))
        norm = multiplier = rotation = None
    elif odd:
        parts = _as_parts(join(parts))
    arrays, columns = _columns(parts, rotation, rotated_from)
    if norm is not None:
        images = norm.images
        norm = jax.tree.map(lambda v: jnp.broadcast_to(v, (images, v.shape[-1])), norm)
    mask = None if wide is None else jnp.asarray(wide, jnp.int8)
    return _quantize(arrays, norm, multiplier, mask, columns=columns, **options)


def _as_parts(x: jax.Array | tuple[Part, ...]) -> tuple[Part, ...]:
    return x if isinstance(x, tuple) else (Part(array=x, start=0, size=x.shape[1]),)


def _columns(
    parts: tuple[Part, ...], rotation: int | None, first: int
) -> tuple[tuple[jax.Array, ...], tuple[_Columns, ...]]:
    """Return arrays and columns of parts; one that the first rotated channel lies in is cut."""
    arrays, columns, at = [], [], 0
    for part in parts:
        before = min(max(first - at, 0), part.size) if rotation else 0
        for skipped, size, turned in ((0, before, None), (before, part.size - before, rotation)):
            if size:
                times = None if part.times is None else part.times + skipped
                columns.append((part.start + skipped, size, part.activation, times, turned))
                arrays.append(part.array)
        at += part.size
    return tuple(arrays), tuple(columns)


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
        "packed",
        "interpret",
    ),
)
def _quantize(
    arrays: tuple[jax.Array, ...],  # [m, wide], floating
    norm: Norm | None,  # of [images, k]
    multiplier: jax.Array | None,  # [k]
    mask: jax.Array | None,  # [groups], int8: 1 where 8 bits stay
    *,
    columns: tuple[_Columns, ...],  # of each array
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    levels: str = "uniform",
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array | None, ...]:
    m, k = arrays[0].shape[0], sum(size for _, size, *_ in columns)
    # The first elements again change no extreme of the row; those are whole blocks of a rotation.
    missing = -k % max(group_size, 16)
    if missing:
        arrays = (jnp.pad(arrays[0], [(0, 0), (0, missing)], mode="wrap"),)
        columns = ((0, k + missing, None, None, columns[0][-1]),)
        norm, multiplier = jax.tree.map(
            lambda v: jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, missing)], mode="wrap"),
            (norm, multiplier),
        )
    width = k + missing
    warps = 4 if width <= 4096 else 8
    plan = _Plan(
        k=k,
        rows=m if norm is None else m // norm.images,
        spans=_spans(columns, ELEMENTS * 32 * warps),
        bits=bits,
        group_size=group_size,
        signed=range == "absmax",
        step=step,
        levels=levels,
        rounding=rounding,
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


def why_not(target: device.Device, x: jax.Array | tuple[Part, ...], **kwargs) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if reason := device.triton_why_not(target):
        return reason
    arrays = [part.array for part in x] if isinstance(x, tuple) else [x]
    rows, k = arrays[0].shape[0], sum(p.size for p in x) if isinstance(x, tuple) else x.shape[1]
    if not 0 < k <= MAX_K:
        return f"needs 1 to {MAX_K} elements a row, not {k}"
    if rows * max(k, *(array.shape[1] for array in arrays)) > device.TRITON_MAX_BYTES:
        return f"takes up to 2**31 - 1 elements, not {rows} rows of {k}"
    return None if rows else "needs at least one row"


def _kernel(x_refs, norm, multiplier_ref, mask_ref, out_refs, scale_ref, lo_ref, *, plan: _Plan):
    row = pl.program_id(0)
    parts = [_load(x_refs[span.array], row, span, plan.interpret) for span in plan.spans]
    if norm is not None:
        parts = _modulate(parts, norm, row, plan, x_refs[0].dtype)
    if multiplier_ref is not None:
        pairs = zip(plan.spans, parts, strict=True)
        parts = [_scale_channels(part, multiplier_ref, span, plan) for span, part in pairs]
    parts = [_rotate(part, span, plan) for span, part in zip(plan.spans, parts, strict=True)]
    lo, multiplier = _scale_row(parts, row, scale_ref, lo_ref, plan)
    for span, part in zip(plan.spans, parts, strict=True):
        _store(part, span, row, lo, multiplier * span.lacking(plan), mask_ref, out_refs, plan)


def _load(x_ref, row, span: _Span, interpret: bool) -> jax.Array:
    """Return float32 elements, through activation and product and rounded to their dtype."""

    def load(column):
        x = plgpu.load(x_ref.at[row, pl.ds(column, span.size)])
        return _widen(x, interpret)

    y = load(span.column)
    if span.activation is None and span.times is None:
        return y
    if span.activation is not None:
        y = {"gelu": _gelu, "silu": _silu}[span.activation](y, interpret)
    y = y if span.times is None else y * load(span.times)
    return _round_to(y, x_ref.dtype, interpret)


def _widen(x: jax.Array, interpret: bool) -> jax.Array:
    """Return float32, two elements of bfloat16 at once."""
    if interpret or x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    code = "{ .reg .b32 t; mov.b32 t, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }"
    bits = _assemble(code, "=r,=r,r", [x], jnp.int32, pack=2)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _round_to(y: jax.Array, dtype, interpret: bool) -> jax.Array:
    """Return float32 with the precision of a dtype, two elements of bfloat16 at once."""
    if interpret or dtype != jnp.bfloat16:
        return y.astype(dtype).astype(jnp.float32)
    pairs = _assemble("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [y], jnp.bfloat16, pack=2)
    return _widen(pairs, interpret)


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


def _silu(y: jax.Array, interpret: bool) -> jax.Array:
    """Return `functions.silu(y)` by the instructions of `_gelu`."""
    if interpret:
        return y / (1 + jnp.exp2(y * jnp.float32(-_LOG2_E)))
    code = (
        f"{{ .reg .f32 t; mul.rn.f32 t, $1, {_literal(-_LOG2_E)}; ex2.approx.ftz.f32 t, t; "
        "add.rn.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 t, t; mul.rn.f32 $0, t, $1; }"
    )
    return _assemble(code, "=f,f", [y], jnp.float32)


def _modulate(parts: list, norm: Norm, row, plan: _Plan, dtype) -> list:
    """Return norm(x) * scale + shift, rounded to dtype; see `functions.modulate`."""

    def mean(values):
        pairs = zip(plan.spans, values, strict=True)
        inside = [_within(value, span, plan.k, 0.0) for span, value in pairs]
        return _reduce(jnp.add, jnp.sum, inside) * jnp.float32(1 / plan.k)

    if norm.kind == "layer":
        center = mean(parts)
        parts = [part - center for part in parts]
    factor = lax.rsqrt(mean([part * part for part in parts]) + jnp.float32(norm.epsilon))
    scale_ref: Any = norm.scale  # in a kernel, refs
    shift_ref: Any = norm.shift

    def vector(ref, span):
        part = plgpu.load(ref.at[row // plan.rows, pl.ds(span.start, span.size)])
        return _widen(part, plan.interpret)

    modulated = []
    for span, part in zip(plan.spans, parts, strict=True):
        y = part * factor * vector(scale_ref, span)
        y = y if shift_ref is None else y + vector(shift_ref, span)
        modulated.append(_round_to(y, dtype, plan.interpret))
    return modulated


def _scale_channels(part: jax.Array, multiplier_ref, span: _Span, plan: _Plan) -> jax.Array:
    """Return `channels.scale_channels` of a span."""
    multiplier = plgpu.load(multiplier_ref.at[pl.ds(span.start, span.size)])
    if plan.interpret:
        return channels.scale_channels(part, multiplier)
    arrays = [part, multiplier.astype(jnp.float32)]
    return _assemble("mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", arrays, jnp.float32)


def _rotate(x: jax.Array, span: _Span, plan: _Plan) -> jax.Array:
    """Return `channels.rotate` of a span but for the factor that it lacks by itself."""
    if span.rotation is None:
        return x
    distance = 1
    while distance < span.rotation:
        step = _step_in_thread if distance < ELEMENTS else _step_between_threads
        x = step(x, distance)
        distance *= 4
    return x if plan.signed else x * jnp.float32(channels.root(span.rotation))


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
    if plan.signed:
        lo, levels = None, 127
        top = _largest(parts, plan)
        finite = top < _INFINITY_BITS
        extent = lax.bitcast_convert_type(top, jnp.float32)
    else:
        flush = channels.without_subnormals
        lo, levels = flush(_reduce(jnp.minimum, jnp.min, parts)), 255
        extent = flush(_reduce(jnp.maximum, jnp.max, parts)) - lo
        # Zero times anything that isn't finite is NaN, and a sum keeps it.
        zero = _reduce(jnp.add, jnp.sum, [part * 0.0 for part in parts])
        finite = (zero == 0) & (_magnitude_bits(extent) < _INFINITY_BITS)
    tiny = extent < codec.TINY_RANGE
    live = finite & ~tiny
    multiplier = _divide(levels, jnp.where(live, extent, 1.0), plan.interpret)
    scale = jnp.where(tiny, 0.0, extent * jnp.float32(1 / levels))
    plgpu.store(scale_ref.at[row], jnp.where(finite, scale, jnp.nan))
    if lo is not None:
        plgpu.store(lo_ref.at[row], jnp.where(finite, lo, jnp.nan))
    return lo, jnp.where(live, multiplier, 0.0)


def _largest(parts: list, plan: _Plan) -> jax.Array:
    """Return the bits of the largest magnitude: as integers they keep their order, NaN on top."""
    pairwise = functools.partial(_larger_magnitude, interpret=plan.interpret)
    factors = [span.lacking(plan) for span in plan.spans]
    if len(set(factors)) > 1:  # before anything goes from thread to thread
        parts = [part * jnp.float32(f) for f, part in _combined(pairwise, factors, parts)]
    top = _reduce(pairwise, lambda part: jnp.max(_magnitude_bits(part)), parts, jnp.maximum)
    factor = 1.0 if len(set(factors)) > 1 else factors[0]
    return _bits(lax.bitcast_convert_type(top, jnp.float32) * jnp.float32(factor))


def _combined(pairwise, factors: list[float], parts: list) -> list[tuple[float, jax.Array]]:
    """Return one part for those of the same length and factor."""
    found: dict[tuple, jax.Array] = {}
    for factor, part in zip(factors, parts, strict=True):
        key = factor, part.shape
        found[key] = pairwise(found[key], part) if key in found else part
    return [(factor, part) for (factor, _), part in found.items()]


def _store(part, span: _Span, row, lo, multiplier, mask_ref, out_refs, plan: _Plan) -> None:
    """Take a span through stage 1 and 2 and write it."""
    at = pl.ds(span.start, span.size)
    if plan.bits == 8 and plan.signed:
        plgpu.store(out_refs[0].at[row, at], _signed_bytes(part, multiplier, plan.interpret))
        return
    rounded = _round_product(part, lo, multiplier, plan.interpret)
    if plan.bits == 8:
        plgpu.store(out_refs[0].at[row, at], (rounded ^ 128).astype(jnp.int8))
        return
    rounded = _within(rounded, span, plan.k, _ROUNDED).reshape(-1, plan.group_size)
    groups = pl.ds(span.start // plan.group_size, rounded.shape[0])
    if plan.packed:
        _store_packed(part, rounded, span, row, groups, out_refs, plan)
        return
    if plan.in_bytes:
        values = _decoded_bytes(part.reshape(rounded.shape), rounded, plan)
    else:
        values = _to_bytes(_encode(rounded, plan)[0], part, plan)
    if mask_ref is not None:
        keep = plgpu.load(mask_ref.at[groups]).astype(jnp.int32)[:, None] > 0
        values = jnp.where(keep, _to_bytes(rounded, part, plan), values)
    plgpu.store(out_refs[0].at[row, at], values.reshape(part.shape))


def _to_bytes(magnitudes: jax.Array, part: jax.Array, plan: _Plan) -> jax.Array:
    """Return the int8 of magnitudes [groups, group_size] with the signs of x, or of values."""
    if not plan.signed:
        return (magnitudes ^ 128).astype(jnp.int8)
    negative = (_bits(part) >> 31).reshape(magnitudes.shape)
    return ((magnitudes ^ negative) - negative).astype(jnp.int8)


def _store_packed(part, rounded, span: _Span, row, groups, out_refs, plan: _Plan) -> None:
    """Write the codes and shifts of a span."""
    _, shifts, codes = _encode(rounded, plan)
    negative = _bits(part) >> 31 if plan.signed else 0
    codes = (codes.reshape(part.shape) ^ negative) - negative
    half = pl.ds(span.start // 2, span.size // 2)
    plgpu.store(out_refs[0].at[row, half], _pack(codes))
    plgpu.store(out_refs[1].at[row, groups], shifts.reshape(-1).astype(jnp.uint8))


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


def _decoded_bytes(x: jax.Array, rounded: jax.Array, plan: _Plan) -> jax.Array:
    """Return what `_encode` decodes with the signs of x, int8 [groups, group_size].

    Four elements that lie side by side in a thread are one word; as they are of one group, what
    the group shares is taken from the first of them.
    """
    peak = jnp.max(rounded, axis=1)[:, None]
    peak = lax.bitcast_convert_type(peak, jnp.float32) - 2.0**23
    if plan.step == "power":
        power = lax.bitcast_convert_type(_bits(peak) & _INFINITY_BITS, jnp.float32)
        step = jnp.maximum(power, 4.0) * 0.25
        code, shared = bytes_of_powers(), [(_bits(step + 2.0**23) - _ROUNDED) * 0x01010101]
    else:
        # 37 is odd: no quotient is half-way.
        step = jnp.maximum(peak * jnp.float32(4 / 37) + 2.0**23 - 2.0**23, 1.0)
        number = _bits(step + 2.0**23) - _ROUNDED
        low, high = number * 0x03020100, number * 0x09070504
        code, shared = bytes_of_stretched(), [_reciprocal_above(step), low, high]
    args = [rounded, _bits(x), *(jnp.broadcast_to(v, x.shape) for v in shared)]
    kinds = ["f" if a.dtype == jnp.float32 else "r" for a in args for _ in range(4)]
    return _assemble(code, ",".join(["=r", *kinds]), args, jnp.int8, pack=4)


def _reciprocal_above(step: jax.Array) -> jax.Array:
    """Return (1 + 2**-9) / step within 2**-22: times a magnitude, halves round up.

    That moves no other: a magnitude is up to 14 steps large and at least 1/28 from other halves.
    """
    divisor = step * jnp.float32(1 / (1 + 2.0**-9))
    return _assemble("rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], jnp.float32)


def bytes_of_powers() -> str:
    """Return assembly of stage 2 with powers of two.

    It takes four magnitudes above `_ROUNDED` ($1 to $4), the bits of four x ($5 to $8) and the
    group's step in each byte ($9), and makes four int8 ($0). Half a step is added, what lies below
    a step dropped, and one step taken off where the sum has reached eight.
    """
    return (
        "{ .reg .b32 e, f, n, v, w; "
        "prmt.b32 e, $1, $2, 0x0040; prmt.b32 f, $3, $4, 0x0040; prmt.b32 w, e, f, 0x5410; "
        "shr.u32 v, $9, 1; and.b32 v, v, 0x7f7f7f7f; add.u32 w, w, v; "
        "sub.u32 v, 0x01010100, $9; and.b32 w, w, v; shr.u32 v, w, 3; and.b32 v, v, $9; "
        "sub.u32 w, w, v; " + _SIGNED
    )


def bytes_of_stretched() -> str:
    """Return assembly of stage 2 with stretched levels.

    It takes four magnitudes above `_ROUNDED` ($1 to $4), the bits of four x ($5 to $8), the
    group's `_reciprocal_above` ($9) and eight levels times its step ($13 and $17), and makes four
    int8 ($0). Past five levels lie two apart: min(r, r / 2 + 5 / 2) numbers them all.
    """
    lines = ["{ .reg .b32 e, f, n, v, w; .reg .f32 r, t; .reg .b32 q0, q1, q2, q3; "]
    lines += [
        f"mov.b32 r, ${1 + i}; sub.rn.f32 r, r, 0f4B000000; mul.rn.f32 r, r, $9; "
        "fma.rn.f32 t, r, 0f3F000000, 0f40200000; min.f32 r, r, t; min.f32 r, r, 0f40E80000; "
        f"add.rn.f32 r, r, 0f4B000000; mov.b32 q{i}, r; "
        for i in range(4)
    ]
    lines.append(
        "shl.b32 q1, q1, 4; add.u32 q0, q0, q1; shl.b32 q3, q3, 4; add.u32 q2, q2, q3; "
        "shl.b32 q2, q2, 8; add.u32 q0, q0, q2; prmt.b32 w, $13, $17, q0; "
    )
    return "".join(lines) + _SIGNED


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


def _spans(columns: tuple[_Columns, ...], largest: int) -> tuple[_Span, ...]:
    """Cut a row into spans whose lengths are powers of two, as Triton wants them."""
    spans, start = [], 0
    for array, (column, whole, activation, times, rotation) in enumerate(columns):
        at = 0
        while at < whole:
            size = min(largest, 1 << ((whole - at).bit_length() - 1))
            spans.append(
                _Span(
                    array=array,
                    column=column + at,
                    start=start + at,
                    size=size,
                    activation=activation,
                    times=None if times is None else times + at,
                    rotation=rotation,
                )
            )
            at += size
        start += whole
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
) -> jax.Array:
    """Return round_half_even(|x| * multiplier), or of x - lo, plus `_ROUNDED`, int32.

    Each operation is rounded by itself; x counts as zero where it is subnormal and lo is given.
    """
    if interpret:
        wide = jnp.abs(x) if lo is None else channels.without_subnormals(x) - lo
        return _bits(jnp.round(wide * multiplier) + 2.0**23)
    multiplier = jnp.broadcast_to(multiplier, x.shape)
    if lo is None:
        code = "{ .reg .f32 t; abs.f32 t, $1; mul.rn.f32 t, t, $2; " + _ROUND + " }"
        return _assemble(code, "=r,f,f", [x, multiplier], jnp.int32)
    lo = jnp.broadcast_to(lo, x.shape)
    code = "{ .reg .f32 t; sub.rn.ftz.f32 t, $1, $2; mul.rn.f32 t, t, $3; " + _ROUND + " }"
    return _assemble(code, "=r,f,f,f", [x, lo, multiplier], jnp.int32)


def _signed_bytes(x: jax.Array, multiplier: jax.Array, interpret: bool) -> jax.Array:
    """Return round_half_even(x * multiplier), int8, four elements at once."""
    if interpret:
        return _bits(jnp.round(x * multiplier) + 1.5 * 2.0**23).astype(jnp.int8)
    args = [x, jnp.broadcast_to(multiplier, x.shape)]
    return _assemble(bytes_of_products(), "=r" + 8 * ",f", args, jnp.int8, pack=4)


def bytes_of_products() -> str:
    """Return assembly from four x ($1 to $4) and their factors ($5 to $8) to four int8 ($0)."""
    lines = ["{ .reg .f32 a0, a1, a2, a3; .reg .b32 b0, b1, b2, b3, e, f; "]
    lines += [
        f"mul.rn.f32 a{i}, ${1 + i}, ${5 + i}; "
        f"add.rn.f32 a{i}, a{i}, {_literal(1.5 * 2.0**23)}; mov.b32 b{i}, a{i}; "
        for i in range(4)
    ]
    lines.append("prmt.b32 e, b0, b1, 0x0040; prmt.b32 f, b2, b3, 0x0040; ")
    return "".join([*lines, "prmt.b32 $0, e, f, 0x5410; }"])


def _assemble(
    code: str, constraints: str, args: list[jax.Array], dtype, *, pack: int = 1
) -> jax.Array:
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plgpu.elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=pack, result_shape_dtypes=(result,)
    )[0]
