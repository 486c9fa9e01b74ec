"""The one attention function that every model here calls."""

import jax
import jax.numpy as jnp


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
