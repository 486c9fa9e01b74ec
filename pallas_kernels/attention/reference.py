"""8-bit attention in plain jnp: the definition, block by block of keys as the kernel goes."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.operands import BLOCK, ONES, QuantizedHeads, from_kernel_order

LOG2_E = math.log2(math.e)
E4M3_BIAS = 7  # of the exponent
# Octave of the largest probability of a row, whose code is 118, 1.75 * 2**7. Codes that are linear
# between powers of two have 1 + x in place of 2**x: too much by a factor 1 / (2 log(2)**2) = 1.0407
# on average, and of 1.75 / 2**0.75 = 1.0406 here. At a power of two, where the code is right, the
# key with the largest logit would have 4 % too little weight beside the others (at logits of
# deviation 2 a result 1.5 % too small, and 1.8 times the error of exact codes; so it is 1.2 times).
# An octave more would bring 448, the largest number of e4m3, beside whose code NaN's lies.
TOP = 7.75


# Under jit of its own, as a loop called outside of one is compiled at every call.
@functools.partial(jax.jit, static_argnames=("scale", "streams"))
def attention_int8_fp8(
    heads: QuantizedHeads, *, scale: float, streams: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """Return the attention; see `pallas_kernels.attention.attention_int8_fp8`."""
    batch, tq, count, d = heads.q.shape
    kv_heads = heads.k.shape[2]
    q = heads.q.reshape(batch, tq, kv_heads, -1, d).transpose(0, 2, 3, 1, 4)
    octaves = heads.q_scale.reshape(q.shape[:4]) * (scale * LOG2_E)
    maximum = jnp.full(q.shape[:4], -jnp.inf, jnp.float32)
    sums = jnp.zeros((*q.shape[:4], d + ONES), jnp.float32)

    def step(carry, block):
        maximum, sums = carry
        k, k_scale, v = block
        products = jnp.einsum("bngtd,bsnd->bngts", q, k, preferred_element_type=jnp.int32)
        unit = (octaves * k_scale[:, :, None, None])[..., None]
        logits = products.astype(jnp.float32) * unit
        largest = jnp.maximum(maximum, jnp.max(logits, axis=-1))
        p = probabilities(logits - largest[..., None] + TOP)
        added = jnp.einsum("bngts,bnds->bngtd", p, v, preferred_element_type=jnp.float32)
        # With a sum of its own for each block, as long sums in float8 units are short of bits.
        return (largest, sums * jnp.exp2(maximum - largest)[..., None] + added), None

    (_, sums), _ = lax.scan(step, (maximum, sums), _blocks(heads))
    y = sums[..., :d] / sums[..., d:][..., :1]
    if heads.v_scale is not None:
        y = y * heads.v_scale[:, :, None, None]
    y = y.astype(jnp.bfloat16).transpose(0, 3, 1, 2, 4)
    return split(y.reshape(batch, tq, count, d), streams)


def split(
    y: jax.Array,  # [b, at least as many tokens, heads, d]
    streams: tuple[int, ...],
) -> tuple[jax.Array, ...]:
    """Return the tokens of each stream."""
    ends = itertools.accumulate(streams)
    return tuple(y[:, end - size : end] for end, size in zip(ends, streams, strict=True))


def probabilities(octaves: jax.Array) -> jax.Array:
    """Return nearly 2**octaves as float8_e4m3fn has it, in bfloat16, which holds it exactly.

    The code of 2**y is nearly 8 (y + 7): the exponent's bits count octaves, and those of the
    mantissa are taken as linear between them (Schraudolph, Neural Computation 11(4), 1999), 0 to
    6.1 % too high. That is the same for a row's sum, so that its mean cancels; see `TOP`.
    """
    code = jnp.round(8 * (octaves + E4M3_BIAS))
    # Not a number stays so: 127 is its code.
    code = jnp.where(jnp.isnan(code), 127, jnp.maximum(code, 0)).astype(jnp.uint8)
    return lax.bitcast_convert_type(code, jnp.float8_e4m3fn).astype(jnp.bfloat16)


def _blocks(heads: QuantizedHeads) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return keys, their scales and values with an axis of blocks of keys in front."""
    batch, _, kv_heads, d = heads.k.shape
    k = heads.k.reshape(batch, -1, BLOCK, kv_heads, d)
    v = from_kernel_order(heads.v.astype(jnp.bfloat16)).reshape(
        batch, kv_heads, d + ONES, -1, BLOCK
    )
    return jnp.moveaxis(k, 1, 0), jnp.moveaxis(heads.k_scale, 2, 0), jnp.moveaxis(v, 3, 0)
