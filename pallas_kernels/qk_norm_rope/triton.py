"""Norm and rotation of queries and keys on GPUs, in one pass over memory.

A program takes some heads of a few tokens. Neighbouring channels, which turn together, are the two
halves of a 32-bit word, so that nothing moves between threads but the sum of squares.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import device
from pallas_kernels.qk_norm_rope.reference import Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of one program, at most: what divides the work is taken.

    On an H100 one token, 8 heads and 2 or 4 warps are the fastest of eleven, at 59 us for FLUX.1;
    the slowest takes 81 (`benchmarks/h100_passes.json`).
    """

    tokens: int = 1
    heads: int = 8
    warps: int = 4


def qk_norm_rope(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2]
    *,
    heads: int,
    config: Config = Config(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries, keys and values; see `pallas_kernels.qk_norm_rope.qk_norm_rope`."""
    arrays = tuple((s.qkv, s.query_scale, s.key_scale) for s in streams)
    epsilons = tuple(s.epsilon for s in streams)
    return _qk_norm_rope(
        arrays, rope, epsilons=epsilons, heads=heads, config=config, interpret=interpret
    )


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("epsilons", "heads", "config", "interpret"))
def _qk_norm_rope(
    streams: tuple[tuple[jax.Array, jax.Array, jax.Array], ...],  # qkv and the scales
    rope: jax.Array,
    *,
    epsilons: tuple[float, ...],  # of each stream
    heads: int,
    config: Config,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays, *scales = zip(*streams, strict=True)
    batch, _, columns = arrays[0].shape
    dtype, d = arrays[0].dtype, scales[0][0].shape[0]
    if columns % d:
        arrays = tuple(array[..., : 3 * heads * d] for array in arrays)
    words = tuple(_to_words(array, d) for array in arrays)
    tokens = [array.shape[1] for array in arrays]
    # A program's tokens are all of one stream.
    tile = math.gcd(config.tokens, *tokens), math.gcd(config.heads, heads)
    out = jax.ShapeDtypeStruct((batch, sum(tokens), heads, d // 2), jnp.int32)
    results = pl.pallas_call(
        functools.partial(_kernel, epsilons=epsilons, heads=heads, tile=tile, dtype=dtype),
        out_shape=(out, out, out),
        grid=(heads // tile[1], sum(tokens) // tile[0], batch),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps),
        interpret=interpret,
        name="qk_norm_rope",
    )(words, *scales, rope)
    q, k, v = (lax.bitcast_convert_type(y, dtype).reshape(*y.shape[:-1], d) for y in results)
    return q, k, v


def why_not(
    target: device.Device, streams: tuple[Stream, ...], rope: jax.Array, **kwargs
) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if reason := device.triton_why_not(target):
        return reason
    dtype, d = streams[0].qkv.dtype, streams[0].query_scale.shape[0]
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit floats, not {dtype}"
    if d & (d - 1) or d < 4:
        return f"needs heads of a power of two of channels, at least 4, not {d}"
    return None if 0 not in (*rope.shape, streams[0].qkv.shape[0]) else "needs at least one token"


def _to_words(array: jax.Array, d: int) -> jax.Array:
    """Return 16-bit [b, t, columns] as int32 [b, t, columns / d, d / 2], even channels low."""
    batch, tokens, columns = array.shape
    pairs = array.reshape(batch, tokens, columns // d, d // 2, 2)
    return lax.bitcast_convert_type(pairs, jnp.int32)


def _kernel(
    words_refs,  # of each stream [b, t, columns / d, d / 2], int32
    query_scale_refs,  # of each stream [d]
    key_scale_refs,
    rope_ref,  # [2, t, d / 2]
    q_ref,  # [b, t, heads, d / 2], int32
    k_ref,
    v_ref,
    *,
    epsilons: tuple[float, ...],  # of each stream
    heads: int,
    tile: tuple[int, int],  # tokens, heads
    dtype: jnp.dtype,
):
    head, token, batch = (pl.program_id(axis) for axis in range(3))
    head, token = head * tile[1], token * tile[0]
    shape = *tile, rope_ref.shape[2]
    here, starts = [], 0  # of each stream: is the program's token in it, and its number there
    for ref in words_refs:
        place = token - starts
        here.append((place, (place >= 0) & (place < ref.shape[1])))
        starts += ref.shape[1]

    def load(part):
        words = jnp.zeros(shape, jnp.int32)
        for ref, (place, inside) in zip(words_refs, here, strict=True):
            at = batch, pl.ds(place, tile[0]), pl.ds(part * heads + head, tile[1]), slice(None)
            mask = jnp.broadcast_to(inside, shape)
            words = words | plgpu.load(ref.at[at], mask=mask, other=0)
        return words

    def load_scale(refs, parity):
        scale, at = jnp.zeros(shape[2:], jnp.float32), parity + 2 * lax.iota(jnp.int32, shape[2])
        for ref, (_, inside) in zip(refs, here, strict=True):
            values = plgpu.load(ref.at[at]).astype(jnp.float32)
            scale = jnp.where(inside, values, scale)
        return scale[None, None]

    def load_rope(which):
        at = pl.ds(which, 1), pl.ds(token, tile[0]), slice(None)
        return plgpu.load(rope_ref.at[at]).reshape(tile[0], 1, shape[2])

    epsilon = jnp.float32(epsilons[0])
    for other, (_, inside) in zip(epsilons[1:], here[1:], strict=True):
        epsilon = jnp.where(inside, jnp.float32(other), epsilon)
    cos, sin = load_rope(0), load_rope(1)
    out = batch, pl.ds(token, tile[0]), pl.ds(head, tile[1]), slice(None)
    # All at once, so that enough of memory is under way.
    q, k, v = (load(part) for part in range(3))
    for words, scales, out_ref in ((q, query_scale_refs, q_ref), (k, key_scale_refs, k_ref)):
        even, odd = _unpack(words, dtype)
        squares = jnp.sum(even * even + odd * odd, axis=2)[..., None]
        factor = lax.rsqrt(squares * jnp.float32(0.5 / shape[2]) + epsilon)
        even = even * (factor * load_scale(scales, 0))
        odd = odd * (factor * load_scale(scales, 1))
        turned = even * cos - odd * sin, even * sin + odd * cos
        plgpu.store(out_ref.at[out], _pack(*turned, dtype))
    plgpu.store(v_ref.at[out], v)


def _unpack(words: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Return the low and the high halves as float32."""
    halves = (half.astype(jnp.uint16) for half in (words, words >> 16))
    low, high = (lax.bitcast_convert_type(half, dtype).astype(jnp.float32) for half in halves)
    return low, high


def _pack(low: jax.Array, high: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return float32 values rounded to dtype as the halves of int32 words."""
    halves = (lax.bitcast_convert_type(x.astype(dtype), jnp.uint16) for x in (low, high))
    low, high = (half.astype(jnp.int32) for half in halves)
    return low | (high << 16)
