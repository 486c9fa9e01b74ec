"""Unconditional latent diffusion against diffusers' in float32: autoencoder, pipeline, names."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models.ldm.family import LDM
from models.ldm.params import UNET
from models.vae.params import VQ_MODEL

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from transformer_cases import CASES  # noqa: E402 (needs torch)

VQ = {
    "block_out_channels": (8, 16),
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_vq_embeddings": 32,
    "latent_channels": 4,
    "vq_embed_dim": 3,
}


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    pipeline = diffusers.LDMPipeline(
        vqvae=diffusers.VQModel(**VQ),
        unet=diffusers.UNet2DModel(**CASES["LDM"].config),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
        ),
    )
    for module in (pipeline.unet, pipeline.vqvae):
        for parameter in module.eval().parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    pipeline.vqvae.quantize.embedding.weight.data.normal_()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return models.load_pipeline(folder, jnp.float32)


@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_the_autoencoder_is_diffusers_both_ways(peer, ours, size):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 3, size[0] // 2, size[1] // 2)).astype(np.float32)
    with torch.no_grad():
        encoded = peer.vqvae.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latents
        decoded = peer.vqvae.decode(torch.from_numpy(latents)).sample
    assert relative_error(ours.vqvae.encode(images), encoded.permute(0, 2, 3, 1)) <= 1e-4
    found = ours.vqvae.decode(latents.transpose(0, 2, 3, 1))
    assert relative_error(found, decoded.permute(0, 2, 3, 1)) <= 1e-4


def test_decoding_takes_the_nearest_entries(ours):
    entries = np.asarray(ours.vqvae.codebook.embedding[...])
    near = entries[None, None, [3, 17, 30]] * (1 + 1e-4)
    assert ours.vqvae.nearest(jnp.asarray(near)).tolist() == [[[3, 17, 30]]]


@pytest.mark.parametrize("steps", [1, 3])
def test_images_are_diffusers(ours, peer, monkeypatch, steps):
    noise = np.random.default_rng(0).normal(size=(2, *ours.canvas(16, 16).shape))
    noise = noise.astype(np.float32)
    module = diffusers.pipelines.deprecated.latent_diffusion_uncond
    module = module.pipeline_latent_diffusion_uncond
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    call = {"num_inference_steps": steps, "output_type": "np"}
    expected = peer(batch_size=2, **call).images
    found = ours(["", ""], latents=jnp.asarray(noise), progress=False, **call)
    assert found.shape == (2, 16, 16, 3)  # what it was trained with, unless told otherwise
    assert np.std(expected) > 0.02  # pictures of something
    assert relative_error(found, expected) <= 1e-4


def test_a_text_is_warned_of(ours):
    call = {"num_inference_steps": 1, "progress": False, "output_type": "latent"}
    with pytest.warns(UserWarning, match="reads no text, so 'a cat' only asks for"):
        ours("a cat", **call)


def test_every_component_is_found_by_its_class(folder):
    kinds = {x: type(models.load_component(folder / x)) for x in ("unet", "vqvae")}
    assert kinds == {name: LDM.components[name].module for name in kinds}


def test_names_of_early_files_are_read(folder, tmp_path):
    """Attention's projections were called query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part, component in (("unet", UNET), ("vqvae", VQ_MODEL)):
        tensors = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        for new, former in old.items():
            tensors = {name.replace(f".{new}.", f".{former}."): x for name, x in tensors.items()}
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / "diffusion_pytorch_model.safetensors")
        config = (folder / part / "config.json").read_text()
        (tmp_path / part / "config.json").write_text(config)
        assert any(".proj_attn." in name for name in tensors)
        component.load(tmp_path / part)  # names all that is missing or not expected


def test_components_that_do_not_fit_are_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "unet").unlink()
    (tmp_path / "unet").mkdir()
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 8}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    message = "unet takes latents of 8 channels, and the autoencoder gives 3"
    with pytest.raises(models.CheckpointError, match=message):
        models.load_pipeline(tmp_path, jnp.float32)
