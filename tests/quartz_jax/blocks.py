"""A model with blocks that states no roles, small enough for tests."""

import jax
import jax.numpy as jnp
from flax import nnx

from quartz_jax import Int, LayerRecipe, Match, Quartz, Recipe, Rule

INT8 = Int(width=8)
QUARTZ = Quartz()
CONFIG = {"hidden": 32, "blocks": 2}
X = jax.random.normal(jax.random.key(1), (5, 32))


def rule(path, weight=None, activation=None, **fields):
    """A rule for paths; formats as in `LayerRecipe`."""
    layer = LayerRecipe(weight=weight, activation=activation, **fields)
    return Rule(match=Match(path=path), layer=layer)


RECIPE = Recipe(
    name="test",
    rules=(
        rule(r"blocks\.\d+\.up", QUARTZ, QUARTZ),
        rule(r"blocks\.\d+\.down", INT8),
    ),
)


class Block(nnx.Module):
    def __init__(self, hidden, rngs):
        self.norm = nnx.RMSNorm(hidden, rngs=rngs)
        self.up = nnx.Linear(hidden, 2 * hidden, rngs=rngs)
        self.down = nnx.Linear(2 * hidden, hidden, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, hidden, blocks, rngs):
        self.embed = nnx.Linear(hidden, hidden, rngs=rngs)
        self.blocks = nnx.List(Block(hidden, rngs) for _ in range(blocks))

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def build(config=CONFIG):
    return Model(**config, rngs=nnx.Rngs(0))


def poison(model):
    """Put a NaN into one weight."""
    kernel = model.blocks[1].up.kernel
    kernel.set_value(kernel.get_value().at[0, 0].set(jnp.nan))
    return model
