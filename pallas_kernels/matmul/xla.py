"""Quantized matmul left to XLA: weights decoded to int8, then one int8 dot."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codec, device
from pallas_kernels.matmul import reference

# Partial sums of 1024 products of int8 stay within 128 * 128 * 1024 = 2**24, the last integer up
# to which float32 holds them all: any order of float32 accumulation is exact.
_EXACT_K = 1024

_LAST_AXES = (((1,), (1,)), ((), ()))


def matmul(
    x: jax.Array,  # [m, k], int8
    w_codes: jax.Array,  # [n, k_padded / 2], uint8
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    group_size: int,
    step: str,
    **options,  # of `reference.epilogue`
) -> jax.Array:
    """Decode the weights, then multiply; see `pallas_kernels.matmul.matmul`."""
    w = codec.decode_packed(w_codes, w_shifts, group_size=group_size, step=step)[:, : x.shape[1]]
    return matmul_int8(x, w, x_scale, w_scale, **options)


def matmul_int8(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    **options,  # of `reference.epilogue`
) -> jax.Array:
    """Multiply int8 by int8; see `pallas_kernels.matmul.matmul_int8`."""
    return reference.epilogue(int8_dot(x, w), w, x_scale, w_scale, **options)


def int8_dot(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
) -> jax.Array:
    """Return the exact int32 sums over k, [m, n]."""
    target = device.current()
    if target.platform == "tpu" and not target.int8:
        return chunked_dot(x, w)
    return lax.dot_general(x, w, _LAST_AXES, preferred_element_type=jnp.int32)


def chunked_dot(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
) -> jax.Array:
    """Return the same sums from bfloat16 units: in chunks of k that float32 adds up exactly."""
    acc = jnp.zeros((x.shape[0], w.shape[0]), jnp.int32)
    for start in range(0, x.shape[1], _EXACT_K):
        part = slice(start, start + _EXACT_K)
        a, b = x[:, part].astype(jnp.bfloat16), w[:, part].astype(jnp.bfloat16)
        dot = lax.dot_general(a, b, _LAST_AXES, preferred_element_type=jnp.float32)
        acc = acc + dot.astype(jnp.int32)
    return acc
