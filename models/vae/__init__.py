"""AutoencoderKL: images to latents and back."""

from models.vae.config import AutoencoderKLConfig
from models.vae.modeling import AutoencoderKL, DiagonalGaussian
from models.vae.params import AUTOENCODER_KL

__all__ = [
    "AUTOENCODER_KL",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DiagonalGaussian",
]
