"""Latents as tokens of square patches with fixed positions, as vision transformers have them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def sincos_positions(
    rows: int,
    columns: int,
    channels: int,
    base: int,  # positions along a side that the model was trained with
    scale: float = 1.0,  # by which positions lie closer
) -> np.ndarray:
    """Return what is added to tokens, float32 [rows columns, channels]; columns' channels first.

    Any grid spans the positions of a square of `base` tokens (`get_2d_sincos_pos_embed` of
    diffusers' `models/embeddings.py`).
    """
    across, down = (
        np.arange(size, dtype=np.float32) / np.float32(size / base) / np.float32(scale)
        for size in (columns, rows)
    )
    shape = (rows, columns, channels // 2)
    halves = (_sincos(across, channels // 2)[None], _sincos(down, channels // 2)[:, None])
    both = np.concatenate([np.broadcast_to(half, shape) for half in halves], axis=-1)
    return both.reshape(rows * columns, channels)


def _sincos(positions: np.ndarray, channels: int) -> np.ndarray:
    """Return sines, then cosines, of falling frequencies, float32 [positions, channels]."""
    frequencies = 10000.0 ** -(np.arange(channels // 2) / (channels / 2))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class PatchEmbed(nnx.Module):
    """Latents [b, channels, height, width] to tokens, one a patch, without positions."""

    def __init__(self, channels: int, hidden: int, patch: int, **options):  # of nnx.Conv
        self.channels, self.patch = channels, patch
        size = (patch, patch)
        self.proj = nnx.Conv(channels, hidden, size, strides=size, padding="VALID", **options)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Return tokens [b, rows, columns, c].

        Raises:
          ValueError: the latents have another shape.
        """
        shape = latents.shape
        if len(shape) != 4 or shape[1] != self.channels or any(x % self.patch for x in shape[2:]):
            raise ValueError(
                f"hidden_states has shape {list(shape)}; it must be [b, {self.channels}, height, "
                f"width], both multiples of {self.patch}"
            )
        return self.proj(latents.transpose(0, 2, 3, 1))


def unpatch(
    tokens: jax.Array,  # [b, rows columns, patch**2 channels]: rows, columns, channels of a patch
    grid: tuple[int, int],  # rows, columns
    patch: int,
) -> jax.Array:
    """Return latents [b, channels, height, width]."""
    y = tokens.reshape(len(tokens), *grid, patch, patch, -1).transpose(0, 5, 1, 3, 2, 4)
    return y.reshape(*y.shape[:2], grid[0] * patch, grid[1] * patch)


def add_positions(
    tokens: jax.Array,  # [b, rows, columns, c]
    base: int,
    scale: float = 1.0,
) -> jax.Array:
    """Return tokens [b, rows columns, c] with `sincos_positions` added."""
    batch, rows, columns, channels = tokens.shape
    positions = jnp.asarray(sincos_positions(rows, columns, channels, base, scale))
    flat = tokens.reshape(batch, rows * columns, channels)
    return (flat.astype(jnp.float32) + positions).astype(tokens.dtype)
