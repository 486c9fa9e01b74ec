"""The convolutional autoencoders of latent diffusion (arXiv 2112.10752), of SD and FLUX.

Images and latents are [batch, height, width, channels]. Norms and softmax run in float32.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import dot_product_attention
from models.vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, VQModelConfig
from models.vae.packing import pack, unpack

# The weight init of torch's convolutions: uniform within 1 / sqrt(fan_in).
_KERNEL_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Attention logits take 4 bytes a query and key: 1 GiB at 128x128 latents if made all at once.
_QUERIES_AT_ONCE = 2048


class DiagonalGaussian(NamedTuple):
    """The encoder's distribution of latents; its mode is its mean."""

    mean: jax.Array  # [batch, latent height, latent width, latent channels]
    logvar: jax.Array  # the same shape, within -30..20

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw latents with a random key."""
        noise = jax.random.normal(key, self.mean.shape, jnp.float32)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise.astype(self.mean.dtype)


class _Autoencoder(nnx.Module):
    """Encoder and decoder. What diffusion runs on is made of latents by `normalize`.

    Args:
      config: the shape.
      rngs: random keys for the initial weights: torch's default for kernels, zero for biases.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: AutoencoderKLConfig | AutoencoderKLFlux2Config,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        latent = config.latent_channels
        self.config = config
        self.encoder = _Encoder(config, **options)
        self.decoder = _Decoder(config, **options)
        self.quant_conv = (
            _conv(2 * latent, 2 * latent, 1, **options) if config.use_quant_conv else None
        )
        self.post_quant_conv = (
            _conv(latent, latent, 1, **options) if config.use_post_quant_conv else None
        )

    def encode(
        self,
        images: jax.Array,  # [batch, height, width, in_channels], in -1..1
    ) -> DiagonalGaussian:
        """Return the distribution of latents, unscaled.

        Raises:
          ValueError: a wrong shape, or a side that is no multiple of the downsampling.
        """
        _check_image("images", images, self.config.in_channels)
        _check_sides(images, self.config.downsampling)
        x = self.encoder(images)
        x = x if self.quant_conv is None else self.quant_conv(x)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return DiagonalGaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(
        self,
        latents: jax.Array,  # [batch, latent height, latent width, latent_channels], unscaled
    ) -> jax.Array:
        """Return images, [batch, height, width, out_channels], about -1..1 and not clipped.

        Raises:
          ValueError: a wrong shape.
        """
        _check_image("latents", latents, self.config.latent_channels)
        latents = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        return self.decoder(latents)


class AutoencoderKL(_Autoencoder):
    """SD's, SDXL's, SD3's and FLUX.1's, whose latents are shifted and scaled by two numbers."""

    config: AutoencoderKLConfig

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Return what diffusion runs on, of the same shape, any, and dtype."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """Return what `decode` takes, of the same shape and dtype: the inverse of `normalize`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


class AutoencoderKLFlux2(_Autoencoder):
    """FLUX.2's, whose latents are packed 2x2 and brought to mean 0 and variance 1 by channel."""

    config: AutoencoderKLFlux2Config

    def __init__(
        self,
        config: AutoencoderKLFlux2Config,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.bn = _Statistics(config.packed_channels, param_dtype)

    def normalize(
        self,
        latents: jax.Array,  # float32 [batch, height, width, latent_channels], both sides even
    ) -> jax.Array:
        """Return what diffusion runs on, [batch, height / 2, width / 2, 4 latent_channels]."""
        return (pack(latents) - self._mean()) / self._deviation()

    def denormalize(
        self,
        latents: jax.Array,  # float32 [batch, rows, columns, 4 latent_channels]
    ) -> jax.Array:
        """Return what `decode` takes, [batch, 2 rows, 2 columns, latent_channels]."""
        return unpack(latents * self._deviation() + self._mean())

    def _mean(self) -> jax.Array:
        return self.bn.running_mean[...].astype(jnp.float32)

    def _deviation(self) -> jax.Array:
        variance = self.bn.running_var[...].astype(jnp.float32)
        return jnp.sqrt(variance + self.config.batch_norm_eps)


class VQModel(nnx.Module):
    """An autoencoder whose decoder is given entries of a codebook (arXiv 2012.09841).

    Args:
      config: the shape.
      rngs: random keys for the initial weights.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: VQModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        latent, entry = config.latent_channels, config.entry_channels
        self.config = config
        self.encoder = _Encoder(config, **options)
        self.decoder = _Decoder(config, **options)
        self.quant_conv = _conv(latent, entry, 1, **options)
        self.codebook = nnx.Embed(config.num_vq_embeddings, entry, **options)
        self.post_quant_conv = _conv(entry, latent, 1, **options)

    def encode(
        self,
        images: jax.Array,  # [batch, height, width, in_channels], in -1..1
    ) -> jax.Array:
        """Return latents [batch, rows, columns, entry_channels], unscaled and of no codebook.

        Raises:
          ValueError: a wrong shape, or a side that is no multiple of the downsampling.
        """
        _check_image("images", images, self.config.in_channels)
        _check_sides(images, self.config.downsampling)
        return self.quant_conv(self.encoder(images))

    def decode(
        self,
        latents: jax.Array,  # [batch, rows, columns, entry_channels], unscaled
    ) -> jax.Array:
        """Return images of the nearest entries, [batch, height, width, out_channels].

        Raises:
          ValueError: a wrong shape.
        """
        _check_image("latents", latents, self.config.entry_channels)
        entries = self.codebook(self.nearest(latents))
        return self.decoder(self.post_quant_conv(entries))

    def nearest(
        self,
        latents: jax.Array,  # [batch, rows, columns, entry_channels]
    ) -> jax.Array:
        """Return which entry is nearest to each, int32 [batch, rows, columns]; float32 inside."""
        entries = self.codebook.embedding.get_value().astype(jnp.float32)
        flat = latents.astype(jnp.float32)
        along = jnp.einsum("bhwc,nc->bhwn", flat, entries, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(jnp.sum(entries**2, axis=1) - 2 * along, axis=-1).astype(jnp.int32)


class _Statistics(nnx.Module):
    """Mean and variance of each packed channel over the training images, under torch's names."""

    def __init__(self, channels: int, dtype: jnp.dtype):
        self.running_mean = nnx.BatchStat(jnp.zeros(channels, dtype))
        self.running_var = nnx.BatchStat(jnp.ones(channels, dtype))


class _Encoder(nnx.Module):
    def __init__(self, config, **options):
        widths = config.block_out_channels
        self.conv_in = _conv(config.in_channels, widths[0], 3, **options)
        self.down_blocks = nnx.List(
            [
                _DownBlock(config, inputs, outputs, downsample=level < len(widths) - 1, **options)
                for level, (inputs, outputs) in enumerate(pairwise((widths[0], *widths)))
            ]
        )
        self.mid_block = _MidBlock(config, widths[-1], **options)
        self.conv_norm_out = _norm(config, widths[-1], **options)
        self.conv_out = _conv(widths[-1], config.encoded_channels, 3, **options)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class _Decoder(nnx.Module):
    def __init__(self, config, **options):
        widths = config.decoder_widths[::-1]
        self.conv_in = _conv(config.latent_channels, widths[0], 3, **options)
        self.mid_block = _MidBlock(config, widths[0], **options)
        self.up_blocks = nnx.List(
            [
                _UpBlock(config, inputs, outputs, upsample=level < len(widths) - 1, **options)
                for level, (inputs, outputs) in enumerate(pairwise((widths[0], *widths)))
            ]
        )
        self.conv_norm_out = _norm(config, widths[-1], **options)
        self.conv_out = _conv(widths[-1], config.out_channels, 3, **options)

    def __call__(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class _DownBlock(nnx.Module):
    def __init__(self, config, inputs: int, outputs: int, *, downsample: bool, **options):
        self.resnets = _resnets(config, inputs, outputs, config.layers_per_block, **options)
        # Padded on the right and bottom only, as the original is.
        padding = ((0, 1), (0, 1))
        self.downsample = (
            _conv(outputs, outputs, 3, strides=2, padding=padding, **options)
            if downsample
            else None
        )

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsample is None else self.downsample(x)


class _UpBlock(nnx.Module):
    def __init__(self, config, inputs: int, outputs: int, *, upsample: bool, **options):
        self.resnets = _resnets(config, inputs, outputs, config.layers_per_block + 1, **options)
        self.upsample = _conv(outputs, outputs, 3, **options) if upsample else None

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsample is None:
            return x
        return self.upsample(x.repeat(2, axis=1).repeat(2, axis=2))


class _MidBlock(nnx.Module):
    def __init__(self, config, width: int, **options):
        self.resnets = _resnets(config, width, width, 2, **options)
        self.attention = (
            _Attention(config, width, **options) if config.mid_block_add_attention else None
        )

    def __call__(self, x):
        x = self.resnets[0](x)
        x = x if self.attention is None else self.attention(x)
        return self.resnets[1](x)


class _ResnetBlock(nnx.Module):
    def __init__(self, config, inputs: int, outputs: int, **options):
        self.norm1 = _norm(config, inputs, **options)
        self.conv1 = _conv(inputs, outputs, 3, **options)
        self.norm2 = _norm(config, outputs, **options)
        self.conv2 = _conv(outputs, outputs, 3, **options)
        self.conv_shortcut = _conv(inputs, outputs, 1, **options) if inputs != outputs else None

    def __call__(self, x):
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nnx.Module):
    """Single-head attention over all pixels, a slice of the queries at a time."""

    def __init__(self, config, width: int, **options):
        self.group_norm = _norm(config, width, **options)
        self.to_q = nnx.Linear(width, width, kernel_init=_KERNEL_INIT, **options)
        self.to_k = nnx.Linear(width, width, kernel_init=_KERNEL_INIT, **options)
        self.to_v = nnx.Linear(width, width, kernel_init=_KERNEL_INIT, **options)
        self.to_out = nnx.Linear(width, width, kernel_init=_KERNEL_INIT, **options)

    def __call__(self, x):
        batch, height, width, channels = x.shape
        y = self.group_norm(x).reshape(batch, height * width, 1, channels)
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)
        y = jnp.concatenate(
            [
                dot_product_attention(q[:, start : start + _QUERIES_AT_ONCE], k, v)
                for start in range(0, height * width, _QUERIES_AT_ONCE)
            ],
            axis=1,
        )
        return x + self.to_out(y).reshape(x.shape)


def _resnets(config, inputs: int, outputs: int, number: int, **options) -> nnx.List:
    return nnx.List(
        [
            _ResnetBlock(config, inputs if i == 0 else outputs, outputs, **options)
            for i in range(number)
        ]
    )


def _conv(
    inputs: int, outputs: int, size: int, *, strides: int = 1, padding="SAME", **options
) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=strides,
        padding=padding,
        kernel_init=_KERNEL_INIT,
        **options,
    )


def _norm(config, channels: int, **options) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        channels, num_groups=config.norm_num_groups, use_fast_variance=False, **options
    )


def _check_image(name: str, value: jax.Array, channels: int) -> None:
    if value.ndim != 4 or value.shape[-1] != channels:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; expected [batch, height, width, {channels}]"
        )


def _check_sides(images: jax.Array, factor: int) -> None:
    height, width = images.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(f"images is {height}x{width}; pad or crop to multiples of {factor}")
