"""Packed latents: a token holds a 2x2 patch of latent pixels, and has a position."""

import jax
import numpy as np

from models.vae import packing


def image_ids(rows: int, columns: int, first: int = 0) -> np.ndarray:
    """Return the position (first, row, column) of each token, float32 [rows * columns, 3]."""
    ids = np.stack(np.indices((1, rows, columns), np.float32), axis=-1).reshape(-1, 3)
    ids[:, 0] = first
    return ids


def pack(
    latents: jax.Array,  # [batch, height, width, channels], height and width even
) -> jax.Array:
    """Return [batch, tokens, 4 channels]; a token's channels are ordered channel, row, column."""
    packed = packing.pack(latents)
    return packed.reshape(packed.shape[0], -1, packed.shape[-1])


def unpack(
    latents: jax.Array,  # [batch, rows * columns, 4 channels]
    rows: int,
    columns: int,
) -> jax.Array:
    """Return [batch, 2 rows, 2 columns, channels]: the inverse of `pack`."""
    return packing.unpack(latents.reshape(latents.shape[0], rows, columns, -1))
