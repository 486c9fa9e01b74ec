"""Latents whose pixels hold a 2x2 patch each."""

import jax


def pack(
    latents: jax.Array,  # [batch, height, width, channels], height and width even
) -> jax.Array:
    """Return [batch, height / 2, width / 2, 4 channels], ordered channel, row, column."""
    batch, height, width, channels = latents.shape
    x = latents.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def unpack(
    latents: jax.Array,  # [batch, rows, columns, 4 channels]
) -> jax.Array:
    """Return [batch, 2 rows, 2 columns, channels]: the inverse of `pack`."""
    batch, rows, columns, _ = latents.shape
    x = latents.reshape(batch, rows, columns, -1, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * rows, 2 * columns, -1)
