"""Attention of models by kernels: norm and rotation in one pass, and 8 bits where asked for."""

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import jax
from flax import nnx

from pallas_kernels import device
from pallas_kernels.attention import attention, attention_int8_fp8
from pallas_kernels.attention.mosaic_gpu import device_why_not
from pallas_kernels.qk_norm_rope import Stream, qk_norm_rope, qk_norm_rope_8bit

Attend = Callable[..., jax.Array]  # streams, rope and heads to [b, t, heads, d]


class Attention(Protocol):
    """A module whose attention these functions can compute."""

    attend: Attend
    attention_format: str  # absent until `conversion.model.set_attention` notes it


def is_attention(module: nnx.Module) -> TypeGuard[Attention]:
    """Whether a module says that its `attend` is what these functions compute."""
    return getattr(module, "attention_of", None) == "qk_norm_rope"


def attention_of(format: str) -> tuple[Attend, str]:
    """Return the function for this device, and in words what it is.

    Where the device has no attention in 8 bits it is in 16, which is nearer to the model.
    """
    if format == "bf16":
        return _attend, "16 bits"
    if reason := device_why_not(device.current()):
        return _attend, f"16 bits, since in 8 bits it {reason}"
    return _attend_int8_fp8, "int8 and float8"


def _attend(streams: tuple[Any, ...], rope: jax.Array, *, heads: int) -> jax.Array:
    """Return attention over the tokens of all streams, in their dtype."""
    return attention(*qk_norm_rope(_streams(streams), rope, heads=heads))


def _attend_int8_fp8(streams: tuple[Any, ...], rope: jax.Array, *, heads: int) -> jax.Array:
    """Return the same with codes in 8 bits."""
    quantized = qk_norm_rope_8bit(_streams(streams), rope, heads=heads)
    return attention_int8_fp8(quantized).astype(streams[0].qkv.dtype)


def _streams(
    streams: tuple[Any, ...],  # `models.attention.Stream`: qkv, query_norm and key_norm
) -> tuple[Stream, ...]:
    return tuple(
        Stream(
            qkv=stream.qkv,
            query_scale=stream.query_norm.scale.get_value(),
            key_scale=stream.key_norm.scale.get_value(),
            epsilon=_epsilon(stream),
        )
        for stream in streams
    )


def _epsilon(stream: Any) -> float:
    """Return the epsilon of both norms; raises ValueError where they differ."""
    query, key = stream.query_norm.epsilon, stream.key_norm.epsilon
    if query != key:
        raise ValueError(
            f"query_norm has epsilon {query} and key_norm {key}; they must be the same"
        )
    return query
