"""What is FLUX.2's alone: arguments and files that can't be used."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_module
from transformer_cases import CASES

from models.flux2.config import Flux2Config
from models.flux2.params import config_from_bfl
from models.stored_files import CheckpointError

DEV, KLEIN = CASES["FLUX.2 dev"], CASES["FLUX.2 klein"]


@pytest.mark.parametrize(("case", "other"), [(DEV, KLEIN), (KLEIN, DEV)], ids=["dev", "klein"])
def test_guidance_must_fit_the_model(case, other):
    config = Flux2Config.from_json(case.config | case.shallow)
    model = random_module(lambda: case.component.build(config, jnp.float32))
    with pytest.raises(
        ValueError, match=r"guidance is .* but this model (needs|takes no) guidance"
    ):
        model(**other.arguments((3, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes_dims_rope": [4, 4, 4, 6]}, "axes_dims_rope"),
        ({"axes_dims_rope": []}, "axes_dims_rope"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name"),
    ],
)
def test_an_unusable_config_is_refused_by_name(options, message):
    with pytest.raises(CheckpointError, match=message):
        Flux2Config.from_json({**KLEIN.config, **options})


def shapes_of(config):
    tensors = KLEIN.component.tensors(config, KLEIN.component.file)
    return {name: shape for name, (_, shape) in tensors.items()}


# Sizes of the published models: BFL's klein 4B and 9B, and dev.
PUBLISHED = {
    "klein 4B": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "text": 7680},
    "klein 9B": {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "text": 12288,
    },
    "dev": {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "text": 15360},
}
PARAMETERS = {"klein 4B": 3.88e9, "klein 9B": 9.08e9, "dev": 32.2e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_tell_the_sizes_of_the_published_models(name):
    sizes = dict(PUBLISHED[name])
    sizes["joint_attention_dim"] = sizes.pop("text")
    config = Flux2Config(**sizes, guidance_embeds=name == "dev")
    shapes = shapes_of(config)
    assert config_from_bfl(shapes) == config
    assert sum(map(np.prod, shapes.values())) == pytest.approx(PARAMETERS[name], rel=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_in.weight": None}, "no FLUX.2 transformer: missing img_in.weight"),
        ({"img_in.weight": (48,)}, r"misshapen img_in.weight \[48\]"),
        ({"single_blocks.0.norm.query_norm.scale": (12,)}, "heads of 12 channels"),
        ({"single_blocks.0.norm.query_norm.scale": (0,)}, "misshapen"),
    ],
)
def test_a_file_that_does_not_tell_its_sizes_is_refused(change, message):
    shapes = shapes_of(Flux2Config.from_json(KLEIN.config)) | change
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        config_from_bfl(shapes, "x.safetensors")
