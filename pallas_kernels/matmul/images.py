"""Gates of several images in a product whose tiles lie within one of them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.operands import Branch, Epilogue, Int8Rows


def apart(
    x: Int8Rows,  # [m, k]
    epilogue: Epilogue,
    multiple: int,
) -> tuple[Int8Rows, Epilogue, Callable[[jax.Array], jax.Array]]:
    """Pad the rows of each image to a multiple, so that no tile of as many meets two gates.

    Args:
      x: as many rows of each image.
      epilogue: its gate of [n], or of [images, n].
      multiple: rows of a tile.

    Returns:
      x and epilogue with the rows of every image padded with zeros, unchanged where all rows have
      one gate or nothing is missing; and what takes the padding out of a result.
    """
    images, m = epilogue.images, x.shape[0]
    rows = m // images
    missing = -rows % multiple
    if images == 1 or not missing:
        return x, epilogue, lambda y: y[:m]

    def pad(array: jax.Array) -> jax.Array:
        by_image = array.reshape(images, rows, array.shape[-1])
        padded = jnp.pad(by_image, [(0, 0), (0, missing), (0, 0)])
        return padded.reshape(-1, array.shape[-1])

    def crop(y: jax.Array) -> jax.Array:
        by_image = y[: images * (rows + missing)].reshape(images, -1, y.shape[-1])
        return by_image[:, :rows].reshape(m, -1)

    branch, residual = epilogue.branch, epilogue.residual
    if branch is not None:
        branch = Branch(input=pad(branch.input), up=branch.up)
    residual = None if residual is None else pad(residual)
    epilogue = dataclasses.replace(epilogue, branch=branch, residual=residual)
    return jax.tree.map(pad, x), epilogue, crop
