"""PixArt-Sigma as a family: what its components are, how they fit, and how it is sampled."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from models.denoiser import Conditions
from models.family import Family, Schedule, Tokenizer
from models.fit import tokenizer_misfits
from models.pixart.config import PixArtConfig
from models.pixart.params import TRANSFORMER
from models.planar import PlanarDenoiser, default_side, latent_misfits
from models.text_encoders.t5 import T5_ENCODER, T5_XXL
from models.tokenizers import padded_tokens
from models.vae.config import AutoencoderKLConfig
from models.vae.params import AUTOENCODER_KL

if TYPE_CHECKING:
    from models.sampler import Sampler

_LONGEST = 300  # tokens of a text


class PixArtDenoiser(PlanarDenoiser):
    """T5's tokens of which padding is masked, noise predicted, a learned variance not used."""

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return text tokens [texts, 300, channels] and which of them count, bool [texts, 300].

        Texts are read in lower case, as they were in training; a warning says what is cut.
        """
        read = [text.lower().strip() for text in texts]
        ids, mask = padded_tokens(sampler.tokenizers["tokenizer"], read, _LONGEST)
        states = sampler.run("text_encoder", "encode prompts", ids, mask)
        counts = jnp.asarray(mask.astype(bool))
        return {"encoder_hidden_states": states, "encoder_attention_mask": counts}

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        channels = self.configs["transformer"].caption_channels
        return {
            "encoder_hidden_states": jax.ShapeDtypeStruct((texts, tokens, channels), jnp.float32),
            "encoder_attention_mask": jax.ShapeDtypeStruct((texts, tokens), jnp.bool),
        }

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of PixArtTransformer's call."""
        timestep = jnp.broadcast_to(time, latents.shape[0])
        return {"hidden_states": latents, "timestep": timestep, **conditions}


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components of a PixArt-Sigma don't fit, naming both sizes."""
    transformer, encoder = configs.get("transformer"), configs.get("text_encoder")
    yield from latent_misfits(configs, variance=True)
    if transformer and encoder and transformer.caption_channels != encoder.d_model:
        yield (
            f"the transformer takes text tokens of {transformer.caption_channels} channels, and "
            f"text_encoder gives {encoder.d_model}"
        )
    if encoder and "tokenizer" in tokenizers:
        yield from tokenizer_misfits("tokenizer", tokenizers["tokenizer"], encoder)


_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "trained_betas": None,
}
_VAE = AutoencoderKLConfig(  # SDXL's
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.13025
)


def _sizes(sample_size: int) -> dict[str, Any]:
    """Return the configs of a PixArt-Sigma-XL/2 for images of so many latent pixels a side.

    Positions lie as diffusers' `scripts/convert_pixart_sigma_to_diffusers.py` has them: of 256
    pixels half as far apart as of 512.
    """
    transformer = PixArtConfig(sample_size=sample_size, interpolation_scale=sample_size / 64)
    return {"text_encoder": T5_XXL, "vae": _VAE, "transformer": transformer}


PIXART = Family(
    name="PixArt-Sigma",
    pipelines=("PixArtSigmaPipeline",),
    components={"text_encoder": T5_ENCODER, "vae": AUTOENCODER_KL, "transformer": TRANSFORMER},
    tokenizers={
        "tokenizer": Tokenizer(kind="T5Tokenizer", length=_LONGEST, specials=("<pad>", "</s>"))
    },
    denoiser=PixArtDenoiser,
    schedules={
        "pixart-sigma": Schedule(
            name="PixArt-Sigma's",
            scheduler=_SCHEDULER,
            defaults={"num_inference_steps": 20, "true_cfg_scale": 4.5},
        )
    },
    schedule_of=lambda configs, index: ("pixart-sigma", None),
    schedule_like=lambda scheduler, index: "pixart-sigma",
    misfits=_misfits,
    defaults_of=default_side,
    sizes={
        "pixart-sigma-xl-2-1024-ms": _sizes(128),
        "pixart-sigma-xl-2-512-ms": _sizes(64),
        "pixart-sigma-xl-2-256x256": _sizes(32),
        "pixart-sigma-xl-2-2k-ms": _sizes(256),
    },
)
