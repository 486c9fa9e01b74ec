"""Activations to decoded 8-bit operands on GPUs: a row a program, read once and kept in registers.

The same bits as `pallas_kernels.codec`: where a compiler could contract or approximate a float
operation, the PTX instruction with IEEE rounding is named.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import codec, device

PART = 1024  # elements of a row handled at once, at most
MAX_K = 32768  # elements of a row that registers hold
_INFINITY_BITS = 0x7F800000
_SMALLEST_NORMAL_BITS = 0x00800000


def quantize(
    x: jax.Array,  # [m, k], floating
    *,
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantize each row; see `pallas_kernels.quantize.quantize`."""
    m, k = x.shape
    # The last element again changes neither extreme of the row, nor of its group.
    x = jnp.pad(x, [(0, 0), (0, -k % max(group_size, 16))], mode="edge")
    signed = range == "absmax"
    kernel = functools.partial(
        _kernel,
        encode=functools.partial(_round_trip, step=step, rounding=rounding, signed=signed)
        if bits == 4
        else None,
        group_size=group_size,
        signed=signed,
        interpret=interpret,
    )
    row = jax.ShapeDtypeStruct((m,), jnp.float32)
    values, scale, lo = pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct(x.shape, jnp.int8), row, row),
        grid=(m,),
        compiler_params=plgpu.CompilerParams(num_warps=4 if x.shape[1] <= 4096 else 8),
        interpret=interpret,
        name="quantize",
    )(x)
    return values[:, :k], scale[:, None], None if signed else lo[:, None]


def why_not(target: device.Device, x: jax.Array, **kwargs) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if target.platform != "gpu":
        return f"needs a GPU, not {target.platform}"
    if not 0 < x.shape[1] <= MAX_K:
        return f"needs 1 to {MAX_K} elements a row, not {x.shape[1]}"
    return None if x.shape[0] else "needs at least one row"


def _kernel(x_ref, values_ref, scale_ref, lo_ref, *, encode, group_size, signed, interpret):
    row = pl.program_id(0)
    spans = _spans(x_ref.shape[1])
    parts = [plgpu.load(x_ref.at[row, span]).astype(jnp.float32) for span in spans]
    # As integers, magnitudes keep their order and NaN is the largest.
    top = _reduce(jnp.maximum, jnp.max, [_magnitude_bits(part) for part in parts])
    if signed:
        lo, levels = None, 127
        extent = lax.bitcast_convert_type(top, jnp.float32)
    else:
        parts = [jnp.where(_magnitude_bits(p) < _SMALLEST_NORMAL_BITS, 0.0, p) for p in parts]
        lo, levels = _reduce(jnp.minimum, jnp.min, parts), 255
        extent = _reduce(jnp.maximum, jnp.max, parts) - lo
        top = jnp.maximum(top, _magnitude_bits(extent))
    tiny, finite = extent < codec.TINY_RANGE, top < _INFINITY_BITS
    live = finite & ~tiny
    multiplier = _divide(levels, jnp.where(live, extent, 1.0), interpret)
    scale = jnp.where(tiny, 0.0, extent * jnp.float32(1 / levels))
    plgpu.store(scale_ref.at[row], jnp.where(finite, scale, jnp.nan))
    if not signed:
        plgpu.store(lo_ref.at[row], lo)
    for span, part in zip(spans, parts, strict=True):
        values = _round_product(part, lo, multiplier, interpret)
        values = jnp.where(live, jnp.clip(values, -127 if signed else 0, levels), 0)
        if encode is not None:
            values = encode(values.reshape(-1, group_size)).reshape(values.shape)
        plgpu.store(values_ref.at[row, span], (values if signed else values - 128).astype(jnp.int8))


def _round_trip(
    values: jax.Array,  # [groups, group_size], int32
    *,
    step: str,
    rounding: str,
    signed: bool,
) -> jax.Array:
    """Return what 4-bit codes of the groups decode to; see `codec.encode`."""
    magnitude = jnp.abs(values)
    peak = jnp.max(magnitude, axis=1)[:, None]
    limit = codec.NIBBLE_MAX if signed else codec.UNSIGNED_NIBBLE_MAX
    if step == "integer":
        p = jnp.clip((2 * peak + 7) // 15, 1, codec.MAX_STEP)
        # (2m + p + 1/2) / 2p is never nearer than 1/64 to an integer: an approximate quotient does.
        quotient = (2 * magnitude + p).astype(jnp.float32) + 0.5
        t = (quotient * (0.5 / p.astype(jnp.float32))).astype(jnp.int32)
        decoded = jnp.minimum(t, limit) * p
    else:
        shift = sum((peak >= (limit + 1) << i).astype(jnp.int32) for i in range(4))
        half = (1 << shift) >> 1 if rounding == "nearest" else jnp.zeros_like(shift)
        decoded = jnp.minimum((magnitude + half) >> shift, limit) << shift
    return jnp.where(values < 0, -decoded, decoded)


def _spans(k: int) -> list:
    """Cut a row into parts whose lengths are powers of two, as Triton wants them."""
    spans, start = [], 0
    while start < k:
        size = min(PART, 1 << ((k - start).bit_length() - 1))
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


def _divide(levels: int, extent: jax.Array, interpret: bool) -> jax.Array:
    """Divide scalars with IEEE rounding; Triton's own division is approximate."""
    if interpret:
        return levels / extent
    numerator = f"0f{np.float32(levels).view(np.uint32):08X}"
    extent = jnp.broadcast_to(extent, (1,))  # assembly takes arrays only
    return _assemble(f"div.rn.f32 $0, {numerator}, $1;", "=f,f", [extent], jnp.float32)


def _round_product(x: jax.Array, lo: jax.Array | None, multiplier: jax.Array, interpret: bool):
    """Return round_half_even((x - lo) * multiplier) as int32, each operation rounded by itself."""
    if interpret:
        return jnp.round((x if lo is None else x - lo) * multiplier).astype(jnp.int32)
    multiplier = jnp.broadcast_to(multiplier, x.shape)
    if lo is None:
        code = "{ .reg .f32 t; mul.rn.f32 t, $1, $2; cvt.rni.s32.f32 $0, t; }"
        return _assemble(code, "=r,f,f", [x, multiplier], jnp.int32)
    lo = jnp.broadcast_to(lo, x.shape)
    code = "{ .reg .f32 t; sub.rn.f32 t, $1, $2; mul.rn.f32 t, t, $3; cvt.rni.s32.f32 $0, t; }"
    return _assemble(code, "=r,f,f,f", [x, lo, multiplier], jnp.int32)


def _assemble(code: str, constraints: str, args: list[jax.Array], dtype) -> jax.Array:
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plgpu.elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=1, result_shape_dtypes=(result,)
    )[0]
