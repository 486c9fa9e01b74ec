"""The 16-bit low-rank branch."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from quartz_jax.formats.base import check_block
from quartz_jax.schema import part
from quartz_jax.transforms.base import HIGHEST, Layer, Need, Product, Transform

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe


@part("lowrank")
class LowRank(Transform):
    """SVDQuant's 16-bit branch: the largest singular directions of the weights, kept apart.

    W = up down^T + R; the branch starts as the SVD of W and is found again for W - Q(R) as long
    as the output error falls (arXiv 2411.05007 and its released code).
    """

    rank: int = 32
    iterations: int = 100  # at most; 1 is the plain SVD

    def __post_init__(self):
        check_block("rank", self.rank)
        check_block("iterations", self.iterations)

    @property
    def needs(self) -> frozenset[Need]:
        """Rows, to see whether the error falls."""
        return frozenset({"rows"} if self.iterations > 1 else ())

    def quick(self) -> "LowRank":
        """Return the plain SVD, which is enough to compare what comes before it."""
        return dataclasses.replace(self, iterations=1)

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind a `Product`."""

        def behind(target: jax.Array) -> Layer:
            down, up = truncated_svd(target, min(self.rank, *target.shape))
            apart = layer.weight - _wide_product(up, down)
            return layer.then(Product(down=down, up=up), apart)

        first = behind(layer.weight)
        if self.iterations == 1:
            return first
        # The branch in the loop, the layer once it is found: statistics needn't be carried.
        state = (first.ops[-1], first.weight, rest.error(first), jnp.int32(1), jnp.bool_(True))

        def go_on(state) -> jax.Array:
            return state[4] & (state[3] < self.iterations)

        def step(state):
            branch, apart, least, count, _ = state
            candidate = behind(layer.weight - rest.rounded(apart))
            error = rest.error(candidate)
            better = error < least
            chosen = jax.tree.map(
                lambda new, old: jnp.where(better, new, old),
                (candidate.ops[-1], candidate.weight),
                (branch, apart),
            )
            return *chosen, jnp.minimum(error, least), count + 1, better

        branch, apart, *_ = jax.lax.while_loop(go_on, step, state)
        return layer.then(branch, apart)


def truncated_svd(
    weight: jax.Array,  # float32 [n, k]
    rank: int,
) -> tuple[jax.Array, jax.Array]:
    """Return bfloat16 down [k, rank] and up [n, rank] with up down^T near the weight.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix, and the
    weight projected on the first of them is the truncated SVD; far faster than a whole SVD.
    """
    n, k = weight.shape
    side = weight if n <= k else weight.T  # [short, long]
    _, vectors = jnp.linalg.eigh(jnp.matmul(side, side.T, precision=HIGHEST))
    basis = vectors[:, -rank:]  # eigenvalues rise; [short, rank]
    projected = jnp.matmul(side.T, basis, precision=HIGHEST)  # [long, rank]
    down, up = (projected, basis) if n <= k else (basis, projected)
    return down.astype(jnp.bfloat16), up.astype(jnp.bfloat16)


def _wide_product(up: jax.Array, down: jax.Array) -> jax.Array:
    """Return up down^T of bfloat16 factors, float32 [n, k]."""
    return jnp.matmul(up.astype(jnp.float32), down.astype(jnp.float32).T, precision=HIGHEST)
