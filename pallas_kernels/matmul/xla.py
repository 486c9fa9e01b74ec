"""Quantized matmul left to XLA: weights decoded to int8, then one int8 dot."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import device
from pallas_kernels.matmul import reference
from pallas_kernels.operands import Epilogue, Int8Rows, PackedRows, int8_values

# Partial sums of 1024 products of int8 stay within 128 * 128 * 1024 = 2**24, the last integer up
# to which float32 holds them all: any order of float32 accumulation is exact.
_EXACT_K = 1024

_LAST_AXES = (((1,), (1,)), ((), ()))


def matmul(
    x: Int8Rows,  # [m, k]
    w: Int8Rows | PackedRows,  # [n, k]
    epilogue: Epilogue,
) -> jax.Array:
    """Decode the weights, then multiply; see `pallas_kernels.matmul.matmul`."""
    values = int8_values(w)
    return reference.apply(int8_dot(x.values, values), x, values, w.scale, epilogue)


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
