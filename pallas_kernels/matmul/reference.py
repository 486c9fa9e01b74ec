"""Quantized matmul, written for reading: one int32 dot over all of K and a float32 epilogue."""

import jax
import jax.numpy as jnp

from pallas_kernels import codec


def matmul(
    x: jax.Array,  # [m, k], int8
    w_codes: jax.Array,  # [n, k_padded / 2], uint8
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    bias: jax.Array | None = None,  # [n]
    x_lo: jax.Array | None = None,  # [m, 1], float32
    group_size: int,
    step: str,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """Multiply int8 activations by packed 4-bit weights; see `pallas_kernels.matmul.matmul`."""
    w = codec.decode_packed(w_codes, w_shifts, group_size=group_size, step=step)[:, : x.shape[1]]
    return matmul_int8(x, w, x_scale, w_scale, bias=bias, x_lo=x_lo, out_dtype=out_dtype)


def matmul_int8(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    bias: jax.Array | None = None,  # [n]
    x_lo: jax.Array | None = None,  # [m, 1], float32
    out_dtype: jnp.dtype,
) -> jax.Array:
    """Multiply int8 by int8; see `pallas_kernels.matmul.matmul_int8`."""
    acc = jnp.einsum("mk,nk->mn", x.astype(jnp.int32), w.astype(jnp.int32))
    return epilogue(acc, w, x_scale, w_scale, bias=bias, x_lo=x_lo, out_dtype=out_dtype)


def epilogue(
    acc: jax.Array,  # [m, n], int32
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    bias: jax.Array | None,  # [n]
    x_lo: jax.Array | None,  # [m, 1], float32
    out_dtype: jnp.dtype,
) -> jax.Array:
    """Turn the integer dot into the result, in float32 and in this order, then cast.

    Symmetric x: y = acc * s_x * s_w + bias.
    Asymmetric x, held minus 128, with c = sum over k of w:
    y = (acc + 128 c) * s_x * s_w + (lo_x * s_w) * c + bias.
    A compiler may fuse a product with the addition after it.
    """
    w_scale = w_scale.T
    if x_lo is None:
        y = acc.astype(jnp.float32) * x_scale * w_scale
    else:
        column = jnp.sum(w, axis=1, dtype=jnp.int32)
        y = (acc + 128 * column).astype(jnp.float32) * x_scale * w_scale
        y = y + (x_lo * w_scale) * column.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)
