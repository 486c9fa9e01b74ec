"""The UNet of unconditional latent diffusion (arXiv 2112.10752).

The call follows diffusers' UNet2DModel.
"""

import jax

from models.ldm.config import UNetConfig
from models.unet.modeling import Carry, Levels


class UNet(Levels):
    """Predicts the noise in latents of an image that nothing describes."""

    config: UNetConfig

    def __call__(
        self,
        sample: jax.Array,  # [b, in_channels, height, width]: noisy latents
        timestep: jax.Array,  # [b] or [], 0 (data) to 999 (noise)
    ) -> jax.Array:
        """Return the noise, [b, out_channels, height, width].

        Raises:
          ValueError: the latents have another shape.
        """
        return self.through(self.start(sample=sample, timestep=timestep))

    def start(self, *, sample: jax.Array, timestep: jax.Array) -> Carry:
        """Return what goes into the first block; arguments as the call's."""
        return self.into(sample, self.embed(sample, timestep), None)
