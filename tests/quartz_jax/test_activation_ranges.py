"""The ranges that the recipes take for the inputs of the second MLP linears, on the embedded model.

Run with -s to see the errors that decide.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import load_pipeline
from models.linear import Part
from models.pipeline import image_ids
from models.tiny_flux.architecture import FOLDER
from pallas_kernels.quantize import quantize
from quartz_jax import get_recipe


class Tap(nnx.Module):
    """A linear that keeps its inputs."""

    def __init__(self, linear: nnx.Linear):
        self.linear, self.inputs = linear, nnx.data([])

    def __call__(self, x: tuple[Part, ...], **around) -> jax.Array:
        joined = jnp.concatenate([part.value() for part in x], axis=-1)
        self.inputs.append(joined.reshape(-1, joined.shape[-1]))
        return self.linear(x, **around)


@pytest.fixture(scope="module")
def taps() -> dict[str, list[Tap]]:
    """The second MLP linears of both block kinds, after four steps of two images."""
    pipeline = load_pipeline(FOLDER, dtype=jnp.float32)
    model, down, single = pipeline.transformer, [], []
    for block in model.double_blocks:
        for mlp in (block.img_mlp, block.txt_mlp):
            mlp.down = Tap(mlp.down)
            down.append(mlp.down)
    for block in model.single_blocks:
        block.linear2 = Tap(block.linear2)
        single.append(block.linear2)
    embeds, pooled = pipeline.encode_prompts(["a pizza, 3d style", "a rocket, flat style"])
    latents = pipeline.initial_noise(jax.random.key(0), 2, 64, 64)
    for level in (1.0, 0.75, 0.5, 0.25):
        velocity = model(
            latents,
            embeds,
            pooled,
            timestep=jnp.full(2, level),
            img_ids=image_ids(8, 8),
            txt_ids=np.zeros((embeds.shape[1], 3), np.float32),
            guidance=jnp.full(2, 2.5),
        )
        latents -= 0.25 * velocity
    return {
        r"double_blocks\.\d+\.(img|txt)_mlp\.down": down,
        r"single_blocks\.\d+\.linear2": single,
    }


def output_error(tap: Tap, bits: int, range_: str) -> float:
    x, kernel = jnp.concatenate(tap.inputs), tap.linear.kernel[...]
    rows = quantize(x, bits=bits, range=range_)
    values, scale, lo = rows.values, rows.scale, rows.lo
    back = values * scale if lo is None else (values.astype(jnp.float32) + 128) * scale + lo
    return float(jnp.linalg.norm((back - x) @ kernel) / jnp.linalg.norm(x @ kernel))


@pytest.mark.parametrize(("recipe", "bits"), [("w4a4", 4), ("w8a8", 8)])
def test_recipes_take_the_range_with_the_smaller_error(taps, recipe, bits):
    rules = {rule.pattern: rule.activation for rule in get_recipe(recipe).rules}
    for pattern, layers in taps.items():
        errors = {
            range_: np.mean([output_error(layer, bits, range_) for layer in layers])
            for range_ in ("absmax", "minmax")
        }
        print(recipe, pattern, {name: f"{error:.4f}" for name, error in errors.items()})
        activation = rules[pattern]
        chosen = activation.config.range if activation.config else activation.range
        assert chosen == min(errors, key=errors.get)
