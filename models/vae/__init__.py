"""Autoencoders: images to latents and back."""

from models.vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config
from models.vae.flux2 import AUTOENCODER_KL_FLUX2
from models.vae.modeling import AutoencoderKL, AutoencoderKLFlux2, DiagonalGaussian
from models.vae.params import AUTOENCODER_KL

__all__ = [
    "AUTOENCODER_KL",
    "AUTOENCODER_KL_FLUX2",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2",
    "AutoencoderKLFlux2Config",
    "DiagonalGaussian",
]
