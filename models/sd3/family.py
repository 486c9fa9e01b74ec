"""SD3 and SD3.5 as a family: what their components are, how they fit, and how they are sampled."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from models.component import Component
from models.denoiser import Canvas, Conditions
from models.family import AdapterNaming, Family, Schedule, Tokenizer
from models.fit import tokenizer_misfits
from models.planar import PlanarDenoiser, default_side, latent_misfits
from models.schedulers import Level, Scheduler
from models.sd3.config import SD3Config
from models.sd3.params import TRANSFORMER, diffusers_rules, file_rules
from models.text_encoders.clip import CLIP_TEXT_PROJECTED, ProjectedCLIPTextConfig
from models.text_encoders.t5 import T5_ENCODER, T5_XXL
from models.tokenizers import padded_tokens
from models.vae.config import AutoencoderKLConfig
from models.vae.params import AUTOENCODER_KL, config_from_bfl

if TYPE_CHECKING:
    from models.sampler import Sampler

_CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_MAX_T5_TOKENS = 256
_TIMESTEPS = 1000
_SCALING = {"scaling_factor": 1.5305, "shift_factor": 0.0609}  # of the autoencoder's latents


class SD3Denoiser(PlanarDenoiser):
    """Two CLIPs' states beside each other, T5's behind them, and a velocity."""

    def canvas(self, height: int, width: int) -> Canvas:
        """Return the size of an image's latents; raises ValueError where positions end."""
        most = self.multiple * self.configs["transformer"].pos_embed_max_size
        if max(height, width) > most:
            raise ValueError(f"{width}x{height} is too large: sides of {most} pixels at most")
        return super().canvas(height, width)

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return text tokens [texts, tokens, channels] and pooled texts [texts, channels].

        Texts are padded and truncated to the tokenizers' lengths, T5's to 256 at most; a warning
        says what is cut.
        """
        found = []
        for name, tokenizer in _CLIPS.items():
            longest = self.configs[name].max_position_embeddings
            ids = padded_tokens(sampler.tokenizers[tokenizer], texts, longest).ids
            found.append(sampler.run(name, "encode prompts", ids))
        ids = padded_tokens(sampler.tokenizers["tokenizer_3"], texts, _MAX_T5_TOKENS).ids
        t5 = sampler.run("text_encoder_3", "encode prompts", ids)
        (states, states_2), pooled = zip(*found, strict=True)
        states = jnp.concatenate([states, states_2], axis=-1)
        wide = jnp.pad(states, ((0, 0), (0, 0), (0, t5.shape[-1] - states.shape[-1])))
        return {
            "encoder_hidden_states": jnp.concatenate([wide, t5], axis=1),
            "pooled_projections": jnp.concatenate(pooled, axis=-1),
        }

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        config = self.configs["transformer"]
        sizes = {
            "encoder_hidden_states": (texts, tokens, config.joint_attention_dim),
            "pooled_projections": (texts, config.pooled_projection_dim),
        }
        return {x: jax.ShapeDtypeStruct(size, jnp.float32) for x, size in sizes.items()}

    def levels(
        self, scheduler: Scheduler, num_inference_steps: int, canvas: Canvas, strength: float
    ) -> list[Level]:
        """Return each step's scalars, of levels down to the first trained one."""
        flow: Any = scheduler
        return flow.levels(num_inference_steps, canvas.tokens, strength, last=flow.smallest)

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of SD3Transformer's call."""
        timestep = jnp.broadcast_to(_TIMESTEPS * time, latents.shape[0])
        return {"hidden_states": latents, "timestep": timestep, **conditions}


def _schedule_of(configs: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[str, str | None]:
    transformer = configs.get("transformer")
    if transformer is None or transformer.qk_norm is None:
        return "sd3", None
    if transformer.dual_attention_layers:
        return "sd3.5-medium", None
    return "sd3.5-large", (
        "doesn't say whether it is distilled, so it is sampled as SD3.5 large is, in 28 steps with "
        'guidance; say schedule "sd3.5-large-turbo" for the other, which takes 4 steps'
    )


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components of an SD3 model don't fit, naming both sizes."""
    yield from latent_misfits(configs)
    clips, t5 = [configs.get(name) for name in _CLIPS], configs.get("text_encoder_3")
    transformer = configs.get("transformer")
    if transformer and t5 and transformer.joint_attention_dim != t5.d_model:
        yield (
            f"the transformer takes text tokens of {transformer.joint_attention_dim} channels, and "
            f"text_encoder_3 gives {t5.d_model}"
        )
    if all(clips):
        yield from _clip_misfits(clips, transformer, t5)
    for name, tokenizer in {**_CLIPS, "text_encoder_3": "tokenizer_3"}.items():
        if configs.get(name) and tokenizer in tokenizers:
            yield from tokenizer_misfits(tokenizer, tokenizers[tokenizer], configs[name])


def _clip_misfits(clips: list[Any], transformer: Any, t5: Any) -> Iterator[str]:
    names = " and ".join(_CLIPS)
    pooled, wide = (sum(getattr(x, y) for x in clips) for y in ("projection_dim", "hidden_size"))
    if transformer and transformer.pooled_projection_dim != pooled:
        yield (
            f"the transformer takes a pooled text of {transformer.pooled_projection_dim} channels, "
            f"and {names} give {pooled}"
        )
    if t5 and wide > t5.d_model:
        yield f"{names} give {wide} channels, more than text_encoder_3's {t5.d_model}"
    if clips[0].max_position_embeddings != clips[1].max_position_embeddings:
        lengths = " and ".join(str(x.max_position_embeddings) for x in clips)
        yield f"{names} take texts of {lengths} tokens, which must be the same"


def _autoencoder_config(shapes, path) -> AutoencoderKLConfig:
    return dataclasses.replace(config_from_bfl(shapes, path), **_SCALING)


def _within(component: Component, name: str) -> Component:
    """Return a component of which single files hold several, told by what is before its names."""
    assert component.file is not None
    return dataclasses.replace(component, file=dataclasses.replace(component.file, within=name))


assert AUTOENCODER_KL.file is not None
_VAE = dataclasses.replace(
    AUTOENCODER_KL, file=dataclasses.replace(AUTOENCODER_KL.file, config=_autoencoder_config)
)
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": _TIMESTEPS,
    "shift": 3.0,
}


def _schedule(name: str, steps: int, guidance: float) -> Schedule:
    defaults = {"num_inference_steps": steps, "true_cfg_scale": guidance}
    return Schedule(name=name, scheduler=_SCHEDULER, defaults=defaults)


def _sizes(transformer: SD3Config) -> dict[str, Any]:
    """Return the configs of a published model."""
    return {
        "text_encoder": ProjectedCLIPTextConfig(  # CLIP-L
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            projection_dim=768,
            eos_token_id=2,
        ),
        "text_encoder_2": ProjectedCLIPTextConfig(  # CLIP-G
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            eos_token_id=2,
        ),
        "text_encoder_3": T5_XXL,
        "vae": AutoencoderKLConfig(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **_SCALING,
        ),
        "transformer": transformer,
    }


_LARGE = SD3Config(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
)
_MEDIUM = SD3Config(
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
)
_CLIP_TOKENIZER = Tokenizer(
    kind="CLIPTokenizer", length=77, specials=("<|endoftext|>", "<|startoftext|>")
)

SD3 = Family(
    name="SD3",
    pipelines=("StableDiffusion3Pipeline",),
    components={
        "text_encoder": _within(CLIP_TEXT_PROJECTED, "clip_l"),
        "text_encoder_2": _within(CLIP_TEXT_PROJECTED, "clip_g"),
        "text_encoder_3": T5_ENCODER,
        "vae": _VAE,
        "transformer": TRANSFORMER,
    },
    tokenizers={
        "tokenizer": _CLIP_TOKENIZER,
        "tokenizer_2": _CLIP_TOKENIZER,
        "tokenizer_3": Tokenizer(kind="T5TokenizerFast", length=512, specials=("<pad>", "</s>")),
    },
    denoiser=SD3Denoiser,
    schedules={
        "sd3.5-large": _schedule("SD3.5 large's", 28, 3.5),
        "sd3.5-large-turbo": _schedule("SD3.5 large turbo's", 4, 1.0),
        "sd3.5-medium": _schedule("SD3.5 medium's", 40, 4.5),
        "sd3": _schedule("SD3 medium's", 28, 7.0),
    },
    schedule_of=_schedule_of,
    schedule_like=lambda scheduler, index: "sd3.5-large",
    misfits=_misfits,
    defaults_of=default_side,
    adapters=(
        AdapterNaming(
            rules=diffusers_rules,
            prefixes=("", "transformer.", "base_model.model."),
            flat="lora_transformer_",
        ),
        AdapterNaming(
            rules=lambda config: file_rules(),
            prefixes=("", "diffusion_model.", "base_model.model."),
            flat="lora_unet_",
        ),
    ),
    sizes={
        "sd3.5_large": _sizes(_LARGE),
        "sd3.5_medium": _sizes(_MEDIUM),
        "sd3_medium": _sizes(SD3Config()),
    },
)
