"""The ranges that the recipes take for the inputs of the second MLP linears.

Eight bits take the one with less error in the layers of the embedded model (run with -s to see
the errors that decide), four bits the one with better images, where both were evaluated.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import load_pipeline
from models.flux.latents import image_ids
from models.linear import Part
from models.tiny_flux.architecture import FOLDER
from pallas_kernels.quantize import quantize
from quartz_jax import LayerRecipe, get_recipe

EVALUATIONS = Path(__file__).parents[2] / "models" / "evaluations"


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
    texts = pipeline.encode_prompts(["a pizza, 3d style", "a rocket, flat style"])
    latents = pipeline.initial_noise(jax.random.key(0), 2, 64, 64)
    for level in (1.0, 0.75, 0.5, 0.25):
        velocity = model(
            latents,
            **texts,
            timestep=jnp.full(2, level),
            img_ids=image_ids(8, 8),
            txt_ids=np.zeros((texts["encoder_hidden_states"].shape[1], 3), np.float32),
            guidance=jnp.full(2, 2.5),
        )
        latents -= 0.25 * velocity
    return {"mlp_out": down, "mixed_out": single}


def output_error(tap: Tap, bits: int, range_: str) -> float:
    x, kernel = jnp.concatenate(tap.inputs), tap.linear.kernel[...]
    rows = quantize(x, bits=bits, range=range_)
    values, scale, lo = rows.values, rows.scale, rows.lo
    back = values * scale if lo is None else (values.astype(jnp.float32) + 128) * scale + lo
    return float(jnp.linalg.norm((back - x) @ kernel) / jnp.linalg.norm(x @ kernel))


def layers_of(recipe: str) -> dict[str, LayerRecipe]:
    """What a recipe does, by role."""
    rules = get_recipe(recipe).rules
    kinds = ("mlp_out", "mixed_out")
    return {kind: next(r.layer for r in rules if kind in r.match.roles) for kind in kinds}


def test_eight_bits_take_the_range_with_the_smaller_error(taps):
    for role, layers in taps.items():
        errors = {
            range_: np.mean([output_error(layer, 8, range_) for layer in layers])
            for range_ in ("absmax", "minmax")
        }
        print(role, {name: f"{error:.4f}" for name, error in errors.items()})
        for recipe in ("w8a8", "w4a8", "w4a8x"):
            assert layers_of(recipe)[role].activation.range == min(errors, key=errors.get)


def test_four_bits_take_the_range_with_the_better_images():
    """Of `w4a4` as it was, with minmax, and with absmax: on emoji no difference, on photos 1 dB."""
    gains = []
    for model in ("tiny_flux", "tiny_flux_photo"):
        file = EVALUATIONS / model / "range_behind_gelu.json"
        recipes = json.loads(file.read_text())["recipes"]
        psnr = {name: recipes[name]["summary"]["psnr"]["mean"] for name in recipes}
        gains.append(psnr["w4a4-absmax"] - psnr["w4a4"])
    assert sum(gains) > 0
    for layer in layers_of("w4a4").values():
        assert layer.activation.range == "absmax"
