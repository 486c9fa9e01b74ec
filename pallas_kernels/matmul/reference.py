"""Quantized matmul, written for reading: one int32 dot over all of K and a float32 epilogue."""

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from pallas_kernels.functions import gelu


def matmul(
    x: jax.Array,  # [m, k], int8
    w_codes: jax.Array,  # [n, k_padded / 2], uint8
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    group_size: int,
    step: str,
    **options,  # of `epilogue`
) -> jax.Array:
    """Multiply int8 activations by packed 4-bit weights; see `pallas_kernels.matmul.matmul`."""
    w = codec.decode_packed(w_codes, w_shifts, group_size=group_size, step=step)[:, : x.shape[1]]
    return matmul_int8(x, w, x_scale, w_scale, **options)


def matmul_int8(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    **options,  # of `epilogue`
) -> jax.Array:
    """Multiply int8 by int8; see `pallas_kernels.matmul.matmul_int8`."""
    acc = jnp.einsum("mk,nk->mn", x.astype(jnp.int32), w.astype(jnp.int32))
    return epilogue(acc, w, x_scale, w_scale, **options)


def epilogue(
    acc: jax.Array,  # [m, n], int32
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    x_lo: jax.Array | None = None,  # [m, 1], float32
    **options,  # of `finish`
) -> jax.Array:
    """Turn the integer dot into the result, in float32 and in this order, then cast.

    Symmetric x: y = acc * s_x * s_w, then `finish`.
    Asymmetric x, held minus 128, with c = sum over k of w:
    y = (acc + 128 c) * s_x * s_w + (lo_x * s_w) * c, then `finish`.
    A compiler may fuse a product with the addition after it.
    """
    w_scale = w_scale.T
    if x_lo is None:
        y = acc.astype(jnp.float32) * x_scale * w_scale
    else:
        column = jnp.sum(w, axis=1, dtype=jnp.int32)
        y = (acc + 128 * column).astype(jnp.float32) * x_scale * w_scale
        y = y + (x_lo * w_scale) * column.astype(jnp.float32)
    return finish(y, **options)


def finish(
    y: jax.Array,  # [m, n], float32
    *,
    bias: jax.Array | None = None,  # [n]
    activation: str | None = None,  # None or "gelu"
    gate: jax.Array | None = None,  # [n]
    residual: jax.Array | None = None,  # [m, n]
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """Return residual + gate * activation(y + bias), each where given, in float32, then cast."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation == "gelu":
        y = gelu(y)
    if gate is not None:
        y = gate.astype(jnp.float32) * y
    if residual is not None:
        y = residual.astype(jnp.float32) + y
    return y.astype(out_dtype)
