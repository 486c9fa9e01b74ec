"""The whole pipeline against diffusers in float32: models, layouts, sizes, adapters, images."""

import jax
import jax.numpy as jnp
import lora_files
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import models
from models.checkpoint_io import export_params
from models.flux.family import FLUX
from models.flux.latents import pack
from models.flux.params import bfl_rules as bfl_transformer_rules
from models.lora import add_lora, read_lora
from models.pictures import to_pixels
from models.vae.params import bfl_rules as bfl_vae_rules

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tiny_pipeline import make_tiny_flux  # noqa: E402 (needs diffusers)

PROMPTS = ["a cat, 3d style", "two red hats on a table, flat"]
SIZES = [(32, 48), (64, 64)]  # height, width
LAYOUTS = ["diffusers", "bfl"]


@pytest.fixture(scope="module", params=["dev", "schnell"])
def model(request, tmp_path_factory):
    """Return a diffusers folder and diffusers' pipeline of it."""
    folder = tmp_path_factory.mktemp(request.param)
    peer = make_tiny_flux(folder, dev=request.param == "dev")
    peer.set_progress_bar_config(disable=True)
    return folder, peer


@pytest.fixture(scope="module")
def peer(model):
    return model[1]


@pytest.fixture(scope="module", params=LAYOUTS)
def ours(request, model, tmp_path_factory):
    """Return our pipeline of the model, loaded from one of the layouts."""
    if request.param == "diffusers":
        return models.load_pipeline(model[0], jnp.float32)
    file = save_as_bfl(model[0], tmp_path_factory.mktemp("bfl"))
    return models.load_pipeline(file, jnp.float32, text_encoders=model[0])


@pytest.fixture(scope="module")
def adapter(peer, tmp_path_factory):
    """A file with an adapter for every linear of the transformer."""
    factors = lora_files.random_factors(lora_files.diffusers_modules(ours_config(peer)))
    tensors = lora_files.diffusers_tensors(factors, dict.fromkeys(factors, 2.0))
    return lora_files.save(tmp_path_factory.mktemp("lora") / "a.safetensors", tensors)


def ours_config(peer):
    return models.flux.FluxConfig.from_json(dict(peer.transformer.config))


def save_as_bfl(folder, out):
    """Write transformer and autoencoder under Black Forest Labs' names; returns the former."""
    transformer, vae = (
        models.load_component(folder / name, jnp.float32) for name in ("transformer", "vae")
    )
    save_file(export_params(transformer, bfl_transformer_rules()), out / "flux1.safetensors")
    save_file(export_params(vae, bfl_vae_rules(vae.config)), out / "ae.safetensors")
    return out / "flux1.safetensors"


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def both_options(peer, size, **options):
    guidance = {"guidance_scale": 2.5} if peer.transformer.config.guidance_embeds else {}
    shared = {"height": size[0], "width": size[1], "num_inference_steps": 3} | guidance | options
    length = peer.tokenizer_2.model_max_length
    return shared, shared | {"max_sequence_length": length}


def run_both(peer, ours, size, *, output_type="latent", **options):
    """Return our result and diffusers', from the same noise."""
    noise = ours.initial_noise(jax.random.key(1), len(PROMPTS), *size)
    shared, theirs = both_options(peer, size, output_type=output_type, **options)
    expected = peer(
        PROMPTS,
        negative_prompt=["blurry"] * len(PROMPTS),
        latents=torch.from_numpy(np.array(noise)),
        **theirs,
    ).images
    found = ours(PROMPTS, negative_prompt="blurry", latents=noise, progress=False, **shared)
    return found, expected


@pytest.mark.parametrize("size", SIZES)
def test_final_latents_match_diffusers(peer, ours, size):
    assert relative_error(*run_both(peer, ours, size)) <= 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_final_latents_match_diffusers_with_an_adapter(peer, ours, size, adapter):
    pytest.importorskip("peft")
    branches = read_lora(adapter, FLUX, ours.transformer.config)
    transformer = add_lora(ours.transformer, [branches], [0.8], jnp.float32)
    plain, _ = run_both(peer, ours, size)
    try:
        peer.load_lora_weights(str(adapter), adapter_name="a")
        peer.set_adapters(["a"], [0.8])
        adapted = ours.replace(transformer=transformer)
        found, expected = run_both(peer, adapted, size)
    finally:
        peer.unload_lora_weights()
    assert relative_error(plain, expected) > 1e-2  # the adapter does something
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_images_match_diffusers(peer, ours, size):
    found, expected = run_both(peer, ours, size, output_type="np")
    assert found.shape == (2, *size, 3)
    assert relative_error(found, expected) <= 1e-4


def test_final_latents_match_diffusers_with_true_guidance(peer, ours):
    assert relative_error(*run_both(peer, ours, SIZES[0], true_cfg_scale=3.0)) <= 1e-4


def test_steps_default_to_the_model_kind(peer, ours):
    guided = peer.transformer.config.guidance_embeds
    assert ours.defaults.num_inference_steps == (28 if guided else 4)
    assert ours.defaults.guidance_scale == 3.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_matches_diffusers(peer, ours, size, strength):
    """Diffusers draws the autoencoder's noise, then the latents', from one generator."""
    peer = diffusers.FluxImg2ImgPipeline(**peer.components)
    peer.set_progress_bar_config(disable=True)
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (40, 56, 3), np.uint8))  # is resized
    shared, theirs = both_options(peer, size, num_inference_steps=5)
    expected = peer(
        PROMPTS,
        image=[image] * len(PROMPTS),
        strength=strength,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **theirs,
    ).images

    generator = torch.Generator().manual_seed(3)
    vae = ours.vae.config
    shape = (2, vae.latent_channels, size[0] // vae.downsampling, size[1] // vae.downsampling)
    draws = (torch.randn(shape, generator=generator).numpy() for _ in range(2))
    encoder_noise, noise = (pack(jnp.asarray(x.transpose(0, 2, 3, 1))) for x in draws)
    pixels = np.stack([to_pixels(image, *size)] * len(PROMPTS))
    shared.setdefault("guidance_scale", None)
    found = ours.denoise(
        noise,
        ours.encode_prompts(PROMPTS),
        image_latents=ours.encode_images(pixels, encoder_noise),
        strength=strength,
        progress=False,
        **shared,
    )
    assert relative_error(found, expected) <= 1e-4
