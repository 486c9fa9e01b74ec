"""Activations to decoded 8-bit operands, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codec

NORM_EPSILON = 1e-6  # of the layer norm before the modulation, in every model here


def quantize(
    x: jax.Array,  # [m, k], floating
    *,
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    norm: tuple[jax.Array, jax.Array] | None = None,  # shift [k], scale [k]
    packed: bool = False,
) -> tuple[jax.Array | None, ...]:
    """Quantize each row; see `pallas_kernels.quantize.quantize`."""
    if norm is not None:
        x = modulate(x, *norm)
    values, scale, lo = codec.quantize_8bit(x, range=range)
    if bits == 4:
        codes, shifts = codec.encode(values, group_size=group_size, step=step, rounding=rounding)
        if packed:
            return codec.pack(codes), codec.pack(shifts), scale, lo
        values = codec.decode(codes, shifts, step=step)[:, : x.shape[1]]
    return codec.to_operand(values), scale, lo


def modulate(
    x: jax.Array,  # [..., k]
    shift: jax.Array,  # [..., k] or [k]
    scale: jax.Array,  # [..., k] or [k]
) -> jax.Array:
    """Return layer_norm(x) * (1 + scale) + shift, from float32 rounded to the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPSILON)
    y = wide * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    # A cast there and back is left out by XLA where it may keep excess precision; this is not.
    bits = jnp.finfo(x.dtype)
    return lax.reduce_precision(y, bits.nexp, bits.nmant).astype(x.dtype)
