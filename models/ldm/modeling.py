"""The UNet of unconditional latent diffusion (arXiv 2112.10752).

The call follows diffusers' UNet2DModel; projections that share an input are one linear.
"""

import jax
from flax import nnx

from models.attention import dot_product_attention, fused_mixture, split_heads
from models.ldm.config import UNetConfig
from models.levels.config import Level
from models.levels.modeling import Carry, Levels, Make


class Attention(nnx.Module):
    """Attention over the pixels of an image, which is added to what it gives."""

    def __init__(self, level: Level, make: Make):
        self.heads = level.heads
        self.norm = make.norm(level.width)
        self.qkv = make.linear(level.width, 3 * level.width, role="attention_in")
        self.proj = make.linear(level.width, level.width, role="attention_out")
        size = level.width // level.heads
        self.mixtures = (fused_mixture((("qkv", "proj"),), level.width, size),)

    def __call__(self, x: jax.Array, text: jax.Array | None) -> jax.Array:
        """[b, h, w, c] to the same; there is no text."""
        tokens = self.norm(x).reshape(len(x), -1, x.shape[-1])
        found = dot_product_attention(*split_heads(self.qkv(tokens), self.heads, 3))
        return self.proj(found.reshape(x.shape), residual=x)


class UNet(Levels):
    """Predicts the noise in latents of an image that nothing describes."""

    config: UNetConfig

    @staticmethod
    def attention(level: Level, make: Make) -> nnx.Module:
        """Return attention over an image's pixels."""
        return Attention(level, make)

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
