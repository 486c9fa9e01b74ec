"""Activations to decoded 8-bit operands, in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from pallas_kernels.functions import Norm, Part, join, modulate_images
from pallas_kernels.quantize.channels import rotate_from, scale_channels


def quantize(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
    *,
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    levels: str = "uniform",
    norm: Norm | None = None,  # of [k] or [images, k]
    multiplier: jax.Array | None = None,  # [k]
    rotation: int | None = None,  # channels of a block
    rotated_from: int = 0,  # first channel that is rotated
    wide: jax.Array | None = None,  # bool [groups]
    packed: bool = False,
) -> tuple[jax.Array | None, ...]:
    """Quantize each row; see `pallas_kernels.quantize.quantize`.

    Returns:
      int8 values [m, k], or if packed codes and shifts; then scale and lo, float32 [m, 1].
    """
    x = before(x, norm, multiplier, rotation=rotation, rotated_from=rotated_from)
    values, scale, lo = codec.quantize_8bit(x, range=range)
    if bits == 4:
        codes, shifts = codec.encode(
            values, group_size=group_size, step=step, levels=levels, rounding=rounding
        )
        if packed:
            return codec.pack(codes), codec.pack(shifts), scale, lo
        decoded = codec.decode(codes, shifts, step=step, levels=levels)[:, : x.shape[1]]
        values = decoded if wide is None else _keep(values, decoded, wide, group_size)
    return codec.to_operand(values), scale, lo


def before(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
    norm: Norm | None = None,  # of [k] or [images, k]
    multiplier: jax.Array | None = None,  # [k]
    *,
    rotation: int | None = None,  # channels of a block
    rotated_from: int = 0,  # first channel that is rotated
) -> jax.Array:
    """Return the floats that are quantized, [m, k]: float32 behind a multiplier or a rotation."""
    x = join(x)
    if norm is not None:
        x = modulate_images(x, norm)
    if multiplier is not None:
        x = scale_channels(x, multiplier)
    return x if rotation is None else rotate_from(x.astype(jnp.float32), rotation, rotated_from)


def _keep(
    values: jax.Array,  # [m, k]
    decoded: jax.Array,  # [m, k]
    wide: jax.Array,  # bool [groups]
    group_size: int,
) -> jax.Array:
    """Return the 8-bit values of wide groups, and what 4 bits left of the others."""
    return jnp.where(jnp.repeat(jnp.asarray(wide), group_size)[: values.shape[1]], values, decoded)
