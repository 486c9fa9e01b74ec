"""Attention without a mask: in 16 bits as cuDNN and XLA have it, and in 8 bits."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import check_array
from pallas_kernels.attention import dot_product, mosaic_gpu, reference
from pallas_kernels.attention.operands import (
    BLOCK,
    ONES,
    QuantizedHeads,
    quantize_heads,
    value_scale,
)
from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.gradients import no_gradient

__all__ = [
    "ATTENTION",
    "ATTENTION_INT8_FP8",
    "QuantizedHeads",
    "attention",
    "attention_int8_fp8",
    "quantize_heads",
    "value_scale",
]

# The first that can run does.
ATTENTION = Operation(
    name="attention",
    backends=(
        Backend(name="cudnn", run=dot_product.cudnn, why_not=dot_product.cudnn_why_not),
        Backend(name="xla", run=dot_product.xla),
    ),
)
ATTENTION_INT8_FP8 = Operation(
    name="attention_int8_fp8",
    backends=(
        Backend(name="mosaic_gpu", run=mosaic_gpu.attention_int8_fp8, why_not=mosaic_gpu.why_not),
        Backend(name="reference", run=reference.attention_int8_fp8),
    ),
)


def attention(
    q: jax.Array,  # [b, tq, heads, d], floating
    k: jax.Array,  # [b, tk, kv_heads, d], of the same dtype
    v: jax.Array,  # [b, tk, kv_heads, d], of the same dtype
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Return softmax(q k^T * scale) v of each head (arXiv 1706.03762, equation 1).

    Args:
      q: queries.
      k: keys, any number of them; query head i reads kv head i // (heads / kv_heads).
      v: values.
      scale: of the logits; 1 / sqrt(d) if None.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      [b, tq, heads, d] of q's dtype.

    Raises:
      ValueError: shapes or dtypes that don't fit together, or a named implementation can't run.
    """
    check_array("q", q, ("b", "tq", "heads", "d"), jnp.floating)
    batch, _, heads, d = q.shape
    check_array("k", k, (batch, "tk", "kv_heads", d), q.dtype)
    check_array("v", v, k.shape, q.dtype)
    _check_counts(heads, k.shape[2], k.shape[1])
    scale = _scale(scale, d)
    return ATTENTION(q, k, v, scale=scale, implementation=implementation)


@no_gradient("differentiate `attention`, in 16 bits")
def attention_int8_fp8(
    heads: QuantizedHeads,
    *,
    scale: float | None = None,
    streams: tuple[int, ...] | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, ...]:
    """Return softmax(q k^T * scale) v of each head, of codes in 8 bits.

    q k^T is exact in int32. Probabilities are float8_e4m3fn, by a code that is linear between
    powers of two (`reference.probabilities`); their sum and their products with the values are
    float32, 128 keys at a time, as in FlashAttention (arXiv 2205.14135, algorithm 1).

    Args:
      heads: as `quantize_heads` or `pallas_kernels.qk_norm_rope.qk_norm_rope_8bit` makes them.
      scale: of the logits; 1 / sqrt(d) if None.
      streams: tokens of each of the streams that were joined, whose results are wanted apart;
        None for one of all tokens.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      Of each stream [b, tokens, heads, d] in bfloat16.

    Raises:
      ValueError: arrays that don't fit together, or a named implementation can't run.
    """
    _check_heads(heads)
    streams = (heads.tokens,) if streams is None else tuple(streams)
    if sum(streams) != heads.tokens or min(streams, default=-1) < 0:
        raise ValueError(f"streams is {streams}; their sum must be the {heads.tokens} tokens")
    options = {"scale": _scale(scale, heads.q.shape[3]), "streams": streams}
    return ATTENTION_INT8_FP8(heads, **options, implementation=implementation)


def _scale(scale: Any, d: int) -> float:
    """Return the scale of the logits as a number of the program."""
    if scale is None:
        return 1 / math.sqrt(d)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it must be None or a finite number")
    return float(scale)


def _check_counts(heads: int, kv_heads: int, keys: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads; they must divide the {heads} heads of q")
    if keys < 1:
        raise ValueError("k has no tokens; there must be at least one key")


def _check_heads(heads: QuantizedHeads) -> None:
    if not isinstance(heads, QuantizedHeads):
        raise ValueError(
            f"heads is a {type(heads).__name__}; it must be QuantizedHeads, such as "
            "quantize_heads(q, k, v) returns"
        )
    check_array("q", heads.q, ("b", "tq", "heads", "d"), jnp.int8)
    batch, tq, count, d = heads.q.shape
    check_array("k", heads.k, (batch, "tk", "kv_heads", d), jnp.int8)
    _, tk, kv_heads, _ = heads.k.shape
    _check_counts(count, kv_heads, tk)
    for name, padded in (("q", tq), ("k", tk)):
        if padded % BLOCK:
            raise ValueError(f"{name} has {padded} tokens; they must be padded to {BLOCK}s")
    if not tq - BLOCK < heads.tokens <= tq:
        raise ValueError(f"tokens is {heads.tokens}; it must be what {tq} queries are padded from")
    check_array("q_scale", heads.q_scale, (batch, count, tq), jnp.float32)
    check_array("k_scale", heads.k_scale, (batch, kv_heads, tk // BLOCK), jnp.float32)
    check_array("v", heads.v, (batch, kv_heads, d + ONES, tk), jnp.float8_e4m3fn)
    if heads.v_scale is not None:
        check_array("v_scale", heads.v_scale, (batch, kv_heads, d), jnp.float32)
