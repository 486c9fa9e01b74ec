"""Activations to decoded 8-bit operands, in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from pallas_kernels.functions import Norm, Part, join, modulate


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
        shift, scale = norm
        x = modulate(x, Norm(shift=shift, scale=1 + scale.astype(jnp.float32)))
    values, scale, lo = codec.quantize_8bit(x, range=range)
    if bits == 4:
        codes, shifts = codec.encode(values, group_size=group_size, step=step, rounding=rounding)
        if packed:
            return codec.pack(codes), codec.pack(shifts), scale, lo
        values = codec.decode(codes, shifts, step=step)[:, : x.shape[1]]
    return codec.to_operand(values), scale, lo
