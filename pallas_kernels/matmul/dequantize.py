"""Quantized weights in 16 bits, for products whose input isn't quantized.

On a GPU they are written by one kernel and multiplied by cuBLAS: XLA's own decoding of 4 bits
takes longer than the product.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.matmul import triton
from pallas_kernels.operands import Int8Rows, PackedRows, int8_values

__all__ = ["DEQUANTIZE", "dequantize"]


def _xla(w: Int8Rows | PackedRows, dtype: Any) -> jax.Array:
    return (int8_values(w).astype(jnp.float32) * w.scale).astype(dtype)


# The first that can run does.
DEQUANTIZE = Operation(
    name="dequantize",
    backends=(
        Backend(name="triton", run=triton.dequantize, why_not=triton.dequantize_why_not),
        Backend(name="xla", run=_xla),
    ),
)


def dequantize(
    w: Int8Rows | PackedRows,  # [n, k], symmetric, one scale a row
    dtype: Any,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """Return the weights themselves, [n, k]: value * scale in float32, rounded to a dtype.

    Args:
      w: the weights; others than `matmul` takes aren't meant.
      dtype: floating.
      implementation: a backend's name, several in order of preference, or None for the best.

    Raises:
      ValueError: a dtype that isn't floating, or a named implementation that can't run here.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}; it must be floating, such as bfloat16")
    return DEQUANTIZE(w, jnp.dtype(dtype), implementation=implementation)
