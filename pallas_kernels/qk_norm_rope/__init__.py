"""What stands between the projections and the attention: norm and rotation of queries and keys."""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import check_array, check_tuple
from pallas_kernels.attention.operands import QuantizedHeads
from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.gradients import no_gradient
from pallas_kernels.qk_norm_rope import reference, triton, triton_8bit
from pallas_kernels.qk_norm_rope.reference import Stream

__all__ = [
    "QK_NORM_ROPE",
    "QK_NORM_ROPE_8BIT",
    "Stream",
    "qk_norm_rope",
    "qk_norm_rope_8bit",
]

# The first that can run does.
QK_NORM_ROPE = Operation(
    name="qk_norm_rope",
    backends=(
        Backend(name="triton", run=triton.qk_norm_rope, why_not=triton.why_not),
        Backend(name="reference", run=reference.qk_norm_rope),
    ),
    derivative=reference.qk_norm_rope,
)
QK_NORM_ROPE_8BIT = Operation(
    name="qk_norm_rope_8bit",
    backends=(
        Backend(name="triton", run=triton_8bit.qk_norm_rope_8bit, why_not=triton_8bit.why_not),
        Backend(name="reference", run=reference.qk_norm_rope_8bit),
    ),
)


def qk_norm_rope(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2]: cosine and sine of each token's rotation
    *,
    heads: int,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries and keys, normed and rotated, and values, of all streams one after another.

    A query x of a head becomes rotate(x * scale / sqrt(mean(x**2) + epsilon)), in float32 and then
    rounded to the dtype of qkv; so does a key. The norm is RMSNorm (arXiv 1910.07467, equation 4);
    the rotation turns channels 2i and 2i + 1 by the angle i of their token (RoPE, arXiv 2104.09864,
    equation 34). Values come as they are.

    Args:
      streams: with the same batch, width, head_dim and dtype.
      rope: for the tokens of all streams, t of them.
      heads: of queries, of keys and of values.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      queries, keys and values, each [b, t, heads, d] in the dtype of qkv.

    Raises:
      ValueError: shapes or dtypes that don't fit together, or a named implementation can't run.
    """
    _check(streams, rope, heads)
    return QK_NORM_ROPE(streams, rope, heads=heads, implementation=implementation)


@no_gradient("differentiate attention in 16 bits: qk_norm_rope, or a recipe's attention='bf16'")
def qk_norm_rope_8bit(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2]: cosine and sine of each token's rotation
    *,
    heads: int,
    v_scale: jax.Array | None = None,  # float32 [b, heads, d]
    implementation: Implementation = None,
) -> QuantizedHeads:
    """Return what 8-bit attention reads of all streams one after another.

    The queries, keys and values of `qk_norm_rope`, rounded as there to the dtype of qkv, and then
    quantized as `pallas_kernels.attention.quantize_heads` defines.

    Args:
      streams: with the same batch, width, head_dim and dtype.
      rope: for the tokens of all streams, t of them.
      heads: of queries, of keys and of values.
      v_scale: a scale for each channel of the values, known beforehand; None takes them as they
        are, up to +-448.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      Codes and scales; queries and keys of equal token counts and heads.

    Raises:
      ValueError: shapes or dtypes that don't fit together, or a named implementation can't run.
    """
    _check(streams, rope, heads)
    batch, d = streams[0].qkv.shape[0], streams[0].query_scale.shape[0]
    if d & (d - 1):
        raise ValueError(f"heads have {d} channels; a Hadamard matrix needs a power of two")
    if v_scale is not None:
        check_array("v_scale", v_scale, (batch, heads, d), jnp.float32)
    return QK_NORM_ROPE_8BIT(
        streams, rope, heads=heads, v_scale=v_scale, implementation=implementation
    )


def _check(streams: tuple[Stream, ...], rope: jax.Array, heads: int) -> None:
    check_tuple("streams", streams, Stream)
    for stream in streams:
        check_array("qkv", stream.qkv, ("b", "t", "columns"), jnp.floating)
        check_array("query_scale", stream.query_scale, ("d",), jnp.floating)
        check_array("key_scale", stream.key_scale, ("d",), jnp.floating)
        if not stream.epsilon >= 0:
            raise ValueError(f"epsilon is {stream.epsilon}; it must be at least 0")
    if heads < 1:
        raise ValueError(f"heads is {heads}; it must be at least 1")
    first = streams[0]
    (batch, _, columns), d = first.qkv.shape, first.query_scale.shape[0]
    for stream in streams:
        found = *stream.qkv.shape[::2], stream.qkv.dtype
        if found != (batch, columns, first.qkv.dtype):
            arrays = ", ".join(f"{s.qkv.dtype}{list(s.qkv.shape)}" for s in streams)
            raise ValueError(f"streams have qkv {arrays}; only their tokens may differ")
        if stream.query_scale.shape != (d,) or stream.key_scale.shape != (d,):
            raise ValueError("query_scale and key_scale of all streams must have the same shape")
    if d % 2 or columns < 3 * heads * d:
        raise ValueError(
            f"qkv has {columns} columns for {heads} heads of {d}; they must be at least "
            "3 heads * d, with an even d"
        )
    tokens = sum(stream.qkv.shape[1] for stream in streams)
    if rope.shape != (2, tokens, d // 2):
        raise ValueError(f"rope has shape {list(rope.shape)}; it must be {[2, tokens, d // 2]}")
