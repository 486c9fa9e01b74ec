"""SD and SDXL as families: what their components are, how they fit, and how they are sampled."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.denoiser import Canvas, Conditions
from models.family import Family, Schedule, Tokenizer
from models.fit import tokenizer_misfits
from models.planar import PlanarDenoiser, default_side, latent_misfits
from models.stored_files import CheckpointError
from models.text_encoders.clip import (
    CLIP_TEXT,
    CLIP_TEXT_PENULTIMATE,
    CLIP_TEXT_PROJECTED,
    CLIPTextConfig,
    PenultimateCLIPTextConfig,
    ProjectedCLIPTextConfig,
)
from models.tokenizers import padded_tokens
from models.unet.config import UNetConditionConfig
from models.unet.params import UNET_CONDITION
from models.vae.config import AutoencoderKLConfig
from models.vae.params import AUTOENCODER_KL

if TYPE_CHECKING:
    from models.sampler import Sampler

_CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# In SDXL's model_index.json: whether what guidance steers away from is zeros where no text says it.
_ZEROS = "force_zeros_for_empty_prompt"


class UNetDenoiser(PlanarDenoiser):
    """SD's: CLIP's tokens, and noise predicted by a UNet."""

    main: ClassVar[str] = "unet"

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return text tokens [texts, 77, channels]; a warning says what of a text is cut."""
        states, _ = self._clip(sampler, "text_encoder", texts)
        return {"encoder_hidden_states": states}

    def _clip(
        self, sampler: "Sampler", name: str, texts: Sequence[str]
    ) -> tuple[jax.Array, jax.Array]:
        """Return the states of an encoder and its pooled ones."""
        longest = self.configs[name].max_position_embeddings
        ids = padded_tokens(sampler.tokenizers[_CLIPS[name]], texts, longest).ids
        return sampler.run(name, "encode prompts", ids)

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        channels = self.configs["unet"].cross_attention_dim
        shape = (texts, tokens, channels)
        return {"encoder_hidden_states": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of UNetCondition's call."""
        timestep = jnp.broadcast_to(time, latents.shape[0])
        return {"sample": latents, "timestep": timestep, **conditions}


class SDXLDenoiser(UNetDenoiser):
    """Two CLIPs' states beside each other; the second's pooled one and sizes join the time."""

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return text tokens [texts, 77, channels] and pooled texts [texts, channels].

        Empty texts are zeros where the model's index says so, as SDXL was trained without a text.
        """
        (first, _), (second, pooled) = (self._clip(sampler, name, texts) for name in _CLIPS)
        states = jnp.concatenate([first, second], axis=-1)
        if self.configs.get(_ZEROS, True):
            told = jnp.asarray([bool(text) for text in texts])
            states, pooled = states * told[:, None, None], pooled * told[:, None]
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        shape = (texts, self.configs["unet"].pooled_channels)
        pooled = {"text_embeds": jax.ShapeDtypeStruct(shape, jnp.float32)}
        return super().shapes(texts, tokens) | pooled

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return the texts, and the sizes of images as nobody has cut anything off."""
        size = canvas.height, canvas.width
        rows = conditions["text_embeds"].shape[0]
        sizes = jnp.asarray([[*size, 0, 0, *size]] * rows, jnp.float32)
        return conditions | {"time_ids": sizes}

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of UNetCondition's call."""
        given = super().inputs(latents, time, conditions, guidance)
        added = {name: given.pop(name) for name in ("text_embeds", "time_ids")}
        return given | {"added_cond_kwargs": added}


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components of an SD or SDXL don't fit, naming both sizes."""
    yield from latent_misfits(configs, main="unet")
    unet, clips = configs.get("unet"), [configs.get(name) for name in _CLIPS]
    xl = "text_encoder_2" in configs or (unet is not None and unet.addition_embed_type is not None)
    encoders = clips if xl else clips[:1]
    if unet and all(encoders):
        given = sum(x.hidden_size for x in encoders if x)
        if unet.cross_attention_dim != given:
            yield (
                f"the unet takes text tokens of {unet.cross_attention_dim} channels, and "
                f"{' and '.join(list(_CLIPS)[: len(encoders)])} {'give' if xl else 'gives'} {given}"
            )
    if unet and clips[1] and unet.pooled_channels != clips[1].projection_dim:
        yield (
            f"the unet takes a pooled text of {unet.pooled_channels} channels, and text_encoder_2 "
            f"gives {clips[1].projection_dim}"
        )
    for name, tokenizer in _CLIPS.items():
        if configs.get(name) and tokenizer in tokenizers:
            yield from tokenizer_misfits(tokenizer, tokenizers[tokenizer], configs[name])


def _index_configs(index: Mapping[str, Any]) -> dict[str, bool]:
    """Return what SDXL's index says of empty texts."""
    value = index.get(_ZEROS, True)
    if not isinstance(value, bool):
        raise CheckpointError(f"{_ZEROS} is {value!r}; it must be true or false")
    return {_ZEROS: value}


def _sdxl_schedule_of(configs: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[str, None]:
    unet = configs.get("unet")
    if "scheduler" not in configs and unet is not None and unet.sample_size == _TURBO_SIDE:
        return "sdxl-turbo", None
    return _sdxl_schedule_like(configs.get("scheduler"), index), None


def _sdxl_schedule_like(scheduler: Any, index: Mapping[str, Any]) -> str:
    """Return whose schedule a scheduler is; Turbo's is ancestral."""
    return "sdxl-turbo" if getattr(scheduler, "stochastic", False) else "sdxl"


_TURBO_SIDE = 64  # latent pixels that SDXL-Turbo was trained with
_NOISE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "trained_betas": None,
}
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **_NOISE}
_ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", **_NOISE}
_PNDM = {
    "_class_name": "PNDMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    **_NOISE,
}

_LEVELS: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "eos_token_id": 2,
}
SD_1 = UNetConditionConfig(cross_attention_dim=768, sample_size=64)
SDXL_BASE = UNetConditionConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
)


def _sdxl_sizes(sample_size: int) -> dict[str, Any]:
    """Return the configs of an SDXL for images of so many latent pixels a side."""
    return {
        "text_encoder": PenultimateCLIPTextConfig(**_CLIP_L),
        "text_encoder_2": ProjectedCLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            eos_token_id=2,
        ),
        "vae": AutoencoderKLConfig(**_LEVELS, scaling_factor=0.13025),
        "unet": dataclasses.replace(SDXL_BASE, sample_size=sample_size),
    }


_TOKENIZER = Tokenizer(
    kind="CLIPTokenizer", length=77, specials=("<|endoftext|>", "<|startoftext|>")
)


SD = Family(
    name="SD",
    pipelines=("StableDiffusionPipeline",),
    components={"text_encoder": CLIP_TEXT, "vae": AUTOENCODER_KL, "unet": UNET_CONDITION},
    tokenizers={"tokenizer": _TOKENIZER},
    denoiser=UNetDenoiser,
    schedules={
        "sd": Schedule(
            name="SD's",
            scheduler=_PNDM,
            defaults={"num_inference_steps": 50, "true_cfg_scale": 7.5},
        )
    },
    schedule_of=lambda configs, index: ("sd", None),
    schedule_like=lambda scheduler, index: "sd",
    misfits=_misfits,
    defaults_of=partial(default_side, main="unet"),
    sizes={
        "stable-diffusion-v1-4": {
            "text_encoder": CLIPTextConfig(**_CLIP_L),
            "vae": AutoencoderKLConfig(**_LEVELS),
            "unet": SD_1,
        }
    },
    main="unet",
)
SDXL = Family(
    name="SDXL",
    pipelines=("StableDiffusionXLPipeline",),
    components={
        "text_encoder": CLIP_TEXT_PENULTIMATE,
        "text_encoder_2": CLIP_TEXT_PROJECTED,
        "vae": AUTOENCODER_KL,
        "unet": UNET_CONDITION,
    },
    tokenizers={
        "tokenizer": _TOKENIZER,
        "tokenizer_2": _TOKENIZER,
    },
    denoiser=SDXLDenoiser,
    schedules={
        "sdxl": Schedule(
            name="SDXL's",
            scheduler=_EULER,
            defaults={"num_inference_steps": 50, "true_cfg_scale": 5.0},
            index={_ZEROS: True},
        ),
        "sdxl-turbo": Schedule(
            name="SDXL-Turbo's",
            scheduler={"timestep_spacing": "trailing", **_ANCESTRAL},
            defaults={"num_inference_steps": 1, "true_cfg_scale": 1.0},
            index={_ZEROS: True},
        ),
    },
    schedule_of=_sdxl_schedule_of,
    schedule_like=_sdxl_schedule_like,
    misfits=_misfits,
    defaults_of=partial(default_side, main="unet"),
    index_configs=_index_configs,
    sizes={"sd_xl_base_1.0": _sdxl_sizes(128), "sdxl-turbo": _sdxl_sizes(_TURBO_SIDE)},
    main="unet",
)
