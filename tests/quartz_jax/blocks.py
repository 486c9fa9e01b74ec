"""Models with blocks that state no roles, small enough for tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from layers import EVERY_OP

from quartz_jax import Int, LayerRecipe, Match, Quartz, Recipe, Rule
from quartz_jax.formats import IF4, NVFP4, FittedTable
from quartz_jax.rounding import Gptq
from quartz_jax.transforms import Rotate, Smooth

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


class Stepped(nnx.Module):
    """A model that can be run block by block, so that it can be calibrated while it's read."""

    starts = ("embed",)

    def __init__(self, hidden, blocks, rngs):
        self.embed = nnx.Linear(hidden, hidden, rngs=rngs)
        self.layers = nnx.List(Block(hidden, rngs) for _ in range(blocks))
        self.head = nnx.Linear(hidden, 4, rngs=rngs)

    def __call__(self, x):
        carry = self.start(x=x)
        for _, block in self.blocks():
            carry = self.advance(block, carry)
        return self.head(carry)

    def start(self, *, x):
        return self.embed(x)

    def blocks(self):
        return [(f"layers.{i}", block) for i, block in enumerate(self.layers)]

    @staticmethod
    def advance(block, carry):
        return block(carry)


STEPPED = {"hidden": 32, "blocks": 3}


def build_stepped(config=STEPPED):
    return Stepped(**config, rngs=nnx.Rngs(0))


SEARCHED = Quartz(step="integer", levels="stretched", search=True)
ROTATED = {"transforms": (Rotate(block=16),)}
# Several formats, every op, a rounding that reads what was seen, and an embedder without any.
MIXED = Recipe(
    name="mixed",
    rules=(
        rule(r"layers\.0\.up", SEARCHED, INT8, transforms=EVERY_OP, rounding=Gptq()),
        rule(r"layers\.0\.down", Int(width=4), QUARTZ),
        rule(r"layers\.1\.up", NVFP4(), NVFP4(), transforms=(Smooth(),)),
        rule(r"layers\.1\.down", INT8, **ROTATED),
        rule(
            r"layers\.2\.up", FittedTable(), INT8, transforms=(Rotate(block=16),), rounding=Gptq()
        ),
        rule(r"layers\.2\.down", IF4(), INT8),
        rule("embed", QUARTZ, INT8),
    ),
)


def samples(seed=0, count=4):
    """Arguments of calls of a model, with a few large channels."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=32))
    return [{"x": np.float32(rng.normal(size=(2, 5, 32)) * size)} for _ in range(count)]
