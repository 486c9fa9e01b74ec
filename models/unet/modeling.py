"""The UNets of latent diffusion (arXiv 2112.10752): SD's, SDXL's and the unconditional ones.

The call follows diffusers' UNet2DConditionModel; projections that share an input are one linear,
and convolutions over single pixels are linears. Inside, images are [b, h, w, c].
Shapes: b batch, h rows, w columns, c channels, s text tokens, d channels of the embedded time.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import dot_product_attention, split_heads
from models.conditioning import Embedder, sinusoidal_embedding
from models.convolution import Conv
from models.linear import Linear, layer_norm
from models.unet.config import SIZES, Level, UNetConditionConfig, UNetSizes

_MLP_RATIO = 4
_TRANSFORMER_EPSILON = 1e-6  # of the norm before transformer blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    x: jax.Array  # [b, h, w, c]
    skips: tuple[jax.Array, ...]  # of the way down, that the way up has still to read
    time: jax.Array  # [b, d]: embedded time, and what joins it, through SiLU
    text: jax.Array | None  # [b, s, channels]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Make:
    """How the layers of a model are made."""

    config: UNetSizes
    options: Mapping[str, Any]  # rngs, dtype and param_dtype

    def linear(self, *sizes: int, **more: Any) -> Linear:
        return Linear(*sizes, **more, **self.options)

    def conv(self, *sizes: int, **more: Any) -> Conv:
        return Conv(*sizes, **more, **self.options)

    def norm(self, channels: int, epsilon: float | None = None) -> nnx.GroupNorm:
        return nnx.GroupNorm(
            channels,
            num_groups=self.config.norm_num_groups,
            epsilon=self.config.norm_eps if epsilon is None else epsilon,
            use_fast_variance=False,
            **self.options,
        )


class ResNet(nnx.Module):
    """Two convolutions, time between them, and what came in."""

    def __init__(self, inputs: int, outputs: int, make: _Make):
        self.norm1 = make.norm(inputs)
        self.conv1 = make.conv(inputs, outputs, 3, role="conv")
        self.time_proj = make.linear(make.config.time_channels, outputs, role="modulation")
        self.norm2 = make.norm(outputs)
        self.conv2 = make.conv(outputs, outputs, 3, role="conv")
        self.shortcut = make.linear(inputs, outputs, role="shortcut") if inputs != outputs else None

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """[b, h, w, inputs] and [b, d] to [b, h, w, outputs]."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = y + self.time_proj(time)[:, None, None]
        x = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(nnx.silu(self.norm2(y)), residual=x)


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, and an MLP gated by GELU, each behind a norm."""

    def __init__(self, level: Level, text: int, make: _Make):
        width, inner = level.width, _MLP_RATIO * level.width
        linear = partial(make.linear, use_bias=False, role="attention_in")
        norm = partial(nnx.LayerNorm, width, epsilon=1e-5, **make.options)
        self.heads = level.heads
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.qkv = linear(width, 3 * width)
        self.proj = make.linear(width, width, role="attention_out")
        self.cross_q = linear(width, width)
        self.cross_kv = linear(text, 2 * width)
        self.cross_proj = make.linear(width, width, role="attention_out")
        self.up = make.linear(width, 2 * inner, role="mlp_in")
        self.down = make.linear(inner, width, role="mlp_out")

    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """[b, t, c] and [b, s, channels] to [b, t, c]."""
        qkv = split_heads(self.qkv(x, norm=layer_norm(self.norm1)), self.heads, 3)
        x = self.proj(dot_product_attention(*qkv).reshape(x.shape), residual=x)
        (query,) = split_heads(self.cross_q(x, norm=layer_norm(self.norm2)), self.heads)
        found = dot_product_attention(query, *split_heads(self.cross_kv(text), self.heads, 2))
        x = self.cross_proj(found.reshape(x.shape), residual=x)
        value, gate = jnp.split(self.up(x, norm=layer_norm(self.norm3)), 2, axis=-1)
        return self.down(value * nnx.gelu(gate, approximate=False), residual=x)


class Transformer(nnx.Module):
    """Transformer blocks over the pixels of an image, which is added to what they give."""

    def __init__(self, level: Level, text: int, make: _Make):
        width = level.width
        self.norm = make.norm(width, _TRANSFORMER_EPSILON)
        self.proj_in = make.linear(width, width, role="projection")
        self.blocks = nnx.List(TransformerBlock(level, text, make) for _ in range(level.depth))
        self.proj_out = make.linear(width, width, role="projection")

    def __call__(self, x: jax.Array, text: jax.Array | None) -> jax.Array:
        """[b, h, w, c] and [b, s, channels] to [b, h, w, c]."""
        assert text is not None
        y = self.proj_in(self.norm(x)).reshape(len(x), -1, x.shape[-1])
        for block in self.blocks:
            y = block(y, text)
        return self.proj_out(y.reshape(x.shape), residual=x)


class Attention(nnx.Module):
    """Attention over the pixels of an image, which is added to what it gives."""

    def __init__(self, level: Level, make: _Make):
        self.heads = level.heads
        self.norm = make.norm(level.width)
        self.qkv = make.linear(level.width, 3 * level.width, role="attention_in")
        self.proj = make.linear(level.width, level.width, role="attention_out")

    def __call__(self, x: jax.Array, text: jax.Array | None) -> jax.Array:
        """[b, h, w, c] to the same; there is no text."""
        tokens = self.norm(x).reshape(len(x), -1, x.shape[-1])
        found = dot_product_attention(*split_heads(self.qkv(tokens), self.heads, 3))
        return self.proj(found.reshape(x.shape), residual=x)


def _attention(level: Level, make: _Make) -> nnx.Module:
    if isinstance(make.config, UNetConditionConfig):
        return Transformer(level, make.config.cross_attention_dim, make)
    return Attention(level, make)


class _Block(nnx.Module):
    """Residual blocks, and attention behind each of them or none."""

    def __init__(self, inputs: list[int], level: Level, make: _Make):
        self.resnets = nnx.List(ResNet(size, level.width, make) for size in inputs)
        number = 0 if level.heads is None else len(inputs)
        self.attentions = nnx.List(_attention(level, make) for _ in range(number))

    def _run(self, index: int, x: jax.Array, carry: Carry) -> jax.Array:
        """Return what a residual block, and attention behind it, make of an image."""
        x = self.resnets[index](x, carry.time)
        return self.attentions[index](x, carry.text) if self.attentions else x


class DownBlock(_Block):
    """A level on the way down; what each residual block gives is kept for the way up."""

    def __init__(self, inputs: int, level: Level, make: _Make, *, last: bool):
        others = [level.width] * (make.config.layers_per_block - 1)
        super().__init__([inputs, *others], level, make)
        halve = partial(make.conv, level.width, level.width, 3, strides=2, role="resample")
        self.downsample = None if last else halve()

    def __call__(self, carry: Carry) -> Carry:
        """Return what comes after this level."""
        x, skips = carry.x, list(carry.skips)
        for index in range(len(self.resnets)):
            x = self._run(index, x, carry)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return dataclasses.replace(carry, x=x, skips=tuple(skips))


class MidBlock(nnx.Module):
    """Two residual blocks at the coarsest level, and attention between them."""

    def __init__(self, level: Level, make: _Make):
        self.resnets = nnx.List(ResNet(level.width, level.width, make) for _ in range(2))
        self.attentions = nnx.List([_attention(level, make)])

    def __call__(self, carry: Carry) -> Carry:
        """Return what comes after it."""
        x = self.attentions[0](self.resnets[0](carry.x, carry.time), carry.text)
        return dataclasses.replace(carry, x=self.resnets[1](x, carry.time))


class UpBlock(_Block):
    """A level on the way up; each residual block reads one of the way down beside its input."""

    def __init__(self, inputs: int, skips: list[int], level: Level, make: _Make, *, last: bool):
        before = [inputs, *[level.width] * (len(skips) - 1)]
        sizes = [size + skip for size, skip in zip(before, skips, strict=True)]
        super().__init__(sizes, level, make)
        double = partial(make.conv, level.width, level.width, 3, role="resample")
        self.upsample = None if last else double()

    def __call__(self, carry: Carry) -> Carry:
        """Return what comes after this level."""
        x, skips = carry.x, list(carry.skips)
        for index in range(len(self.resnets)):
            x = self._run(index, jnp.concatenate([x, skips.pop()], axis=-1), carry)
        if self.upsample is not None:
            rows, columns = skips[-1].shape[1:3]  # odd sides were rounded up on the way down
            x = x.repeat(2, axis=1)[:, :rows].repeat(2, axis=2)[:, :, :columns]
            x = self.upsample(x)
        return dataclasses.replace(carry, x=x, skips=tuple(skips))


class Levels(nnx.Module):
    """A UNet's way down through the levels, through the middle and up again."""

    def __init__(
        self,
        config: UNetSizes,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of what lies between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        make = _Make(config=config, options=options)
        levels, first = config.levels, config.block_out_channels[0]
        self.config = config
        self.conv_in = make.conv(config.in_channels, first, 3, role="embed")
        self.time_in = Embedder(first, config.time_channels, linear=make.linear)
        self.down_blocks, skips = _down_blocks(levels, make)
        self.mid_blocks = nnx.List([MidBlock(config.middle_level, make)])
        self.up_blocks = _up_blocks(levels, skips, make)
        self.conv_norm_out = make.norm(first)
        self.conv_out = make.conv(first, config.out_channels, 3, role="head")

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""
        lists = ("down_blocks", "mid_blocks", "up_blocks")
        return [(f"{x}.{i}", block) for x in lists for i, block in enumerate(getattr(self, x))]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a block makes of an image."""
        run: Any = block
        return run(carry)

    def finish(self, carry: Carry) -> jax.Array:
        """Return the noise, [b, out_channels, height, width], from what the blocks made."""
        y = self.conv_out(nnx.silu(self.conv_norm_out(carry.x)))
        return y.transpose(0, 3, 1, 2)

    def through(self, carry: Carry) -> jax.Array:
        """Return the noise from what goes into the first block."""
        for _, block in self.blocks():
            carry = self.advance(block, carry)
        return self.finish(carry)

    def into(self, sample: jax.Array, time: jax.Array, text: jax.Array | None) -> Carry:
        """Return what goes into the first block; ValueError if the latents have another shape."""
        channels, shape = self.config.in_channels, sample.shape
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(
                f"sample has shape {list(shape)}; it must be [b, {channels}, height, width]"
            )
        x = self.conv_in(sample.transpose(0, 2, 3, 1))
        return Carry(x=x, skips=(x,), time=nnx.silu(time), text=text)

    def embed(self, sample: jax.Array, timestep: jax.Array) -> jax.Array:
        """Return the embedded time, [b, d]."""
        timestep = jnp.broadcast_to(timestep, sample.shape[:1])
        return self.time_in(sinusoidal_embedding(timestep, self.config.block_out_channels[0]))


def _down_blocks(levels: tuple[Level, ...], make: _Make) -> tuple[nnx.List, list[int]]:
    """Return the blocks of the way down, and the channels of what they keep."""
    inputs, blocks, skips = levels[0].width, [], [levels[0].width]
    for level in levels:
        last = level is levels[-1]
        blocks.append(DownBlock(inputs, level, make, last=last))
        skips += [level.width] * (make.config.layers_per_block + (not last))
        inputs = level.width
    return nnx.List(blocks), skips


def _up_blocks(levels: tuple[Level, ...], skips: list[int], make: _Make) -> nnx.List:
    """Return the blocks of the way up, which read what has been kept from its end."""
    inputs, blocks, number = levels[-1].width, [], make.config.layers_per_block + 1
    for level in reversed(levels):
        read, skips = skips[: -number - 1 : -1], skips[:-number]
        blocks.append(UpBlock(inputs, read, level, make, last=level is levels[0]))
        inputs = level.width
    return nnx.List(blocks)


class UNetCondition(Levels):
    """Predicts the noise in latents of a described image, or what its scheduler says instead."""

    config: UNetConditionConfig

    def __init__(self, config: UNetConditionConfig, **options: Any):
        super().__init__(config, **options)
        linear, inputs = partial(Linear, **options), config.projection_class_embeddings_input_dim
        add = partial(Embedder, inputs, config.time_channels, linear=linear)
        self.add_in = add() if config.addition_embed_type else None

    def __call__(
        self,
        sample: jax.Array,  # [b, in_channels, height, width]: noisy latents
        timestep: jax.Array,  # [b] or [], 0 (data) to 999 (noise)
        encoder_hidden_states: jax.Array,  # [b, s, cross_attention_dim]
        # "text_embeds" [b, pooled_channels] and "time_ids" [b, 6], pixels, for SDXL's
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Return the noise, [b, out_channels, height, width].

        Raises:
          ValueError: the latents have another shape, or what is added is missing or not read.
        """
        return self.through(
            self.start(
                sample=sample,
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
            )
        )

    def start(
        self,
        *,
        sample: jax.Array,
        timestep: jax.Array,
        encoder_hidden_states: jax.Array,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> Carry:
        """Return what goes into the first block; arguments as the call's."""
        self._check_added(added_cond_kwargs)
        time = self.embed(sample, timestep)
        if added_cond_kwargs and self.add_in is not None:
            text, sizes = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            channels = self.config.addition_time_embed_dim
            embedded = sinusoidal_embedding(sizes.reshape(-1), channels).reshape(len(sizes), -1)
            time = time + self.add_in(jnp.concatenate([text, embedded], axis=-1))
        return self.into(sample, time, encoder_hidden_states.astype(time.dtype))

    def _check_added(self, given: Mapping[str, jax.Array] | None) -> None:
        wanted = {"text_embeds": self.config.pooled_channels, "time_ids": SIZES}
        wanted = wanted if self.add_in is not None else {}
        shapes = {name: x.shape[1:] for name, x in (given or {}).items()}
        if shapes != {name: (size,) for name, size in wanted.items()}:
            listed = ", ".join(f"{name} [b, {size}]" for name, size in wanted.items()) or "nothing"
            raise ValueError(
                f"added_cond_kwargs has shapes {shapes} of an image each; this model takes {listed}"
            )
