"""Attention in 16 bits as it comes: cuDNN's and XLA's, behind JAX's own function."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import device


def attention(
    q: jax.Array,  # [b, tq, heads, d]
    k: jax.Array,  # [b, tk, kv_heads, d]
    v: jax.Array,  # [b, tk, kv_heads, d]
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """Return the attention; see `pallas_kernels.attention.attention`."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=implementation)


cudnn = functools.partial(attention, implementation="cudnn")
xla = functools.partial(attention, implementation="xla")


def cudnn_why_not(target: device.Device, q: jax.Array, *args, **kwargs) -> str | None:
    """Say why cuDNN's flash attention can't run these arguments, or return None.

    It takes head sizes that are multiples of 8, and up to 128 on every generation.
    """
    if target.platform != "gpu" or target.generation < 80:
        return f"needs an NVIDIA GPU from Ampere on, not {target.kind}"
    if jax.default_backend() != "gpu":
        return "JAX asks this machine for cuDNN's version, and it has no GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit floats, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"needs heads of a multiple of 8 of channels, at most 128, not {q.shape[3]}"
    return None
