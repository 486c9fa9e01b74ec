"""Norm, rotation and rounding to 8 bits of what attention reads, on GPUs, in one pass over memory.

A program takes the queries, the keys or the values of one head of `BLOCK` tokens: as many as share
a key's scale, and enough to turn values into V^T. As in `triton.py`, channels 2i and 2i + 1 come as
halves of a 32-bit word. The Hadamard matrix multiplies on the tensor cores, exactly but for the
order of sums, since its elements are +-1 and the channels have 16 bits.

Memory bounds this at 44 us for FLUX.1 on an H100, if enough is under way. Queries and keys take 128
registers of a thread, so that two programs share a processor; values, of which twice as many fit,
are a launch of their own. One program for all three needs 255 registers, runs alone on its
processor, and took 102 us there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import device
from pallas_kernels.attention.operands import (
    BLOCK,
    E4M3_MAX,
    INT8_MAX,
    ONES,
    QuantizedHeads,
    hadamard,
)
from pallas_kernels.qk_norm_rope import triton
from pallas_kernels.qk_norm_rope.reference import Stream

ONE_BITS = 0x3F800000  # of float32
ROUNDER = 1.5 * 2**23  # a float32 plus this has the nearest integer in its lowest bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Size of one program: a head of `BLOCK` tokens."""

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
    counts = tuple(array.shape[1] for array in arrays)
    tokens = sum(counts)
    blocks = -(-tokens // BLOCK)
    plan = _Plan(heads=heads, counts=counts, dtype=dtype, epsilons=epsilons, interpret=interpret)
    params = plgpu.CompilerParams(num_warps=config.warps)
    call = functools.partial(pl.pallas_call, compiler_params=params, interpret=interpret)
    codes = jax.ShapeDtypeStruct((batch, blocks * BLOCK, heads, d), jnp.int8)
    sizes = (jax.ShapeDtypeStruct((batch, heads, n), jnp.float32) for n in (blocks * BLOCK, blocks))
    q_scale, k_scale = sizes
    q, q_scale, k, k_scale = call(
        functools.partial(_rows_kernel, plan=plan),
        out_shape=(codes, q_scale, codes, k_scale),
        grid=(2 * heads, blocks, batch),
        name="qk_norm_rope_8bit",
    )(words, *_scales_to_words(scales, dtype), rope, jnp.asarray(hadamard(d), dtype))
    values = (batch, heads, (d + ONES) // 2, 2 * blocks * BLOCK)  # two rows side by side
    v = call(
        functools.partial(_values_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct(values, jnp.float8_e4m3fn),
        grid=(heads, blocks, batch),
        name="values_8bit",
    )(words, v_scale)
    v = v.reshape(batch, heads, d + ONES, blocks * BLOCK)
    named = {"q": q, "q_scale": q_scale, "k": k, "k_scale": k_scale, "v": v, "v_scale": v_scale}
    return QuantizedHeads(**named, tokens=tokens)


def _scales_to_words(scales: list[tuple[jax.Array, ...]], dtype: jnp.dtype) -> list:
    """Return scales as int32, even channels low, or in float32 if one has another dtype."""
    if all(x.dtype == dtype for xs in scales for x in xs):
        return [
            [lax.bitcast_convert_type(x.reshape(-1, 2), jnp.int32) for x in xs] for xs in scales
        ]
    return [[x.astype(jnp.float32) for x in xs] for xs in scales]


def why_not(
    target: device.Device, streams: tuple[Stream, ...], rope: jax.Array, **kwargs
) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if reason := triton.why_not(target, streams, rope):
        return reason
    if not target.fp8:
        return f"needs a GPU that rounds to float8, not {target.kind}"
    d = streams[0].query_scale.shape[0]
    # More than 128 don't fit registers; fewer than 32 are in no model.
    return None if 32 <= d <= 128 else f"needs heads of 32 to 128 channels, not {d}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What both kernels know beforehand."""

    heads: int
    counts: tuple[int, ...]  # tokens of each stream
    dtype: jnp.dtype
    epsilons: tuple[float, ...]  # of each stream
    interpret: bool

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first token of each stream."""
        return tuple(sum(self.counts[:i]) for i in range(len(self.counts)))

    @property
    def whole(self) -> bool:
        """Whether each program's tokens are all of one stream, which spares masks for each row."""
        return all(start % BLOCK == 0 for start in self.starts)

    def inside(self, stream: int, token: jax.Array) -> jax.Array:
        """Return whether tokens [n] are in a stream: [n, 1], or [1, 1] if it is so for all."""
        if self.whole:
            token = pl.program_id(1) * BLOCK + jnp.zeros(1, jnp.int32)
        row = token - self.starts[stream]
        return ((row >= 0) & (row < self.counts[stream]))[:, None]


def _load(words_refs, plan: _Plan, part: jax.Array | int, head: jax.Array, token: jax.Array):
    """Return the even and the odd channels of tokens [n] of a head, float32 [n, d / 2] each."""
    shape = token.shape[0], words_refs[0].shape[3]
    pair = lax.broadcasted_iota(jnp.int32, shape, 1)
    words = jnp.zeros(shape, jnp.int32)
    for i, ref in enumerate(words_refs):
        row = jnp.clip(token - plan.starts[i], 0, plan.counts[i] - 1)
        at = (
            pl.program_id(2),
            jnp.broadcast_to(row[:, None], shape),
            part * plan.heads + head,
            pair,
        )
        mask = jnp.broadcast_to(plan.inside(i, token), shape)
        # On top of what is there, so that streams share registers.
        words = plgpu.load(ref.at[at], mask=mask, other=words)
    return triton._unpack(words, plan.dtype)


def _load_scale(query_refs, key_refs, plan: _Plan, is_key: jax.Array, token: jax.Array):
    """Return the norm's scale of even and of odd channels, float32 [n or 1, d / 2] each."""

    def load(*at):
        found = jnp.zeros((1, 1), query_refs[0].dtype)
        for i, (query, key) in enumerate(zip(query_refs, key_refs, strict=True)):
            values = jnp.where(is_key, plgpu.load(key.at[at]), plgpu.load(query.at[at]))
            found = jnp.where(plan.inside(i, token), values[None], found)
        return found

    if query_refs[0].dtype == jnp.int32:
        return triton._unpack(load(slice(None)), plan.dtype)
    channel = 2 * lax.iota(jnp.int32, query_refs[0].shape[0] // 2)
    return tuple(load(channel + parity).astype(jnp.float32) for parity in (0, 1))


def _rows_kernel(
    words_refs,  # of each stream [b, t, columns / d, d / 2], int32
    query_scale_refs,  # of each stream [d / 2], int32, or [d], float32
    key_scale_refs,
    rope_ref,  # [2, t, d / 2]
    signs_ref,  # [d, d], the Hadamard matrix
    q_ref,  # [b, padded t, heads, d], int8
    q_size_ref,  # [b, heads, padded t], float32
    k_ref,
    k_size_ref,  # [b, heads, blocks], float32
    *,
    plan: _Plan,
):
    """Norm, turn, rotate and round a block of queries, or of keys, of a head."""
    part, block, batch = pl.program_id(0) % 2, pl.program_id(1), pl.program_id(2)
    head, is_key = pl.program_id(0) // 2, part == 1
    here, d = pl.ds(block * BLOCK, BLOCK), signs_ref.shape[0]
    # What pads repeats the last token.
    token = jnp.minimum(block * BLOCK + lax.iota(jnp.int32, BLOCK), plan.tokens - 1)
    shape = BLOCK, d // 2
    at = jnp.broadcast_to(token[:, None], shape), lax.broadcasted_iota(jnp.int32, shape, 1)
    cos, sin = (plgpu.load(rope_ref.at[(which, *at)]) for which in (0, 1))
    epsilon = jnp.full((1, 1), plan.epsilons[0], jnp.float32)
    for i, other in enumerate(plan.epsilons[1:], 1):
        epsilon = jnp.where(plan.inside(i, token), jnp.float32(other), epsilon)

    even, odd = _load(words_refs, plan, part, head, token)
    squares = jnp.sum(_fma(even, even, odd * odd, plan), axis=1)[:, None]
    factor = lax.rsqrt(squares * jnp.float32(1 / d) + epsilon)
    scales = _load_scale(query_scale_refs, key_scale_refs, plan, is_key, token)
    even, odd = (x * (factor * scale) for x, scale in zip((even, odd), scales, strict=True))
    turned = _fms(even, cos, odd * sin, plan), _fma(even, sin, odd * cos, plan)
    rows = jnp.stack([x.astype(plan.dtype) for x in turned], axis=2).reshape(BLOCK, d)
    sums = jnp.dot(rows, plgpu.load(signs_ref), preferred_element_type=jnp.float32)

    # A maximum of floats loses NaN on this path, unless all are NaN: as here, each being a sum of
    # all channels. That of a block is one of bits, which keep it.
    by_row = jnp.max(jnp.abs(sums), axis=1)
    by_row = lax.bitcast_convert_type(by_row, jnp.int32) & 0x7FFFFFFF  # NaN has either sign
    of_block = _size(jnp.max(by_row, axis=0))
    largest = jnp.where(is_key, jnp.broadcast_to(of_block, (BLOCK,)), _size(by_row))
    codes = _round(sums, (INT8_MAX / largest)[:, None], plan)
    unit = 1 / (INT8_MAX * d**0.5)

    @pl.when(part == 0)
    def _():
        plgpu.store(q_ref.at[batch, here, head, slice(None)], codes)
        plgpu.store(q_size_ref.at[batch, head, here], largest * unit)

    @pl.when(is_key)
    def _():
        plgpu.store(k_ref.at[batch, here, head, slice(None)], codes)
        plgpu.store(k_size_ref.at[batch, head, block], of_block * unit)


def _values_kernel(
    words_refs,  # of each stream [b, t, columns / d, d / 2], int32
    v_scale_ref,  # [b, heads, d] or None
    v_ref,  # [b, heads, (d + ONES) / 2, 2 padded t], float8_e4m3fn: rows 2i and 2i + 1
    *,
    plan: _Plan,
):
    """Round a block of values of a head, and write them as V^T above ones."""
    head, block, batch = (pl.program_id(axis) for axis in range(3))
    half, place = words_refs[0].shape[3], lax.iota(jnp.int32, BLOCK)
    # The token at each place, `operands.V_ORDER` within 16.
    within = place % 16
    turned = 8 * (within % 4 // 2) + 2 * (within // 4) + within % 2
    token = block * BLOCK + place - within + turned
    valid = token < plan.tokens
    for parity, x in enumerate(_load(words_refs, plan, 2, head, token)):
        x = jnp.where(valid[:, None], x, 0)
        if v_scale_ref is not None:
            at = batch, head, parity + 2 * lax.iota(jnp.int32, half)
            x = x / plgpu.load(v_scale_ref.at[at])[None]
        here = pl.ds((parity * pl.num_programs(1) + block) * BLOCK, BLOCK)
        rows = v_ref.at[batch, head, pl.ds(0, half), here]
        plgpu.store(rows, _to_float8(x, plan).T)
        ones = jnp.broadcast_to(valid.astype(jnp.float32)[None], (ONES // 2, BLOCK))
        rows = v_ref.at[batch, head, pl.ds(half, ONES // 2), here]
        plgpu.store(rows, ones.astype(jnp.float8_e4m3fn))


def _fma(a: jax.Array, b: jax.Array, c: jax.Array, plan: _Plan) -> jax.Array:
    """Return a b + c, rounded once on a GPU: XLA's Triton doesn't contract it."""
    if plan.interpret:
        return a * b + c
    return _assemble("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def _fms(a: jax.Array, b: jax.Array, c: jax.Array, plan: _Plan) -> jax.Array:
    """Return a b - c in the same way."""
    if plan.interpret:
        return a * b - c
    return _assemble("{ .reg .f32 t; neg.f32 t, $3; fma.rn.f32 $0, $1, $2, t; }", a, b, c)


def _assemble(code: str, *args: jax.Array) -> jax.Array:
    arrays = jnp.broadcast_arrays(*args)
    result = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
    return plgpu.elementwise_inline_asm(
        code, args=arrays, constraints="=f,f,f,f", pack=1, result_shape_dtypes=(result,)
    )[0]


def _size(bits: jax.Array) -> jax.Array:
    """Return the largest magnitudes from their bits; 1 for 0, and NaN for what isn't finite."""
    largest = lax.bitcast_convert_type(jnp.where(bits == 0, jnp.int32(ONE_BITS), bits), jnp.float32)
    return largest + 0 * largest


def _to_float8(x: jax.Array, plan: _Plan) -> jax.Array:
    """Return float32 as float8, +-448 for what is larger, as the GPU's own rounding has it."""
    if plan.interpret:  # comparisons, which leave NaN alone
        x = jnp.where(x > E4M3_MAX, E4M3_MAX, jnp.where(x < -E4M3_MAX, -E4M3_MAX, x))
    return x.astype(jnp.float8_e4m3fn)


def _round(x: jax.Array, factor: jax.Array, plan: _Plan) -> jax.Array:
    """Return float32 products within +-127 rounded half to even, as int8."""
    factor = jnp.broadcast_to(factor, x.shape)
    if plan.interpret:
        rounded = x * factor + jnp.float32(ROUNDER)
        return lax.bitcast_convert_type(rounded, jnp.int32).astype(jnp.int8)
    # Four at once, which are a register's lowest bytes.
    code = (
        "{ .reg .b32 a, b, c, d; .reg .f32 r; mov.b32 r, 0f4B400000; fma.rn.f32 a, $1, $5, r; "
        "fma.rn.f32 b, $2, $6, r; fma.rn.f32 c, $3, $7, r; fma.rn.f32 d, $4, $8, r; "
        "prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040; prmt.b32 $0, a, c, 0x5410; }"
    )
    return plgpu.elementwise_inline_asm(
        code,
        args=[x, factor],
        constraints="=r,f,f,f,f,f,f,f,f",
        pack=4,
        result_shape_dtypes=(jax.ShapeDtypeStruct(x.shape, jnp.int8),),
    )[0]
