"""FLUX.1 Redux's pipeline against diffusers' two in float32; what it can't use is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import models
from models.flux.redux import FLUX_REDUX
from models.stored_files import CheckpointError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import transformers  # noqa: E402 (needed beside diffusers alone)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder  # noqa: E402
from tiny_pipeline import make_tiny_flux  # noqa: E402

PROMPTS = ["a cat", "two red hats on a table"]
SIZES = [(32, 48), (64, 64)]  # height, width
SIDE, TEXT_TOKENS = 29, 512  # of the encoder's pictures; that diffusers pads texts to
RANDOM = np.random.default_rng(0)
# Of the encoder's size: resizing differs from library to library by a level of 255.
PHOTOS = [Image.fromarray(RANDOM.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(2)]


def random_parts():
    """Return diffusers' image encoder and embedder, no bias or norm at its neutral value."""
    torch.manual_seed(1)
    config = transformers.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=14,
    )
    encoder = transformers.SiglipVisionModel(config)
    embedder = ReduxImageEncoder(redux_dim=24, txt_in_features=24)
    for parameter in (*encoder.parameters(), *embedder.parameters()):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval(), embedder.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders as they are published, Redux's parts and FLUX.1, and diffusers' pipelines of both."""
    folder = tmp_path_factory.mktemp("redux")
    flux = make_tiny_flux(folder / "dev")
    flux.tokenizer_2.model_max_length = TEXT_TOKENS
    flux.tokenizer_2.save_pretrained(folder / "dev" / "tokenizer_2")
    encoder, embedder = random_parts()
    extractor = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    parts = {"image_encoder": encoder, "image_embedder": embedder, "feature_extractor": extractor}
    diffusers.FluxPriorReduxPipeline(**parts).save_pretrained(folder / "redux")
    texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    prior = diffusers.FluxPriorReduxPipeline(**parts, **{x: getattr(flux, x) for x in texts})
    for pipeline in (flux, prior):
        pipeline.set_progress_bar_config(disable=True)
    return folder / "redux", folder / "dev", prior, flux


@pytest.fixture(scope="module")
def ours(published):
    redux, dev, *_ = published
    return models.load_pipeline(redux, jnp.float32, text_encoders=dev)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scales", [(1.0,), (0.7, 0.4)])
def test_images_match_diffusers(published, ours, size, scales):
    _, _, prior, flux = published
    photos, count = PHOTOS[: len(scales)], len(scales)
    seen = [
        prior(
            photos,
            prompt=[prompt] * count,
            prompt_embeds_scale=list(scales),
            pooled_prompt_embeds_scale=list(scales),
        )
        for prompt in PROMPTS
    ]
    noise = ours.initial_noise(jax.random.key(1), 2, *size)
    options = {"height": size[0], "width": size[1], "num_inference_steps": 2}
    options |= {"guidance_scale": 2.5, "output_type": "np"}
    expected = flux(
        prompt_embeds=torch.cat([x.prompt_embeds for x in seen]),
        pooled_prompt_embeds=torch.cat([x.pooled_prompt_embeds for x in seen]),
        latents=torch.from_numpy(np.array(noise)),
        **options,
    ).images
    given = {"references": photos, "latents": noise, "progress": False, **options}
    found = ours(PROMPTS, reference_scales=scales if count > 1 else (), **given)
    assert relative_error(found, expected) <= 1e-4
    other = ours(PROMPTS, reference_scales=[0.3] * count, **given)
    assert relative_error(other, expected) > 1e-3  # what is looked at, and how much, matters


def test_defaults_are_those_of_the_card_with_flux_1_s_scheduler(ours):
    assert ours.family is FLUX_REDUX
    assert (ours.defaults.num_inference_steps, ours.defaults.guidance_scale) == (50, 2.5)
    assert ours.scheduler.use_dynamic_shifting


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "references holds no image; give one or more"),
        ({"references": PHOTOS, "reference_scales": [1.0]}, "reference_scales holds 1; .* 2$"),
        ({"references": PHOTOS[0], "reference_scales": [float("nan")]}, r"reference_scales\[0\]"),
        ({"references": PHOTOS, "mask": PHOTOS[0]}, "mask: this model takes none"),
    ],
)
def test_what_can_t_be_used_is_named(ours, given, told):
    with pytest.raises(ValueError, match=told):
        ours("a cat", height=32, width=32, progress=False, **given)


def test_scales_are_for_models_that_take_them(published):
    ours = models.load_pipeline(published[1], jnp.float32)
    with pytest.raises(ValueError, match="reference_scales: this model takes none"):
        ours("a cat", height=32, width=32, progress=False, reference_scales=[1.0])


def test_redux_without_flux_1_names_what_is_missing(published):
    with pytest.raises(CheckpointError, match=r"lacks .*text_encoder.*\(--text-encoders\)"):
        models.load_pipeline(published[0], jnp.float32)


def test_its_parts_load_by_their_class(published):
    for name, kind in {"image_encoder": "SigLIP", "image_embedder": "Redux"}.items():
        module = models.load_component(published[0] / name, jnp.float32)
        assert isinstance(module, FLUX_REDUX.components[name].module), kind
