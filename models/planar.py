"""What denoisers of latents that lie as channels, rows and columns have in common."""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.denoiser import Canvas, Denoiser
from models.fit import picture_misfits


class PlanarDenoiser(Denoiser):
    """Latents of [channels, height, width], a model of patches or pixels, and an AutoencoderKL."""

    main: ClassVar[str] = "transformer"  # the model's component, as `Family.main`
    autoencoder: ClassVar[str] = "vae"

    @property
    def multiple(self) -> int:
        """What height and width must be multiples of, in pixels: of a latent token's side."""
        return self.configs[self.main].patch_size * self.configs[self.autoencoder].downsampling

    def canvas(self, height: int, width: int) -> Canvas:
        """Return the size of an image's latents."""
        step = self.configs[self.autoencoder].downsampling
        shape = (self.configs[self.main].in_channels, height // step, width // step)
        tokens = (height // self.multiple) * (width // self.multiple)
        return Canvas(height=height, width=width, shape=shape, tokens=tokens)

    def output(self, prediction: Any, latents: jax.Array) -> jax.Array:
        """Return the noise or velocity, without what may be learned of a variance behind it."""
        return prediction[:, : latents.shape[1]].astype(jnp.float32)

    def encode_image(
        self, autoencoder: nnx.Module, image: jax.Array, noise: jax.Array, canvas: Canvas
    ) -> jax.Array:
        """Return latents, a draw from the distribution that the autoencoder gives."""
        vae: Any = autoencoder
        mean, logvar = (x.astype(jnp.float32) for x in vae.encode(image))
        latents = mean + jnp.exp(0.5 * logvar) * noise.transpose(0, 2, 3, 1)
        latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return latents.transpose(0, 3, 1, 2)

    def decode(self, autoencoder: nnx.Module, latents: jax.Array, canvas: Canvas) -> jax.Array:
        """Return the image of latents."""
        vae: Any = autoencoder
        latents = latents.transpose(0, 2, 3, 1)
        return vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0))


def default_side(
    configs: Any, main: str = "transformer", autoencoder: str = "vae"
) -> dict[str, int]:
    """Return the height and width that a model of these configs draws unless told otherwise.

    Args:
      configs: by component; the model's has a `sample_size` in latent pixels.
      main: the model's component.
      autoencoder: the autoencoder's component.
    """
    model, vae = configs.get(main), configs.get(autoencoder)
    if model is None or vae is None or model.sample_size is None:
        return {}
    side = model.sample_size * vae.downsampling
    return {"height": side, "width": side}


def latent_misfits(
    configs: Any, *, main: str = "transformer", autoencoder: str = "vae", variance: bool = False
) -> Iterator[str]:
    """Yield why a model can't denoise an autoencoder's latents, naming both sizes.

    Args:
      configs: by component.
      main: the component that denoises.
      autoencoder: the one whose latents it takes.
      variance: whether it may give as many channels again, of a learned variance.
    """
    model, vae = configs.get(main), configs.get(autoencoder)
    if model:
        taken = model.in_channels
        given = getattr(model, "out_channels", None) or taken
        if given not in ((taken, 2 * taken) if variance else (taken,)):
            yield f"the {main} takes latents of {taken} channels and gives {given}"
        latent = vae and getattr(vae, "entry_channels", vae.latent_channels)  # of a codebook
        if vae and taken != latent:
            yield (
                f"the {main} takes latents of {taken} channels, and the autoencoder gives {latent}"
            )
    yield from picture_misfits(vae)
