"""Images made one by one and together: quantized blocks give the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.flux import FluxConfig, FluxTransformer
from models.flux.modeling import Carry, rope_table
from quartz_jax import get_recipe, place, quantize_model

CONFIG = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    axes_dims_rope=(8, 12, 12),
)
BATCH, IMAGE, TEXT = 3, 16, 8


@pytest.fixture(scope="module")
def carry():
    random = np.random.default_rng(0)
    hidden = CONFIG.attention_head_dim * CONFIG.num_attention_heads
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    ids = jnp.arange(3 * (IMAGE + TEXT), dtype=jnp.float32).reshape(-1, 3) % 7
    return Carry(
        img=normal(BATCH, IMAGE, hidden),
        txt=normal(BATCH, TEXT, hidden),
        vec=normal(BATCH, hidden),
        rope=rope_table(ids, CONFIG.axes_dims_rope),
        text_tokens=TEXT,
    )


def alone(carry, i):
    arrays = {name: getattr(carry, name) for name in ("img", "txt", "vec")}
    part = {name: None if x is None else x[i : i + 1] for name, x in arrays.items()}
    return dataclasses.replace(carry, **part)


@pytest.mark.parametrize("recipe", ["w4a8x", "w4a4", "w8a8"])
def test_blocks_give_an_image_the_same_bits_alone_and_among_others(carry, recipe):
    """Of a recipe that quantizes the modulation too: int8 sums are exact in any order."""
    model = FluxTransformer(CONFIG, rngs=nnx.Rngs(0))
    model = place(quantize_model(model, get_recipe(recipe))[0])[0]
    advance = nnx.jit(lambda block, carry: FluxTransformer.advance(block, carry))
    for _, block in model.blocks():
        together = advance(block, carry)
        for i in range(BATCH):
            expected = alone(together, i)
            found = advance(block, alone(carry, i))
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        carry = together
