"""FLUX.2's autoencoder against diffusers, from folders and from files in the original naming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module
from safetensors.numpy import load_file, save_file

from models.checkpoint_io import export_params
from models.stored_files import CheckpointError
from models.vae.config import AutoencoderKLFlux2Config
from models.vae.flux2 import AUTOENCODER_KL_FLUX2
from models.vae.modeling import AutoencoderKL, AutoencoderKLFlux2
from models.vae.packing import pack, unpack
from models.vae.params import bfl_rules

TINY = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 6,
    "norm_num_groups": 4,
}
SMALL_DECODER = {"decoder_block_out_channels": (8, 8, 12)}
encode, decode = nnx.jit(AutoencoderKL.encode), nnx.jit(AutoencoderKL.decode)


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def random_image(height, width, channels, batch=2):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (batch, height, width, channels)).astype(np.float32)


def tiny_autoencoder(**changes):
    config = AutoencoderKLFlux2Config(**{**TINY, **changes})
    module = random_module(lambda: AutoencoderKLFlux2(config, rngs=nnx.Rngs(0)))
    variance = module.bn.running_var
    variance.set_value(jnp.abs(variance[...]) + 0.5)
    return module


def build_peer(**changes):
    """Return a random torch autoencoder with statistics of its own."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKLFlux2 as Peer

    torch.manual_seed(0)
    levels = len(TINY["block_out_channels"])
    model = Peer(
        **{**TINY, **changes},
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    return model


def peer_latents(peer, images):
    """Return what Flux2KleinPipeline._encode_vae_image makes of images, channels last."""
    torch = pytest.importorskip("torch")
    from diffusers import Flux2KleinPipeline as Pipeline

    with torch.no_grad():
        latents = peer.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mode()
        packed = Pipeline._patchify_latents(latents)
        mean = peer.bn.running_mean.view(1, -1, 1, 1)
        deviation = (peer.bn.running_var.view(1, -1, 1, 1) + peer.config.batch_norm_eps).sqrt()
        return ((packed - mean) / deviation).permute(0, 2, 3, 1).numpy()


def peer_images(peer, latents):
    """Return what the pipeline decodes from packed latents, channels last."""
    torch = pytest.importorskip("torch")
    from diffusers import Flux2KleinPipeline as Pipeline

    with torch.no_grad():
        mean = peer.bn.running_mean.view(1, -1, 1, 1)
        deviation = (peer.bn.running_var.view(1, -1, 1, 1) + peer.config.batch_norm_eps).sqrt()
        packed = torch.tensor(latents).permute(0, 3, 1, 2) * deviation + mean
        return peer.decode(Pipeline._unpatchify_latents(packed)).sample.permute(0, 2, 3, 1).numpy()


def assert_equal_autoencoders(ours, peer, height=24, width=16):
    images = random_image(height, width, 3)
    mine = ours.normalize(encode(ours, images).mean)
    assert relative_error(mine, peer_latents(peer, images)) < 1e-4
    latents = random_image(height // 8, width // 8, ours.config.packed_channels)
    images = decode(ours, ours.denormalize(latents))
    assert relative_error(images, peer_images(peer, latents)) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{}, SMALL_DECODER, {"use_quant_conv": False, "use_post_quant_conv": False}],
    ids=str,
)
def test_latents_and_images_equal_the_peer(changes, tmp_path):
    peer = build_peer(**changes)
    peer.save_pretrained(tmp_path)
    assert_equal_autoencoders(AUTOENCODER_KL_FLUX2.load(tmp_path, jnp.float32), peer)


@pytest.mark.parametrize("changes", [{}, SMALL_DECODER], ids=str)
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_a_file_in_the_original_naming_loads(prefix, changes, tmp_path):
    # norm groups aren't in the shapes; those of all published files are 32
    widths = {"block_out_channels": (32, 64), "norm_num_groups": 32}
    changes = dict.fromkeys(changes, (32, 32))
    module = tiny_autoencoder(**widths, **changes)
    tensors = export_params(module, bfl_rules(module.config))
    assert {"encoder.quant_conv.weight", "decoder.post_quant_conv.weight"} <= tensors.keys()
    tensors["bn.num_batches_tracked"] = np.zeros((), np.int64)
    file = tmp_path / "flux2-vae.safetensors"
    save_file({prefix + name: value for name, value in tensors.items()}, file)
    loaded = AUTOENCODER_KL_FLUX2.load(file, jnp.float32)
    assert loaded.config == module.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(module))


def test_a_file_without_a_whole_autoencoder_is_refused(tmp_path):
    save_file({"bn.running_mean": np.zeros(24, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"no FLUX\.2 autoencoder: missing encoder\.conv_in"):
        AUTOENCODER_KL_FLUX2.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("changes", [{}, SMALL_DECODER], ids=str)
def test_an_export_is_read_again_and_by_the_peer(changes, tmp_path):
    pytest.importorskip("torch")
    from diffusers import AutoencoderKLFlux2 as Peer

    module = tiny_autoencoder(**changes)
    AUTOENCODER_KL_FLUX2.export(module, tmp_path, jnp.float32)
    loaded = AUTOENCODER_KL_FLUX2.load(tmp_path, jnp.float32)
    assert loaded.config == module.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(module))
    assert_equal_autoencoders(module, Peer.from_pretrained(tmp_path))


def test_statistics_are_stored_like_everything_else(tmp_path):
    AUTOENCODER_KL_FLUX2.export(tiny_autoencoder(), tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {"bn.running_mean", "bn.running_var"} <= tensors.keys()


def test_normalized_latents_come_back():
    module, latents = tiny_autoencoder(), random_image(6, 4, 6)
    again = module.denormalize(module.normalize(latents))
    np.testing.assert_allclose(again, latents, atol=1e-6)
    np.testing.assert_array_equal(unpack(pack(latents)), latents)


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"patch_size": [1, 1]}, r"patch_size = \[1, 1\] is not supported"),
        ({"decoder_block_out_channels": [8, 16]}, "as many levels as block_out_channels"),
        ({"decoder_block_out_channels": [8, 16, 18]}, "multiples of norm_num_groups = 4"),
        ({"act_fn": "relu"}, "act_fn = 'relu'"),
        ({"batch_norm_eps": -1}, "batch_norm_eps = -1 is out of range"),
    ],
    ids=str,
)
def test_an_unsupported_config_is_named(changes, told):
    values = {**AutoencoderKLFlux2Config(**TINY).to_json(), **changes}
    with pytest.raises(CheckpointError, match=told):
        AutoencoderKLFlux2Config.from_json(values)


def test_config_round_trips_through_json():
    config = AutoencoderKLFlux2Config(**TINY, **SMALL_DECODER)
    assert AutoencoderKLFlux2Config.from_json(json.loads(json.dumps(config.to_json()))) == config
