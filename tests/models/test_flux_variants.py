"""Pipelines of Kontext, Fill and Canny against diffusers in float32; refusals, single files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import models
from models.checkpoint_io import export_params
from models.flux.params import bfl_rules

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tiny_pipeline import TOKENS, make_tiny_flux  # noqa: E402 (needs diffusers)

PROMPTS = ["a cat", "two red hats on a table"]
SIZES = [(32, 48), (64, 64)]  # height, width
RANDOM = np.random.default_rng(0)
PHOTO = Image.fromarray(RANDOM.integers(0, 256, (48, 72, 3), np.uint8))
MASK = Image.fromarray(RANDOM.integers(0, 2, (6, 9), np.uint8) * 255).resize((72, 48), 0)
# kind of pipeline, channels beside the latents' own 16, arguments here, arguments there
VARIANTS = {
    "kontext": ("FluxKontextPipeline", 0, {"references": PHOTO}),
    "fill": ("FluxFillPipeline", 16 + 256, {"references": PHOTO, "mask": MASK}),
    "canny": ("FluxControlPipeline", 16, {"references": PHOTO}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """Return the variant's name, its folder, diffusers' pipeline and ours."""
    kind, extra, _ = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    peer = make_tiny_flux(folder, kind=getattr(diffusers, kind), extra_channels=extra)
    peer.set_progress_bar_config(disable=True)
    return request.param, folder, peer, models.load_pipeline(folder, jnp.float32)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def theirs(name, size):
    """Return what diffusers is given to look at."""
    if name == "kontext":  # resized beforehand: diffusers would take a size near a megapixel
        ratio = PHOTO.width / PHOTO.height
        sides = ((size[0] * size[1] / ratio) ** 0.5, (size[0] * size[1] * ratio) ** 0.5)
        height, width = (round(side / 16) * 16 for side in sides)
        resized = PHOTO.resize((width, height), Image.Resampling.LANCZOS)
        return {"image": resized, "_auto_resize": False, "max_area": size[0] * size[1]}
    if name == "fill":
        return {"image": [PHOTO] * 2, "mask_image": [MASK] * 2}
    return {"control_image": [PHOTO] * 2}


@pytest.mark.parametrize("size", SIZES)
def test_final_latents_match_diffusers(variant, size, monkeypatch):
    """Diffusers draws from the autoencoder's distribution; here its mean is taken."""
    name, _, peer, ours = variant
    kind = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(kind, "sample", lambda self, generator=None: self.mean)
    noise = ours.initial_noise(jax.random.key(1), 2, *size)
    options = {"height": size[0], "width": size[1], "num_inference_steps": 2}
    options |= {"guidance_scale": 2.5, "output_type": "latent"}
    expected = peer(
        prompt=PROMPTS,
        latents=torch.from_numpy(np.array(noise)),
        max_sequence_length=TOKENS,
        **theirs(name, size),
        **options,
    ).images
    looked = VARIANTS[name][2]
    found = ours(PROMPTS, latents=noise, progress=False, **looked, **options)
    assert relative_error(found, expected) <= 1e-4
    blank = {key: Image.new(x.mode, x.size) for key, x in looked.items()}
    other = ours(PROMPTS, latents=noise, progress=False, **blank, **options)
    assert relative_error(other, expected) > 1e-3  # what is looked at matters


def test_the_same_seed_gives_the_same_bytes_under_true_guidance(variant):
    name, _, _, ours = variant
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "progress": False, "seed": 3}
    options |= {"true_cfg_scale": 2.0, **VARIANTS[name][2]}
    first, again = (ours(PROMPTS, **options) for _ in range(2))
    assert [x.tobytes() for x in first] == [x.tobytes() for x in again]


@pytest.mark.parametrize(
    ("kinds", "given", "told"),
    [
        (("fill", "canny"), {}, "references holds 0 images; give one"),
        (("kontext", "fill", "canny"), {"references": [PHOTO, PHOTO]}, "references holds 2 images"),
        (("fill",), {"references": PHOTO}, "mask is missing"),
        (("kontext", "canny"), {"references": PHOTO, "mask": MASK}, "mask: this model takes none"),
    ],
)
def test_what_a_variant_lacks_is_named(variant, kinds, given, told):
    name, _, _, ours = variant
    if name not in kinds:
        pytest.skip("the variant takes it")
    with pytest.raises(ValueError, match=told):
        ours("a cat", height=32, width=32, progress=False, **given)


def test_a_single_file_is_told_by_its_channels_or_the_schedule(variant, tmp_path):
    name, folder, _, ours = variant
    file = tmp_path / "flux1.safetensors"
    save_file(export_params(ours.transformer, bfl_rules()), file)
    files = models.find_model(file, folder, name)
    assert files.family is ours.family
    assert files.defaults(files.configs()).guidance_scale == {"kontext": 2.5}.get(name, 30.0)
    if name != "kontext":
        assert models.find_model(file, folder).family is ours.family


def test_a_model_for_text_looks_at_no_image(tmp_path):
    make_tiny_flux(tmp_path)
    ours = models.load_pipeline(tmp_path, jnp.float32)
    for given, told in (({"references": PHOTO}, "references"), ({"mask": MASK}, "mask")):
        with pytest.raises(ValueError, match=f"{told}: this model .* leave"):
            ours("a cat", height=32, width=32, progress=False, **given)
