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


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    family, schedule, sizes = MODELS[request.param]
    folder = tmp_path_factory.mktemp("models") / request.param
    write_random_model(folder, family, sizes, schedule=schedule)
    return folder


def call(command, *argv):
    command.main([str(x) for x in argv])


def draw(model, out, *options):
    call(generate, "--model", model, "--prompt", "a cat", "--steps", 2, "--out", out, *options)
    with Image.open(out) as image:
        return np.asarray(image, np.float32)


@pytest.mark.filterwarnings("ignore:this model reads no text")
def test_a_checkpoint_holds_convolutions_in_4_bits_and_draws(folder, tmp_path, capsys):
    call(quantize, "--model", folder, "--recipe", "unet=w4a8x", "--out", tmp_path / "q")
    call(inspect, tmp_path / "q")
    assert "UNet" in capsys.readouterr().out
    report = checkpoint.read_manifest(tmp_path / "q").components["unet"].report
    paths = {layer.path: layer.role for layer in report.layers}
    assert paths["down_blocks.0.resnets.0.conv1"] == "conv"
    assert {"resample", "shortcut", "modulation"} <= set(paths.values())
    drawn = draw(tmp_path / "q", tmp_path / "a.png")
    assert drawn.shape == (16, 16, 3)
    np.testing.assert_array_equal(draw(tmp_path / "q", tmp_path / "b.png"), drawn)
    plain = draw(folder, tmp_path / "c.png")
    assert 0 < np.abs(drawn - plain).mean() < 32  # of 255


@pytest.mark.filterwarnings("ignore:this model reads no text")
def test_a_calibrated_recipe_is_made_from_files_block_by_block(folder, tmp_path):
    options = ("--calibration-samples", 2, "--calibration-steps", 1)
    recipe = "unet=w4a8x-gptq"
    call(quantize, "--model", folder, "--recipe", recipe, "--out", tmp_path / "q", *options)
    found = checkpoint.read_manifest(tmp_path / "q").components["unet"]
    errors = [layer.output_error for layer in found.report.layers if layer.role == "conv"]
    assert errors and all(0 < error < 0.3 for error in errors)
    assert draw(tmp_path / "q", tmp_path / "a.png").std() > 0
