"""Activations to decoded 8-bit operands, in plain jnp."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codec
from pallas_kernels.matmul.reference import gelu

NORM_EPSILON = 1e-6  # of the layer norm before the modulation, in every model here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Columns of an array, through an activation: a part of the rows to quantize."""

    array: jax.Array  # [m, at least start + size], floating
    start: int  # first column
    size: int  # columns
    activation: str | None = None  # "gelu": its tanh form

    @property
    def dtype(self) -> jnp.dtype:
        """That of the array."""
        return self.array.dtype


def quantize(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
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
    x = join(x)
    if norm is not None:
        x = modulate(x, *norm)
    values, scale, lo = codec.quantize_8bit(x, range=range)
    if bits == 4:
        codes, shifts = codec.encode(values, group_size=group_size, step=step, rounding=rounding)
        if packed:
            return codec.pack(codes), codec.pack(shifts), scale, lo
        values = codec.decode(codes, shifts, step=step)[:, : x.shape[1]]
    return codec.to_operand(values), scale, lo


def join(x: jax.Array | tuple[Part, ...]) -> jax.Array:
    """Return the parts side by side, [m, k]; an array is returned as it is.

    Activations are computed in float32 and rounded to the dtype of their array.
    """
    return x if not isinstance(x, tuple) else jnp.concatenate([_value(p) for p in x], axis=1)


def _value(part: Part) -> jax.Array:
    columns = part.array[:, part.start : part.start + part.size]
    if part.activation is None:
        return columns
    return _round(gelu(columns.astype(jnp.float32)), columns.dtype)


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
    return _round(y, x.dtype)


def _round(y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast float32 so that XLA keeps the rounding: a cast there and back it may leave out."""
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(y, bits.nexp, bits.nmant).astype(dtype)
