"""AutoencoderKL: images to latents and back."""

from models.vae.config import AutoencoderKLConfig
from models.vae.modeling import AutoencoderKL, DiagonalGaussian
from models.vae.params import export_autoencoder_kl, load_autoencoder_kl

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DiagonalGaussian",
    "export_autoencoder_kl",
    "load_autoencoder_kl",
]
