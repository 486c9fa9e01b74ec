"""Norm, rotation and rounding to 8 bits of what attention reads, on GPUs, in one pass over memory.

A program takes one head of `BLOCK` tokens: as many as share a key's scale, and enough to turn
values into V^T. As in `triton.py`, channels 2i and 2i + 1 come as halves of a 32-bit word; the
Hadamard matrix multiplies each half of the channels on the tensor cores, exactly but for the order
of sums, since its elements are +-1 and the channels have 16 bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import device
from pallas_kernels.attention.operands import BLOCK, E4M3_MAX, INT8_MAX, ONES, QuantizedHeads
from pallas_kernels.qk_norm_rope import triton
from pallas_kernels.qk_norm_rope.reference import Stream

ROUNDER = 1.5 * 2**23  # a float32 plus this has the nearest integer in its lowest bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Size of one program: a head of `BLOCK` tokens; with 4 warps it spills 2.5 KB a thread."""

    warps: int = 8


SEARCH_SPACE = tuple(Config(warps=warps) for warps in (8, 16))


def qk_norm_rope_8bit(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2]
    *,
    heads: int,
    v_scale: jax.Array | None = None,  # float32 [b, heads, d]
    config: Config = Config(),
    interpret: bool = False,
) -> QuantizedHeads:
    """Return codes and scales; see `pallas_kernels.qk_norm_rope.qk_norm_rope_8bit`."""
    arrays = tuple((s.qkv, s.query_scale, s.key_scale) for s in streams)
    options = {"heads": heads, "config": config, "interpret": interpret}
    return _qk_norm_rope_8bit(
        arrays, rope, v_scale, epsilons=tuple(s.epsilon for s in streams), **options
    )


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("epsilons", "heads", "config", "interpret"))
def _qk_norm_rope_8bit(
    streams: tuple[tuple[jax.Array, jax.Array, jax.Array], ...],  # qkv and the scales
    rope: jax.Array,
    v_scale: jax.Array | None,
    *,
    epsilons: tuple[float, ...],  # of each stream
    heads: int,
    config: Config,
    interpret: bool,
) -> QuantizedHeads:
    arrays, *scales = zip(*streams, strict=True)
    batch, _, columns = arrays[0].shape
    dtype, d = arrays[0].dtype, scales[0][0].shape[0]
    if columns % d:
        arrays = tuple(array[..., : 3 * heads * d] for array in arrays)
    words = tuple(triton._to_words(array, d) for array in arrays)
    tokens = sum(array.shape[1] for array in arrays)
    blocks = -(-tokens // BLOCK)
    codes = jax.ShapeDtypeStruct((batch, blocks * BLOCK, heads, d), jnp.int8)
    sizes = (jax.ShapeDtypeStruct((batch, heads, n), jnp.float32) for n in (blocks * BLOCK, blocks))
    values = (batch, heads, (d + ONES) // 2, 2 * blocks * BLOCK)  # two rows side by side
    q_scale, k_scale = sizes
    q, q_scale, k, k_scale, v = pl.pallas_call(
        functools.partial(_kernel, epsilons=epsilons, heads=heads, tokens=tokens, dtype=dtype),
        out_shape=(codes, q_scale, codes, k_scale, jax.ShapeDtypeStruct(values, jnp.float8_e4m3fn)),
        grid=(heads, blocks, batch),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps),
        interpret=interpret,
        name="qk_norm_rope_8bit",
    )(words, *scales, rope, v_scale)
    v = v.reshape(batch, heads, d + ONES, blocks * BLOCK)
    named = {"q": q, "q_scale": q_scale, "k": k, "k_scale": k_scale, "v": v, "v_scale": v_scale}
    return QuantizedHeads(**named, tokens=tokens)


def why_not(
    target: device.Device, streams: tuple[Stream, ...], rope: jax.Array, **kwargs
) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if reason := triton.why_not(target, streams, rope):
        return reason
    if not target.fp8:
        return f"needs a GPU that rounds to float8, not {target.kind}"
    d = streams[0].query_scale.shape[0]
    # The tensor cores take 16 of half of the channels at least; more than 128 don't fit registers.
    return None if 32 <= d <= 128 else f"needs heads of 32 to 128 channels, not {d}"


def _kernel(
    words_refs,  # of each stream [b, t, columns / d, d / 2], int32
    query_scale_refs,  # of each stream [d]
    key_scale_refs,
    rope_ref,  # [2, t, d / 2]
    v_scale_ref,  # [b, heads, d] or None
    q_ref,  # [b, padded t, heads, d], int8
    q_size_ref,  # [b, heads, padded t], float32
    k_ref,
    k_size_ref,  # [b, heads, blocks], float32
    v_ref,  # [b, heads, (d + ONES) / 2, 2 padded t], float8_e4m3fn: rows 2i and 2i + 1
    *,
    epsilons: tuple[float, ...],  # of each stream
    heads: int,
    tokens: int,
    dtype: jnp.dtype,
):
    head, block, batch = (pl.program_id(axis) for axis in range(3))
    half, here = rope_ref.shape[2], pl.ds(block * BLOCK, BLOCK)
    place = lax.iota(jnp.int32, BLOCK)
    # What pads repeats the last token.
    token = jnp.minimum(block * BLOCK + place, tokens - 1)

    shape = BLOCK, half
    pair = lax.broadcasted_iota(jnp.int32, shape, 1)  # of channels
    down = functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=(0,))

    def places(token):
        """Yield each stream's rows of these tokens and whether they are in it."""
        start = 0
        for ref in words_refs:
            row, count = token - start, ref.shape[1]
            yield jnp.clip(row, 0, count - 1), (row >= 0) & (row < count)
            start += count

    def load(part, token):
        words = jnp.zeros(shape, jnp.int32)
        for ref, (row, inside) in zip(words_refs, places(token), strict=True):
            at = batch, down(row), part * heads + head, pair
            words = words | plgpu.load(ref.at[at], mask=down(inside), other=0)
        return triton._unpack(words, dtype)

    def load_scale(refs, parity):
        scale, at = jnp.zeros(shape, jnp.float32), parity + 2 * lax.iota(jnp.int32, half)
        for ref, (_, inside) in zip(refs, places(token), strict=True):
            values = plgpu.load(ref.at[at]).astype(jnp.float32)
            scale = jnp.where(down(inside), values[None], scale)
        return scale

    cos, sin = (plgpu.load(rope_ref.at[which, down(token), pair]) for which in (0, 1))

    inside = [found for _, found in places(token)]
    pairs = zip(inside, epsilons, strict=True)
    epsilon = sum((jnp.where(x, e, 0.0) for x, e in pairs), jnp.float32(0))[:, None]

    def rotated(part, scale_refs):
        """Return normed, turned and Hadamard-rotated rows [BLOCK, d], and a zero or NaN a row."""
        even, odd = load(part, token)
        squares = jnp.sum(even * even + odd * odd, axis=1)[:, None]
        factor = lax.rsqrt(squares * jnp.float32(0.5 / half) + epsilon)
        even = even * (factor * load_scale(scale_refs, 0))
        odd = odd * (factor * load_scale(scale_refs, 1))
        turned = even * cos - odd * sin, even * sin + odd * cos
        products = (
            jnp.dot(
                x.astype(dtype), _signs(half, parity, dtype), preferred_element_type=jnp.float32
            )
            for parity, x in enumerate(turned)
        )
        return sum(products), 0 * factor

    unit = 1 / (INT8_MAX * (2 * half) ** 0.5)
    sums, spoilt = rotated(0, query_scale_refs)
    # A maximum loses NaN on this path: it comes back with the scale.
    largest = _not_zero(jnp.max(jnp.abs(sums), axis=1)[:, None]) + spoilt
    plgpu.store(q_ref.at[batch, here, head, slice(None)], _round(sums * (INT8_MAX / largest)))
    plgpu.store(q_size_ref.at[batch, head, here], jnp.sum(largest, axis=1) * unit)
    sums, spoilt = rotated(1, key_scale_refs)
    largest = _not_zero(jnp.max(jnp.max(jnp.abs(sums), axis=1), axis=0)) + jnp.sum(spoilt)
    plgpu.store(k_ref.at[batch, here, head, slice(None)], _round(sums * (INT8_MAX / largest)))
    plgpu.store(k_size_ref.at[batch, head, block], largest * unit)

    # The token at each place, `operands.V_ORDER` within 16.
    within = place % 16
    turned = 8 * (within % 4 // 2) + 2 * (within // 4) + within % 2
    token = block * BLOCK + place - within + turned
    valid = token < tokens
    for parity, x in enumerate(load(2, token)):
        if v_scale_ref is not None:
            at = batch, head, parity + 2 * lax.iota(jnp.int32, half)
            x = x / plgpu.load(v_scale_ref.at[at])[None]
        # Comparisons, which leave NaN alone.
        x = jnp.where(x > E4M3_MAX, E4M3_MAX, jnp.where(x < -E4M3_MAX, -E4M3_MAX, x))
        tokens_here = pl.ds(parity * k_ref.shape[1] + block * BLOCK, BLOCK)
        rows = pl.ds(0, half)
        plgpu.store(v_ref.at[batch, head, rows, tokens_here], x.astype(jnp.float8_e4m3fn).T)
        ones = jnp.broadcast_to(valid.astype(jnp.float32)[None], (ONES // 2, BLOCK))
        rows = pl.ds(half, ONES // 2)
        plgpu.store(v_ref.at[batch, head, rows, tokens_here], ones.astype(jnp.float8_e4m3fn))


def _signs(half: int, parity: int, dtype: jnp.dtype) -> jax.Array:
    """Return rows parity, parity + 2, ... of the Hadamard matrix of 2 half: [half, 2 half].

    Its element (i, j) is -1 to the number of bits that i and j share.
    """
    i, j = (lax.broadcasted_iota(jnp.int32, (half, 2 * half), axis) for axis in (0, 1))
    shared = (2 * i + parity) & j
    for shift in (4, 2, 1):
        shared = shared ^ (shared >> shift)
    return (1 - 2 * (shared & 1)).astype(dtype)


def _not_zero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, jnp.float32(1), x)


def _round(x: jax.Array) -> jax.Array:
    """Return float32 within +-127 rounded half to even, as int8."""
    return lax.bitcast_convert_type(x + jnp.float32(ROUNDER), jnp.int32).astype(jnp.int8)
