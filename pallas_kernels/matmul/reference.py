"""Quantized matmul, written for reading: one int32 dot over all of K and a float32 epilogue."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.functions import gelu, gelu_of_tanh
from pallas_kernels.gradients import straight_through
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows, int8_values


def matmul(
    x: Int8Rows,  # [m, k]
    w: Int8Rows | PackedRows,  # [n, k]
    epilogue: Epilogue,
) -> jax.Array:
    """Decode the weights and multiply; see `pallas_kernels.matmul.matmul`."""
    values = int8_values(w)
    acc = jnp.einsum("mk,nk->mn", x.values.astype(jnp.int32), values.astype(jnp.int32))
    return apply(acc, x, values, w.scale, epilogue)


def apply(
    acc: jax.Array,  # [m, n], int32
    x: Int8Rows,  # [m, k]
    w: jax.Array,  # [n, k], int8
    w_scale: jax.Array,  # [n, 1], float32
    epilogue: Epilogue,
) -> jax.Array:
    """Turn the integer dot into the result, [m, n] of the epilogue's out_dtype."""
    column = None if x.lo is None else jnp.sum(w, axis=1, dtype=jnp.int32)[None]
    return finish(scale_sums(acc, x.scale, w_scale.T, x.lo, column), epilogue)


def scale_sums(
    acc: jax.Array,  # [m, n], int32, or float32 made of it
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [1, n], float32
    x_lo: jax.Array | None = None,  # [m, 1], float32: given if x is asymmetric
    column: jax.Array | None = None,  # [1, n], int32: c, the sums over k of w; with x_lo
    offset: int = 128,  # that asymmetric values have been lowered by
) -> jax.Array:
    """Return the product of the dequantized operands, float32 [m, n], in this order.

    Symmetric x: acc * s_x * s_w. Asymmetric x: (acc + offset c) * s_x * s_w + (lo_x * s_w) * c.
    A compiler may fuse a product with the addition after it.
    """
    if x_lo is None or column is None:
        return acc.astype(jnp.float32) * x_scale * w_scale
    y = (acc + offset * column).astype(jnp.float32) * x_scale * w_scale
    return y + (x_lo * w_scale) * column.astype(jnp.float32)


def finish(
    y: jax.Array,  # [m, n], float32
    epilogue: Epilogue,  # its columns [n] or [1, n], and its gate of as many images as divide m
) -> jax.Array:
    """Return residual + gate * activation(y + branch + bias), in float32, then cast."""
    if epilogue.branch is not None:
        y = y + branch_product(epilogue.branch)
    if epilogue.bias is not None:
        y = y + epilogue.bias.astype(jnp.float32)
    if epilogue.activation == "gelu":
        y = gelu(y)
    if epilogue.gate is not None:
        gate = epilogue.gate.astype(jnp.float32)
        if epilogue.images > 1:
            gate = jnp.repeat(gate, y.shape[0] // epilogue.images, axis=0)
        y = gate * y
    if epilogue.residual is not None:
        y = epilogue.residual.astype(jnp.float32) + y
    return y.astype(epilogue.out_dtype)


def in_floats(
    x: jax.Array,  # [m, k], floating
    w: jax.Array,  # [n, k], floating
    epilogue: Epilogue,
) -> jax.Array:
    """Return what the product stands for, [m, n] of out_dtype: what JAX differentiates.

    Operands are rounded to out_dtype, as those of a linear in that dtype are.
    """
    dtype = jnp.dtype(epilogue.out_dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    y = jnp.einsum(
        "mk,nk->mn",
        x.astype(dtype),
        w.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    y = finish(y, Epilogue(bias=epilogue.bias, branch=epilogue.branch, out_dtype=jnp.float32))
    y = y if epilogue.activation is None else gelu_of_tanh(y)
    return finish(y, dataclasses.replace(epilogue, bias=None, branch=None, activation=None))


def floats_of(
    rows: Int8Rows | PackedRows,  # [m, k], one scale a row
    source: jax.Array | None,  # [m, k]: that the rows were made of, if it is known
) -> jax.Array:
    """Return what rows stand for, float32 [m, k], with the derivative of their source."""
    values = int8_values(rows).astype(jnp.float32)
    values = values * rows.scale if rows.lo is None else (values + 128) * rows.scale + rows.lo
    return straight_through(values, source)


def branch_product(branch: Branch) -> jax.Array:
    """Return input times up^T, [m, n], summed in float32 in any order."""
    # The default of accelerators would round float32 operands to fewer bits.
    precision = lax.Precision.HIGHEST if branch.up.dtype == jnp.float32 else None
    return jnp.dot(
        branch.input, branch.up.T, precision=precision, preferred_element_type=jnp.float32
    )
