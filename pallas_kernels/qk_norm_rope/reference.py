"""Norm and rotation of queries and keys, in plain jnp."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.operands import QuantizedHeads, quantize_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Projected tokens, and the scales and the epsilon of their norms."""

    # [b, t, at least 3 heads d]: queries, keys and values, each [heads, d]; more is left alone
    qkv: jax.Array
    query_scale: jax.Array  # [d]
    key_scale: jax.Array  # [d]
    # added to the mean of squares, of queries and of keys
    epsilon: float = dataclasses.field(metadata={"static": True})


def qk_norm_rope(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2]
    *,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries, keys and values; see `pallas_kernels.qk_norm_rope.qk_norm_rope`."""
    parts = zip(*(_project(stream, heads) for stream in streams), strict=True)
    q, k, v = (jnp.concatenate(part, axis=1) for part in parts)
    q, k = (_rotate(x, rope).astype(v.dtype) for x in (q, k))
    return q, k, v


def qk_norm_rope_8bit(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2]
    *,
    heads: int,
    v_scale: jax.Array | None = None,  # float32 [b, heads, d]
) -> QuantizedHeads:
    """Return codes and scales; see `pallas_kernels.qk_norm_rope.qk_norm_rope_8bit`."""
    return quantize_heads(*qk_norm_rope(streams, rope, heads=heads), v_scale=v_scale)


def _project(stream: Stream, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return float32 normed queries and keys, and values, [b, t, heads, d]."""
    batch, tokens, _ = stream.qkv.shape
    d = stream.query_scale.shape[0]
    qkv = stream.qkv[..., : 3 * heads * d].reshape(batch, tokens, 3, heads, d)
    q, k, v = (qkv[:, :, i] for i in range(3))
    q, k = (
        _norm(x, scale, stream.epsilon)
        for x, scale in ((q, stream.query_scale), (k, stream.key_scale))
    )
    return q, k, v


def _norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    factor = lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return wide * (factor * scale.astype(jnp.float32))


def _rotate(x: jax.Array, rope: jax.Array) -> jax.Array:
    """Turn neighbouring channels of x [b, t, heads, d] by the angles of rope [2, t, d / 2]."""
    cos, sin = rope[0, :, None], rope[1, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
