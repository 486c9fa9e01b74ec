"""GPTQ: column by column, later columns making up for the errors of earlier ones."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from quartz_jax.formats import Format, Stored
from quartz_jax.formats.base import Kept, Scales, pad, split
from quartz_jax.rounding.base import Rounding
from quartz_jax.schema import part
from quartz_jax.transforms.base import HIGHEST, Layer, Need


@part("gptq")
class Gptq(Rounding):
    """GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1), for any format.

    Columns are rounded one after the other; the error of each, weighted by the inverse Hessian of
    the layer's output error, is made up for by the columns still to come. A block's scales are
    found when its first column is reached, from the weights as they are by then; what rows or
    the tensor share is found before the start, as are scales that depend on other blocks. Columns
    keep their order.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self):
        if not 0 < self.damping < 1:
            raise ValueError(f"damping is {self.damping!r}; it must lie between 0 and 1")

    def store(self, layer: Layer, format: Format) -> Stored:
        """Return the weight, rounded so that the layer's outputs on what it has seen change least.

        Raises:
          ValueError: nothing was seen.
        """
        if layer.seen.gram is None:
            raise ValueError("rounding by GPTQ needs recorded inputs; calibrate first")
        return _gptq(layer.weight, inverse_factor(layer.seen.gram, self.damping), format)


@functools.partial(jax.jit, static_argnums=1)
def inverse_factor(
    gram: jax.Array,  # float32 [k, k]: mean of x^T x, the Hessian
    damping: float,
) -> jax.Array:
    """Return the upper Cholesky factor of the damped Hessian's inverse, float32 [k, k].

    Channels that are always zero get a Hessian of one: their weights don't matter.
    """
    diagonal = jnp.diagonal(gram)
    dead = jnp.where(diagonal == 0, 1.0, 0.0)
    identity = jnp.eye(len(diagonal))
    hessian = gram + identity * (dead + damping * jnp.mean(diagonal))
    lower = jnp.linalg.cholesky(hessian)
    inverse = jax.scipy.linalg.cho_solve((lower, True), identity)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


@functools.partial(jax.jit, static_argnums=2)
def _gptq(
    weight: jax.Array,  # float32 [n, k]
    factor: jax.Array,  # float32 [k, k], upper triangular
    format: Format,
) -> Stored:
    n, k = weight.shape
    row = format.scale_block or k
    size = format.block or row  # columns whose scales are found together
    padded = -(-k // row) * row if format.scale_block else -(-k // size) * size
    factor = jnp.pad(factor, [(0, padded - k)] * 2)
    factor = factor + jnp.diag(jnp.where(jnp.arange(padded) < k, 0.0, 1.0))
    rows = split(pad(weight, row, format.padding_mode), row)  # [n, scale blocks, row]
    if format.scale_block:
        outer = format.outer(rows)  # [n, scale blocks, 1]
    else:
        outer = jax.tree.map(lambda leaf: leaf[:, None], format.outer(weight))
    weight = pad(weight, padded, format.padding_mode)
    found = None if format.blocks_apart else format.inner(split(weight, size), outer)

    def block_step(weight: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple]:
        start = index * size
        shared = _at(outer, start // row)
        part = _pick(weight, start, size)
        inner_factor = jax.lax.dynamic_slice(factor, (start, start), (size, size))
        scales = format.inner(part, shared) if found is None else _at(found, index)
        codes, errors = _round_block(part, inner_factor, shared, scales, format)
        later = jax.lax.dynamic_slice(factor, (start, 0), (size, padded))
        weight = weight - jnp.matmul(errors, later, precision=HIGHEST)
        return weight, (codes.astype(jnp.int16), format.keep(shared, scales))

    _, (codes, kept) = jax.lax.scan(block_step, weight, jnp.arange(padded // size))
    blocks = row // size if format.scale_block else padded // size  # of a row
    codes, kept = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(n, -1, blocks, leaf.shape[-1]), (codes, kept)
    )
    kept = {name: x[:, :, :1] if name.startswith("row_") else x for name, x in kept.items()}
    if not format.scale_block:
        codes, kept = jax.tree.map(lambda leaf: leaf[:, 0], (codes, kept))
    return format.assemble(codes.astype(jnp.int32), kept, k)


def _round_block(
    part: jax.Array,  # float32 [n, size]: the block's columns
    factor: jax.Array,  # float32 [size, size], upper triangular
    shared: Scales,
    scales: Scales,
    format: Format,
) -> tuple[jax.Array, jax.Array]:
    """Round the columns of a block in their order; return codes int32 and weighted errors."""
    kept: Kept = format.keep(shared, scales)

    def column_step(j, state):
        part, errors, codes = state
        column = jax.lax.dynamic_slice(part, (0, j), (part.shape[0], 1))
        code = format.encode(column, shared, scales)
        error = (column - format.decode(code, kept)) / factor[j, j]
        part = part - error * factor[j]  # zero for the columns before j
        put = jax.lax.dynamic_update_slice
        return part, put(errors, error, (0, j)), put(codes, code, (0, j))

    state = (part, jnp.zeros_like(part), jnp.zeros(part.shape, jnp.int32))
    _, errors, codes = jax.lax.fori_loop(0, part.shape[1], column_step, state)
    return codes, errors


def _at(scales: Scales, index: jax.Array) -> Scales:
    """Return the scales of one block, leaves [n, 1] of [n, blocks, 1]."""
    return jax.tree.map(lambda leaf: _pick(leaf, index, 1)[:, 0], scales)


def _pick(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Return `size` columns of x [n, ...] from a traced start."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
