"""The commands on UNets with random weights: quantize, calibrated too, inspect, generate."""

import numpy as np
import pytest
from PIL import Image

from models.ldm.config import UNetConfig
from models.ldm.family import LDM
from models.synthetic import write_random_model
from models.text_encoders.clip import PenultimateCLIPTextConfig, ProjectedCLIPTextConfig
from models.unet.config import UNetConditionConfig
from models.unet.family import SDXL
from models.vae.config import AutoencoderKLConfig, VQModelConfig
from quartz_jax.cli import generate, inspect, quantize
from quartz_jax.conversion import checkpoint

_CLIP = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
_CLIP |= {"num_attention_heads": 2, "eos_token_id": 2}
_LEVELS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
_UNET = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
_UNET |= {"sample_size": 8}
MODELS = {
    "SDXL-Turbo": (
        SDXL,
        "sdxl-turbo",
        {
            "text_encoder": PenultimateCLIPTextConfig(**_CLIP),
            "text_encoder_2": ProjectedCLIPTextConfig(**_CLIP, projection_dim=16),
            "vae": AutoencoderKLConfig(**_LEVELS),
            "unet": UNetConditionConfig(
                **_UNET,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=2,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
            ),
        },
    ),
    "LDM": (
        LDM,
        "ldm",
        {
            "vqvae": VQModelConfig(**_LEVELS, num_vq_embeddings=32),
            "unet": UNetConfig(
                **_UNET,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=16,
            ),
        },
    ),
}


def call(command, *argv):
    command.main([str(x) for x in argv])


@pytest.fixture
def write(tmp_path):
    """Write a model with random weights; gives its folder."""

    def write(name):
        family, schedule, sizes = MODELS[name]
        write_random_model(tmp_path / "model", family, sizes, schedule=schedule)
        return tmp_path / "model"

    return write


def draw(model, out):
    call(generate, "--model", model, "--prompt", "a cat", "--steps", 2, "--out", out)
    with Image.open(out) as image:
        return np.asarray(image)


def test_a_checkpoint_of_sdxl_holds_convolutions_in_4_bits_and_draws(write, tmp_path, capsys):
    out = tmp_path / "q"
    call(quantize, "--model", write("SDXL-Turbo"), "--recipe", "unet=w4a8x", "--out", out)
    call(inspect, out)
    assert "layers with quartz g16 stretched search weights and int8" in capsys.readouterr().out
    report = checkpoint.read_manifest(out).components["unet"].report
    roles = {layer.path: layer.role for layer in report.layers}
    assert roles["down_blocks.0.resnets.0.conv1"] == "conv"
    assert {"resample", "shortcut", "modulation", "projection"} <= set(roles.values())
    drawn = draw(out, tmp_path / "a.png")
    assert drawn.shape == (16, 16, 3) and drawn.std() > 1


@pytest.mark.filterwarnings("ignore:this model reads no text")
def test_a_calibrated_recipe_of_an_ldm_is_made_block_by_block_and_draws(write, tmp_path):
    out, options = tmp_path / "q", ("--calibration-samples", 2, "--calibration-steps", 1)
    recipe = "unet=w4a8x-gptq"
    call(quantize, "--model", write("LDM"), "--recipe", recipe, "--out", out, *options)
    found = checkpoint.read_manifest(out).components["unet"]
    errors = [layer.output_error for layer in found.report.layers if layer.role == "conv"]
    assert errors and all(0 < error < 0.3 for error in errors)
    assert draw(out, tmp_path / "a.png").std() > 1
