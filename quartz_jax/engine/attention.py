"""Attention of models by kernels: norm and rotation in one pass, and 8 bits where asked for."""

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import jax
from flax import nnx

from pallas_kernels import device
from pallas_kernels.attention import attention, attention_int8_fp8
from pallas_kernels.attention.mosaic_gpu import device_why_not
from pallas_kernels.attention.reference import split
from pallas_kernels.qk_norm_rope import Stream, qk_norm_rope, qk_norm_rope_8bit

Attend = Callable[..., tuple[jax.Array, ...]]  # streams, rope, heads to [b, t, heads, d] each


class Attention(Protocol):
    """A module whose attention these functions can compute."""

    attend: Attend
    attention_format: str  # absent until `conversion.model.set_attention` notes it
    head_dim: int  # channels of a head; may be absent


def is_attention(module: nnx.Module) -> TypeGuard[Attention]:
    """Whether a module says that its `attend` is what these functions compute."""
    return getattr(module, "attention_of", None) == "qk_norm_rope"


def attention_of(format: str, head_dim: int | None = None) -> tuple[Attend, str]:
    """Return the function for this device, and in words what it is.

    Where the device has no attention in 8 bits it is in 16, which is nearer to the model.

    Args:
      format: that a recipe asks for.
      head_dim: channels of a head, or None where a model doesn't say.
    """
    if format == "bf16":
        return _attend, "16 bits"
    if reason := device_why_not(device.current(), head_dim):
        return _attend, f"16 bits, since in 8 bits it {reason}"
    return _attend_int8_fp8, "int8 and float8"


def _attend(streams: tuple[Any, ...], rope: jax.Array, *, heads: int) -> tuple[jax.Array, ...]:
    """Return attention over the tokens of all streams, of each stream's, in their dtype."""
    return split(attention(*qk_norm_rope(_streams(streams), rope, heads=heads)), _sizes(streams))


def _attend_int8_fp8(
    streams: tuple[Any, ...], rope: jax.Array, *, heads: int
) -> tuple[jax.Array, ...]:
    """Return the same with codes in 8 bits, where the kernel takes such heads."""
    if device_why_not(device.current(), rope.shape[2] * 2):
        return _attend(streams, rope, heads=heads)
    quantized = qk_norm_rope_8bit(_streams(streams), rope, heads=heads)
    outs = attention_int8_fp8(quantized, streams=_sizes(streams))
    return tuple(out.astype(streams[0].qkv.dtype) for out in outs)


def _sizes(streams: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the tokens of each stream."""
    return tuple(stream.qkv.shape[1] for stream in streams)


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
