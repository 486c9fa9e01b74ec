"""Unconditional latent diffusion as a family: how its components fit, and how it is sampled."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.denoiser import Canvas, Conditions, Inputs
from models.family import Family, Schedule
from models.ldm.config import UNetConfig
from models.ldm.params import UNET
from models.planar import PlanarDenoiser, default_side, latent_misfits
from models.vae.config import VQModelConfig
from models.vae.params import VQ_MODEL

if TYPE_CHECKING:
    from models.sampler import Sampler

_CALIBRATION = 64  # images that recipes are calibrated on


class LDMDenoiser(PlanarDenoiser):
    """Pictures that nothing describes: texts only say how many there are."""

    main: ClassVar[str] = "unet"
    autoencoder: ClassVar[str] = "vqvae"

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError for images; warn of a text, which isn't read."""
        super().check(inputs)
        if text := next((text for text in inputs.texts if text.strip()), None):
            warnings.warn(
                f"this model reads no text, so {text[:40]!r} only asks for one more picture",
                stacklevel=4,
            )

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return nothing of the texts but a row each, [texts, 0]."""
        return {"rows": jnp.zeros((len(texts), 0))}

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        return {"rows": jax.ShapeDtypeStruct((texts, 0), jnp.float32)}

    def calibration_texts(self) -> Sequence[str]:
        """Return a text for each image to calibrate on."""
        return ("",) * _CALIBRATION

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of UNet's call."""
        return {"sample": latents, "timestep": jnp.broadcast_to(time, latents.shape[0])}

    def encode_image(
        self, autoencoder: nnx.Module, image: jax.Array, noise: jax.Array, canvas: Canvas
    ) -> jax.Array:
        """Return latents; there is nothing to draw."""
        vq: Any = autoencoder
        latents = vq.encode(image).astype(jnp.float32) * vq.config.scaling_factor
        return latents.transpose(0, 3, 1, 2)

    def decode(self, autoencoder: nnx.Module, latents: jax.Array, canvas: Canvas) -> jax.Array:
        """Return the image of latents, each the nearest entry of the codebook."""
        vq: Any = autoencoder
        return vq.decode(latents.transpose(0, 2, 3, 1) / vq.config.scaling_factor)


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components don't fit, naming both sizes."""
    yield from latent_misfits(configs, main="unet", autoencoder="vqvae")


_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "clip_sample": False,
    "num_train_timesteps": 1000,
}

LDM = Family(
    name="LDM",
    pipelines=("LDMPipeline",),
    components={"vqvae": VQ_MODEL, "unet": UNET},
    tokenizers={},
    denoiser=LDMDenoiser,
    schedules={
        "ldm": Schedule(name="LDM's", scheduler=_SCHEDULER, defaults={"num_inference_steps": 50})
    },
    schedule_of=lambda configs, index: ("ldm", None),
    schedule_like=lambda scheduler, index: "ldm",
    misfits=_misfits,
    defaults_of=partial(default_side, main="unet", autoencoder="vqvae"),
    sizes={
        "ldm-celebahq-256": {
            "vqvae": VQModelConfig(
                block_out_channels=(128, 256, 512),
                layers_per_block=2,
                num_vq_embeddings=8192,
                sample_size=256,
            ),
            "unet": UNetConfig(attention_head_dim=32, sample_size=64),
        }
    },
    main="unet",
    autoencoder="vqvae",
)
