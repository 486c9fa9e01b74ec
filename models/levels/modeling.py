"""What the UNets of latent diffusion (arXiv 2112.10752) have in common.

Convolutions over single pixels are linears. Images are [b, h, w, c].
Shapes: b batch, h rows, w columns, c channels, s text tokens, d channels of the embedded time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.conditioning import Embedder, sinusoidal_embedding
from models.convolution import Conv
from models.levels.config import Level, UNetSizes
from models.linear import Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    x: jax.Array  # [b, h, w, c]
    skips: tuple[jax.Array, ...]  # of the way down, that the way up has still to read
    time: jax.Array  # [b, d]: embedded time, and what joins it, through SiLU
    text: jax.Array | None  # [b, s, channels]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Make:
    """How the layers of a model are made."""

    config: UNetSizes
    options: Mapping[str, Any]  # rngs, dtype and param_dtype
    attention: Callable[[Level, "Make"], nnx.Module]  # of a level

    def linear(self, *sizes: int, **more: Any) -> Linear:
        """Return a linear."""
        return Linear(*sizes, **more, **self.options)

    def conv(self, *sizes: int, **more: Any) -> Conv:
        """Return a convolution."""
        return Conv(*sizes, **more, **self.options)

    def norm(self, channels: int, epsilon: float | None = None) -> nnx.GroupNorm:
        """Return a norm of groups of channels."""
        return nnx.GroupNorm(
            channels,
            num_groups=self.config.norm_num_groups,
            epsilon=self.config.norm_eps if epsilon is None else epsilon,
            use_fast_variance=False,
            **self.options,
        )


class ResNet(nnx.Module):
    """Two convolutions, time between them, and what came in."""

    def __init__(self, inputs: int, outputs: int, make: Make):
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


class _Block(nnx.Module):
    """Residual blocks, and attention behind each of them or none."""

    def __init__(self, inputs: list[int], level: Level, make: Make):
        self.resnets = nnx.List(ResNet(size, level.width, make) for size in inputs)
        number = 0 if level.heads is None else len(inputs)
        self.attentions = nnx.List(make.attention(level, make) for _ in range(number))

    def _run(self, index: int, x: jax.Array, carry: Carry) -> jax.Array:
        """Return what a residual block, and attention behind it, make of an image."""
        x = self.resnets[index](x, carry.time)
        return self.attentions[index](x, carry.text) if self.attentions else x


class DownBlock(_Block):
    """A level on the way down; what each residual block gives is kept for the way up."""

    def __init__(self, inputs: int, level: Level, make: Make, *, last: bool):
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

    def __init__(self, level: Level, make: Make):
        self.resnets = nnx.List(ResNet(level.width, level.width, make) for _ in range(2))
        self.attentions = nnx.List([make.attention(level, make)])

    def __call__(self, carry: Carry) -> Carry:
        """Return what comes after it."""
        x = self.attentions[0](self.resnets[0](carry.x, carry.time), carry.text)
        return dataclasses.replace(carry, x=self.resnets[1](x, carry.time))


class UpBlock(_Block):
    """A level on the way up; each residual block reads one of the way down beside its input."""

    def __init__(self, inputs: int, skips: list[int], level: Level, make: Make, *, last: bool):
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

    @staticmethod
    def attention(level: Level, make: Make) -> nnx.Module:
        """Return what attends behind a residual block: of an image and a text to an image."""
        raise NotImplementedError

    def __init__(
        self,
        config: UNetSizes,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of what lies between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        make = Make(config=config, options=options, attention=self.attention)
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


def _down_blocks(levels: tuple[Level, ...], make: Make) -> tuple[nnx.List, list[int]]:
    """Return the blocks of the way down, and the channels of what they keep."""
    inputs, blocks, skips = levels[0].width, [], [levels[0].width]
    for level in levels:
        last = level is levels[-1]
        blocks.append(DownBlock(inputs, level, make, last=last))
        skips += [level.width] * (make.config.layers_per_block + (not last))
        inputs = level.width
    return nnx.List(blocks), skips


def _up_blocks(levels: tuple[Level, ...], skips: list[int], make: Make) -> nnx.List:
    """Return the blocks of the way up, which read what has been kept from its end."""
    inputs, blocks, number = levels[-1].width, [], make.config.layers_per_block + 1
    for level in reversed(levels):
        read, skips = skips[: -number - 1 : -1], skips[:-number]
        blocks.append(UpBlock(inputs, read, level, make, last=level is levels[0]))
        inputs = level.width
    return nnx.List(blocks)
