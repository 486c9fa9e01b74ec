"""Attention: the one function that every model here calls, and what stands before it in blocks.

Shapes: b batch, t tokens, h heads, d channels of a head.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.linear import Norm
from models.rope import apply_rope


def dot_product_attention(
    query: jax.Array,  # [batch, tokens, heads, head_dim]
    key: jax.Array,  # [batch, key_tokens, groups, head_dim], groups a divisor of heads
    value: jax.Array,  # [batch, key_tokens, groups, head_dim]
    *,
    causal: bool = False,  # whether a query sees no key behind its own token
    mask: jax.Array | None = None,  # bool, broadcasts to [batch, heads, tokens, key_tokens]
    bias: jax.Array | None = None,  # broadcasts to [batch, heads, tokens, key_tokens]
    scale: float | None = None,  # of the logits; 1 / sqrt(head_dim) if None
) -> jax.Array:
    """Return softmax(query key^T * scale + bias) value, [batch, tokens, heads, head_dim].

    The softmax is float32; the result has the dtype of `query`. Masked (False) keys get no weight.
    Neighbouring heads of a group share its keys and values.
    """
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        is_causal=causal,
        scale=scale,
        implementation="cudnn" if _fits_cudnn(query, mask, bias) else "xla",
    )


def _fits_cudnn(query: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> bool:
    """Whether cuDNN's flash attention runs this: plain 16-bit attention, traced on a GPU machine.

    cuDNN takes head sizes that are multiples of 8, and up to 128 on every generation.
    """
    head_dim = query.shape[-1]
    return (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and mask is None
        and bias is None
        and head_dim % 8 == 0
        and head_dim <= 128
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Where what one attention makes of its values comes from, and where it goes.

    A module with attention states these as `mixtures`, where values are rows of linears as they are
    and nothing but sums over tokens stands between them and other linears' inputs: what multiplies
    the channels of a head there may as well multiply the rows. Paths are of the module's linears.
    """

    values: tuple[tuple[str, int], ...]  # the linears, and the first of their rows that is a value
    rows: int  # of values in each: heads of keys times head_dim
    outputs: tuple[str, ...]  # the linears whose input begins with the mixtures
    columns: int  # of mixtures there: heads of queries times head_dim
    head_dim: int


def fused_mixture(
    layers: tuple[tuple[str, str], ...],  # what makes queries, keys, values, and what reads it
    columns: int,  # heads times head_dim
    head_dim: int,
) -> Mixture:
    """Return the mixture of streams whose values follow queries and keys, as many each."""
    return Mixture(
        values=tuple((qkv, 2 * columns) for qkv, _ in layers),
        rows=columns,
        outputs=tuple(out for _, out in layers if out),
        columns=columns,
        head_dim=head_dim,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Projected tokens of one stream, and the norms of its queries and keys."""

    qkv: jax.Array  # [b, t, at least 3 h d]: queries, keys, values, each [h, d]
    query_norm: nnx.RMSNorm  # over the channels of a head
    key_norm: nnx.RMSNorm


def qk_norm_rope(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2] or [b, 2, t, d / 2], for the tokens of all streams
    *,
    heads: int,
) -> tuple[jax.Array, ...]:
    """Return normed and rotated queries and keys, and values, of the joined streams, [b, t, h, d].

    Norms and rotations are float32, and rounded once.
    """
    parts = zip(*(_split_heads(stream, heads) for stream in streams), strict=True)
    q, k, v = (jnp.concatenate(part, axis=1) for part in parts)
    return *(apply_rope(x, rope).astype(v.dtype) for x in (q, k)), v


def _split_heads(stream: Stream, heads: int) -> tuple[jax.Array, ...]:
    """Return float32 normed queries and keys, and values, each [b, t, h, d]."""
    batch, tokens, _ = stream.qkv.shape
    d = stream.query_norm.num_features
    qkv = stream.qkv[..., : 3 * heads * d].reshape(batch, tokens, 3, heads, d)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    return stream.query_norm(q), stream.key_norm(k), v


def attend(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2] or [b, 2, t, d / 2], for the tokens of all streams
    *,
    heads: int,
    mask: jax.Array | None = None,  # bool [b, t]: False for keys that don't count
) -> tuple[jax.Array, ...]:
    """Return attention over the tokens of all streams, of each stream's tokens [b, t, h, d]."""
    mask = None if mask is None else mask[:, None, None, :]
    out = dot_product_attention(*qk_norm_rope(streams, rope, heads=heads), mask=mask)
    return apart(out, streams)


def apart(joined: jax.Array, streams: tuple[Stream, ...]) -> tuple[jax.Array, ...]:
    """Return the tokens of each stream, of [b, t of all streams, ...]."""
    ends = list(itertools.accumulate(stream.qkv.shape[1] for stream in streams))
    return tuple(jnp.split(joined, ends[:-1], axis=1))


def split_heads(
    x: jax.Array,  # [b, t, parts h d]
    heads: int,
    parts: int = 1,
) -> tuple[jax.Array, ...]:
    """Return the parts, such as queries, keys and values, each [b, t, h, d]."""
    return tuple(part.reshape(*part.shape[:2], heads, -1) for part in jnp.split(x, parts, axis=-1))


class JointAttention(nnx.Module):
    """Attention with rotary positions over the tokens of all streams; holds no weights."""

    def __init__(self, heads: int, head_dim: int):
        self.heads, self.head_dim = heads, head_dim
        # What may take its place: an RMSNorm of queries and keys, then a rotation of neighbouring
        # channels that is the same for all images, then attention without a mask.
        self.attention_of = "qk_norm_rope"
        self.attend = attend

    def __call__(
        self,
        *streams: Stream,
        rope: jax.Array,  # float32 [2, t, d / 2], or [b, 2, t, d / 2] where images differ
        mask: jax.Array | None = None,  # bool [b, t]: False for keys that don't count
    ) -> tuple[jax.Array, ...]:
        """Return [b, t, h d] of each stream's t tokens."""
        if rope.ndim == 3 and mask is None:
            outs = self.attend(streams, rope, heads=self.heads)
        else:
            outs = attend(streams, rope, heads=self.heads, mask=mask)
        return tuple(out.reshape(*out.shape[:2], -1) for out in outs)


class SelfAttention(nnx.Module):
    """The projections of one stream; the attention itself may join several."""

    def __init__(self, config: Any, *, last: bool = False, linear: Any, norm: Any):
        """Make them of a transformer's config: `hidden_size` and `attention_head_dim`.

        Args:
          config: the sizes.
          last: whether nothing reads the tokens any more, and only queries, keys, values are made.
          linear: makes a linear, as `models.linear.Linear` does.
          norm: makes the norm of a head's channels; None for a model without these.
        """
        hidden = config.hidden_size
        self.qkv = linear(hidden, 3 * hidden, role="attention_in")
        if not last:
            self.proj = linear(hidden, hidden, role="attention_out")
        self.query_norm = norm and norm(config.attention_head_dim)
        self.key_norm = norm and norm(config.attention_head_dim)

    def project(
        self,
        x: jax.Array,  # [b, t, c]
        norm: Norm,  # of [b, 1, c]
    ) -> Stream:
        """Return the queries, keys and values of the modulated x."""
        qkv = self.qkv(x, norm=norm)
        return Stream(qkv=qkv, query_norm=self.query_norm, key_norm=self.key_norm)
