"""Packed latents: a token holds a 2x2 patch of latent pixels, and has a position."""

import jax
import numpy as np


def image_ids(rows: int, columns: int, first: int = 0) -> np.ndarray:
    """Return the position (first, row, column) of each token, float32 [rows * columns, 3]."""
    ids = np.stack(np.indices((1, rows, columns), np.float32), axis=-1).reshape(-1, 3)
    ids[:, 0] = first
    return ids


def pack(
    latents: jax.Array,  # [batch, height, width, channels], height and width even
) -> jax.Array:
    """Return [batch, tokens, 4 channels]; a token's channels are ordered channel, row, column."""
    batch, height, width, channels = latents.shape
    x = latents.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, 4 * channels)


def unpack(
    latents: jax.Array,  # [batch, rows * columns, 4 channels]
    rows: int,
    columns: int,
) -> jax.Array:
    """Return [batch, 2 rows, 2 columns, channels]: the inverse of `pack`."""
    x = latents.reshape(latents.shape[0], rows, columns, -1, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(x.shape[0], 2 * rows, 2 * columns, -1)
