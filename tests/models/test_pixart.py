"""What is PixArt's alone: configs that can't be used, and text that doesn't count."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module
from transformer_cases import CASES

import models
from models.pixart.config import PixArtConfig
from models.pixart.family import PIXART
from models.stored_files import CheckpointError

CASE = CASES["PixArt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_additional_conditions": True}, "use_additional_conditions = True"),
        (
            {"use_additional_conditions": None, "sample_size": 128},
            r"this is PixArt-Alpha at 1024 pixels",
        ),
        ({"cross_attention_dim": 64}, "cross_attention_dim is 64"),
        ({"_class_name": "DiTTransformer2DModel"}, "_class_name"),
    ],
)
def test_an_unusable_config_is_refused_by_name(options, message):
    with pytest.raises(CheckpointError, match=message):
        PixArtConfig.from_json({**CASE.config, **options})


@pytest.mark.parametrize("case", ["DiT", "PixArt"])
def test_a_transformer_under_its_former_class_is_found_by_its_norm(case):
    component, config = CASES[case].component, CASES[case].config
    values = component.config.from_json(config).to_json() | {"_class_name": "Transformer2DModel"}
    assert type(models.component_config(values)) is component.config
    with pytest.raises(CheckpointError, match="class Transformer2DModel is not supported"):
        models.component_config(values | {"norm_type": "layer_norm"})


def test_what_is_masked_of_a_text_counts_for_nothing():
    config = PixArtConfig.from_json(CASE.config | CASE.shallow)
    model = random_module(lambda: CASE.component.build(config, jnp.float32))
    arguments = CASE.arguments((3, 5))
    masked = arguments["encoder_attention_mask"] == 0
    other = np.where(masked[..., None], 7, arguments["encoder_hidden_states"])
    call = nnx.jit(lambda model, arguments: model(**arguments))
    found = call(model, arguments | {"encoder_hidden_states": other})
    np.testing.assert_array_equal(found, call(model, arguments))


def test_latents_of_another_shape_are_refused():
    config = PixArtConfig.from_json(CASE.config | CASE.shallow)
    model = random_module(lambda: CASE.component.build(config, jnp.float32))
    change = {"hidden_states": np.zeros((2, 4, 5, 6), np.float32)}
    with pytest.raises(ValueError, match=r"hidden_states has shape \[2, 4, 5, 6\]; it must be"):
        model(**CASE.arguments((3, 5)) | change)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("256x256", 0.5), ("512-ms", 1), ("1024-ms", 2), ("2k-ms", 4)],
)
def test_published_sizes_have_their_positions_apart_as_published(name, scale):
    """As diffusers' scripts/convert_pixart_sigma_to_diffusers.py has them."""
    config = PIXART.sizes[f"pixart-sigma-xl-2-{name}"]["transformer"]
    assert config.interpolation_scale == scale
