"""How weights are rounded to a format, once the layer was transformed."""

import functools

import jax
import jax.numpy as jnp

from quartz_jax.formats import NumberFormat
from quartz_jax.formats.base import pad_edge, split
from quartz_jax.schema import part

_HIGHEST = jax.lax.Precision.HIGHEST


@part
class Nearest:
    """Every weight to the nearest value of the format."""

    def __call__(
        self,
        weight: jax.Array,  # float32 [n, k]
        rows: jax.Array | None,  # inputs of the layer, float32 [samples, k]; unused
        format: NumberFormat,
    ) -> jax.Array:
        """Return the stored weights, float32 [n, k]."""
        return format(weight)


@part
class Gptq:
    """GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1), for any format.

    Columns are rounded one after the other; the error of each, weighted by the inverse Hessian of
    the layer's output error, is made up for by the columns still to come. A block's scales are
    found when its first column is reached, from the weights as they are by then; what rows or
    the tensor share is found before the start. Columns keep their order.
    """

    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self):
        if not 0 < self.damping < 1:
            raise ValueError(f"damping is {self.damping!r}; it must lie between 0 and 1")

    def __call__(
        self,
        weight: jax.Array,  # float32 [n, k]
        rows: jax.Array | None,  # inputs of the layer, float32 [samples, k]
        format: NumberFormat,
    ) -> jax.Array:
        """Return the stored weights, float32 [n, k].

        Raises:
          ValueError: no inputs were recorded.
        """
        if rows is None:
            raise ValueError("rounding by GPTQ needs recorded inputs; calibrate first")
        return _gptq(weight, inverse_factor(rows, self.damping), format)


@functools.partial(jax.jit, static_argnums=1)
def inverse_factor(rows: jax.Array, damping: float) -> jax.Array:
    """Return the upper Cholesky factor of the damped Hessian's inverse, float32 [k, k].

    Channels that are always zero get a Hessian of one: their weights don't matter.
    """
    hessian = jnp.matmul(rows.T, rows, precision=_HIGHEST) / rows.shape[0]
    diagonal = jnp.diagonal(hessian)
    dead = jnp.where(diagonal == 0, 1.0, 0.0)
    identity = jnp.eye(len(diagonal))
    hessian = hessian + identity * (dead + damping * jnp.mean(diagonal))
    lower = jnp.linalg.cholesky(hessian)
    inverse = jax.scipy.linalg.cho_solve((lower, True), identity)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


@functools.partial(jax.jit, static_argnums=2)
def _gptq(weight: jax.Array, factor: jax.Array, format: NumberFormat) -> jax.Array:
    """Round block by block; `factor` is upper triangular [k, k]."""
    n, k = weight.shape
    row = format.scale_block or k
    size = format.block or row  # columns whose scales are found together
    padded = -(-k // row) * row if format.scale_block else -(-k // size) * size
    factor = jnp.pad(factor, [(0, padded - k)] * 2) + jnp.diag(
        jnp.where(jnp.arange(padded) < k, 0.0, 1.0)
    )
    outer = format.outer(split(pad_edge(weight, row), row) if format.scale_block else weight)
    if format.scale_block:  # [n, rows, 1] to one a block of columns
        outer = jax.tree.map(lambda leaf: jnp.repeat(leaf[..., 0], row // size, 1), outer)
    weight = jnp.pad(weight, [(0, 0), (0, padded - k)], mode="edge")

    def block_step(index, state):
        weight, rounded = state
        start = index * size
        part = jax.lax.dynamic_slice(weight, (0, start), (n, size))
        inner_factor = jax.lax.dynamic_slice(factor, (start, start), (size, size))
        shared = outer
        if format.scale_block:
            shared = jax.tree.map(
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1, 1), outer
            )
        scales = format.inner(part, shared)

        def column_step(j, state):
            part, errors, stored = state
            column = jax.lax.dynamic_slice(part, (0, j), (n, 1))
            value = format.round(column, shared, scales)
            error = (column - value) / inner_factor[j, j]
            part = part - error * inner_factor[j]  # zero for the columns before j
            put = jax.lax.dynamic_update_slice
            return part, put(errors, error, (0, j)), put(stored, value, (0, j))

        zeros = jnp.zeros_like(part)
        _, errors, stored = jax.lax.fori_loop(0, size, column_step, (part, zeros, zeros))
        later = jax.lax.dynamic_slice(factor, (start, 0), (size, padded))
        weight = weight - jnp.matmul(errors, later, precision=_HIGHEST)
        return weight, jax.lax.dynamic_update_slice(rounded, stored, (0, start))

    state = (weight, jnp.zeros_like(weight))
    return jax.lax.fori_loop(0, padded // size, block_step, state)[1][:, :k]
