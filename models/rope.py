"""Rotary positions (RoPE, arXiv 2104.09864) over several axes, such as rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np


def rope_table(
    ids: jax.Array,  # [..., t, axes]: position of each token on each axis
    axes_dims: tuple[int, ...],  # channels of a head that each axis turns
    theta: float = 10000.0,  # base of the frequencies
) -> jax.Array:
    """Return cosine and sine of the rotation of each pair of channels, float32 [..., 2, t, d / 2].

    Angles are float32 whatever the model computes in: 16 bits tell no positions beyond 256 apart.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequency = jnp.asarray(theta ** (-np.arange(0, dim, 2) / dim), jnp.float32)
        angles.append(ids[..., axis, None].astype(jnp.float32) * frequency)
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-3)


def apply_rope(
    x: jax.Array,  # float32 [b, t, h, d]
    rope: jax.Array,  # float32 [2, t, d / 2], or [b, 2, t, d / 2]: from `rope_table`
) -> jax.Array:
    """Rotate neighbouring channels (2i, 2i + 1) of each token; same shape and dtype."""
    cos, sin = (rope[..., i, :, None, :] for i in range(2))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def apply_rope_halves(
    x: jax.Array,  # float32 [b, t, h, d]
    rope: jax.Array,  # float32 [2, t, d / 2], or [b, 2, t, d / 2]: from `rope_table`
) -> jax.Array:
    """Rotate channels i and i + d / 2 of each token, as language models do; like `apply_rope`."""
    cos, sin = (rope[..., i, :, None, :] for i in range(2))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
