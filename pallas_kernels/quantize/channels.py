"""What happens to channels before they are quantized: a factor each, and a rotation of blocks.

The rotation is the regular Hadamard matrix of ConvRot (arXiv 2512.03673): the Kronecker power of

    four = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

divided by the root of its size. Every row and column sums to that root, so that no channel
collects the mean of its block, as the first channel of Sylvester's matrix does.

Float32 sums depend on their order, so the order is part of the definition, and every backend
follows it: one step for each factor of the Kronecker power, the one of neighbours first. A step
takes channels a, b, c, d, which lie 1, 4, 16 or 64 apart, to

    (a + b) + (c - d), (a + b) - (c - d), (c + d) + (a - b), (c + d) - (a - b).

There are no products but the last one, by a power of two, which is exact down to subnormal
numbers: nothing that a compiler could contract to a fused multiply-add changes a bit.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (16, 64, 256)  # channels of a block
_SMALLEST_NORMAL = 2.0**-126


def hadamard(size: int) -> np.ndarray:
    """Return the rotation of a block as a matrix, float32 [size, size]; it is symmetric.

    Args:
      size: one of `SIZES`, a power of four.
    """
    four: np.ndarray = np.ones((4, 4)) - 2 * np.eye(4)[::-1]
    matrix = functools.reduce(np.kron, [four] * round(math.log(size, 4)))
    return (matrix * root(size)).astype(np.float32)


def root(size: int) -> float:
    """Return what makes a rotation of blocks of `size` orthonormal, a power of two: 1/4 for 16."""
    return 1 / math.isqrt(size)


def rotate(
    x: jax.Array,  # [..., k], float32
    size: int,  # of a block; k is a multiple
) -> jax.Array:
    """Return the rotation of each block of channels, [..., k], float32, in the order above."""
    distance = 1
    while distance < size:
        x = _step(x, distance)
        distance *= 4
    return x * jnp.float32(root(size))


def rotate_from(
    x: jax.Array,  # [..., k], float32
    size: int,  # of a block
    first: int,  # channel that is rotated, a multiple of size; those before stay
) -> jax.Array:
    """Return x with the blocks from a channel on rotated, [..., k], float32."""
    if not first:
        return rotate(x, size)
    return jnp.concatenate([x[..., :first], rotate(x[..., first:], size)], axis=-1)


def scale_channels(
    x: jax.Array,  # [..., k], floating
    multiplier: jax.Array,  # [k], floating
) -> jax.Array:
    """Return x * multiplier, float32 [..., k], with subnormal factors and products as zeros.

    Some accelerators drop those. And what stands between a product and the sums of a rotation or
    the difference of a range keeps compilers from contracting them, which would change bits.
    """
    x, multiplier = (without_subnormals(a.astype(jnp.float32)) for a in (x, multiplier))
    return without_subnormals(x * multiplier)


def without_subnormals(x: jax.Array) -> jax.Array:
    """Return float32 with zeros in place of subnormal numbers."""
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, 0.0, x)


def _step(x: jax.Array, distance: int) -> jax.Array:
    """Rotate fours of channels that lie `distance` apart, without the factor 1/2."""
    fours = x.reshape(*x.shape[:-1], -1, 4, distance)
    a, b, c, d = (fours[..., i, :] for i in range(4))
    low, high = (a + b, c - d), (c + d, a - b)
    rotated = [low[0] + low[1], low[0] - low[1], high[0] + high[1], high[0] - high[1]]
    return jnp.stack(rotated, axis=-2).reshape(x.shape)
