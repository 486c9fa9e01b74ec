"""What 8-bit attention reads: codes of queries, keys and values in the kernel's order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.gradients import no_gradient

BLOCK = 128  # tokens that share a key's scale; what queries and keys are padded to
ONES = 16  # rows of ones below V^T, whose products are the sums of the probabilities
INT8_MAX, E4M3_MAX = 127, 448  # the largest codes
# The token at each place of 16 of V^T: a thread's columns of the first product are then consecutive
# bytes of the register that the second one reads.
V_ORDER = np.array([8 * (i % 4 // 2) + 2 * (i // 4) + i % 2 for i in range(16)])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "q_scale", "k", "k_scale", "v", "v_scale"],
    meta_fields=["tokens"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedHeads:
    """Queries, keys and values in 8 bits; tq and tk are padded to multiples of `BLOCK`.

    Queries and keys have gone through the same rotation of their channels, which leaves their
    products alone. What pads queries is left out of the result. What pads keys repeats the last
    one, so that no maximum changes, and has zeros for values and ones.
    """

    q: jax.Array  # [b, tq, heads, d], int8
    q_scale: jax.Array  # [b, heads, tq], float32: a query is its codes times its scale
    k: jax.Array  # [b, tk, kv_heads, d], int8; kv_heads divides heads
    k_scale: jax.Array  # [b, kv_heads, tk / BLOCK], float32
    # [b, kv_heads, d + ONES, tk], float8_e4m3fn: V^T above rows of ones, each 16 tokens in V_ORDER
    v: jax.Array
    v_scale: jax.Array | None  # [b, kv_heads, d], float32; None for 1
    tokens: int  # queries before padding


def hadamard(d: int) -> np.ndarray:
    """Return Sylvester's Hadamard matrix of +-1, [d, d] of a power of two, symmetric, float32."""
    signs = np.ones((1, 1), np.float32)
    while len(signs) < d:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


@no_gradient("differentiate `attention`, in 16 bits")
def quantize_heads(
    q: jax.Array,  # [b, tq, heads, d], floating
    k: jax.Array,  # [b, tk, kv_heads, d], floating
    v: jax.Array,  # [b, tk, kv_heads, d], floating
    *,
    v_scale: jax.Array | None = None,  # [b, kv_heads, d], float32
) -> QuantizedHeads:
    """Return what 8-bit attention reads of queries, keys and values; the definition, in jnp.

    The channels of queries and keys are rotated by a Hadamard matrix, which spreads outliers
    (QuaRot, arXiv 2404.00456, section 4.2), and rounded to int8, a query under its own largest
    element, `BLOCK` keys under theirs. Values are rounded to float8_e4m3fn after division by their
    scale and end at +-448.

    Args:
      q: queries; d is a power of two.
      k: keys, any number of them.
      v: values.
      v_scale: a scale for each channel, such as `value_scale` returns; None takes values as they
        are, which needs nothing of all tokens beforehand.

    Returns:
      Codes and scales.
    """
    tokens, keys = q.shape[1], k.shape[1]
    q, q_size = _rotated(q, BLOCK, axes=(-1,))
    k, k_size = _rotated(k, BLOCK, axes=(2, 4), blocks=True)
    wide = v.astype(jnp.float32)
    if v_scale is not None:
        wide = wide / v_scale[:, None]
    ones = jnp.ones((*v.shape[:3], ONES), jnp.float32)
    wide = jnp.clip(jnp.concatenate([wide, ones], axis=3), -E4M3_MAX, E4M3_MAX)
    codes = _pad(wide, -keys % BLOCK, "constant").astype(jnp.float8_e4m3fn)
    return QuantizedHeads(
        q=q,
        q_scale=q_size.transpose(0, 2, 1),
        k=k,
        k_scale=k_size.transpose(0, 2, 1),
        v=to_kernel_order(codes.transpose(0, 2, 3, 1)),
        v_scale=v_scale,
        tokens=tokens,
    )


def value_scale(v: jax.Array) -> jax.Array:
    """Return the scale [b, kv_heads, d] at which the largest values [b, tk, ...] become 448."""
    largest = jnp.max(jnp.abs(v.astype(jnp.float32)), axis=1)
    return jnp.where(largest == 0, 1, largest) / E4M3_MAX


def to_kernel_order(v: jax.Array) -> jax.Array:
    """Bring the tokens of [..., tk] to `V_ORDER` within each 16."""
    return v.reshape(*v.shape[:-1], -1, 16)[..., V_ORDER].reshape(v.shape)


def from_kernel_order(v: jax.Array) -> jax.Array:
    """Undo `to_kernel_order`."""
    return v.reshape(*v.shape[:-1], -1, 16)[..., np.argsort(V_ORDER)].reshape(v.shape)


def _pad(x: jax.Array, missing: int, mode: str) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)), mode=mode)


def _rotated(
    x: jax.Array, block: int, *, axes: tuple[int, ...], blocks: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return int8 codes [b, padded t, heads, d] and scales [b, t or blocks, heads]."""
    d = x.shape[-1]
    x = _pad(x, -x.shape[1] % block, "edge")
    # Sums of +-x: the matrix's factor of 1 / sqrt(d) goes to the scale.
    sums = jnp.matmul(x.astype(jnp.float32), hadamard(d), precision=lax.Precision.HIGHEST)
    grouped = sums.reshape(x.shape[0], -1, block, *x.shape[2:]) if blocks else sums
    largest = jnp.max(jnp.abs(grouped), axis=axes, keepdims=True)
    largest = jnp.where(largest == 0, 1, largest)
    # XLA's maximum over several axes may lose NaN, which a code can't hold: the scale does.
    largest = largest + 0 * jnp.sum(grouped, axis=axes, keepdims=True)
    codes = jnp.round(grouped * (INT8_MAX / largest)).astype(jnp.int8).reshape(sums.shape)
    return codes, jnp.squeeze(largest, axes) * (1 / (INT8_MAX * d**0.5))
