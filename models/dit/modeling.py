"""DiT (Peebles and Xie 2023, arXiv 2212.09748): a transformer on patches of latents, for classes.

The call follows diffusers' DiTTransformer2DModel, which embeds time and class anew in each block;
projections that share an input are one linear. Shapes: b batch, t tokens, c hidden_size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import dot_product_attention, fused_mixture, split_heads
from models.conditioning import (
    TIME_CHANNELS,
    Embedder,
    FinalLayer,
    Modulation,
    sinusoidal_embedding,
)
from models.dit.config import DiTConfig
from models.linear import Linear, modulation
from models.mlp import MLP
from models.patches import PatchEmbed, add_positions, unpatch

_MLP_RATIO = 4


class Condition(nnx.Module):
    """Time and class as one vector."""

    def __init__(self, config: DiTConfig, *, linear, embed):
        self.time = Embedder(TIME_CHANNELS, config.hidden_size, linear=linear)
        # one more for no class
        self.label = embed(config.num_embeds_ada_norm + 1, config.hidden_size)

    def __call__(self, time: jax.Array, labels: jax.Array) -> jax.Array:
        """Sinusoids [b, 256] and classes [b] to [b, c]."""
        return self.time(time) + self.label(labels)


class Block(nnx.Module):
    """Self-attention, then an MLP, both modulated and gated."""

    def __init__(self, config: DiTConfig, *, linear, embed):
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.epsilon = config.norm_eps
        self.condition = Condition(config, linear=linear, embed=embed)
        self.modulation = Modulation(hidden, 6, linear=linear)
        self.qkv = linear(hidden, 3 * hidden, role="attention_in")
        self.proj = linear(hidden, hidden, role="attention_out")
        self.mixtures = (fused_mixture((("qkv", "proj"),), hidden, hidden // self.heads),)
        self.mlp = MLP(hidden, _MLP_RATIO * hidden, linear=linear)

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]
        time: jax.Array,  # [b, 256]: sinusoids
        labels: jax.Array,  # int [b]
    ) -> jax.Array:
        """Return the tokens after this block, [b, t, c]."""
        mods = self.modulation(self.condition(time, labels))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mods
        qkv = self.qkv(x, norm=modulation(shift, scale))
        attended = dot_product_attention(*split_heads(qkv, self.heads, 3))
        x = self.proj(attended.reshape(x.shape), gate=gate, residual=x)
        return self.mlp(x, modulation(mlp_shift, mlp_scale, self.epsilon), mlp_gate, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    x: jax.Array  # [b, t, c]
    time: jax.Array  # [b, 256]: sinusoids
    labels: jax.Array  # int [b]
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})  # rows, columns of tokens


class DiT(nnx.Module):
    """Predicts the noise in latents of a class of images, and perhaps the variance of a step."""

    def __init__(
        self,
        config: DiTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of the tokens between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        linear, embed = partial(Linear, **options), partial(nnx.Embed, **options)
        hidden = config.hidden_size
        self.config = config
        self.patches = PatchEmbed(config.in_channels, hidden, config.patch_size, **options)
        self.final_layer = FinalLayer(hidden, config.token_channels, linear=linear)
        self.layers = nnx.List(
            Block(config, linear=linear, embed=embed) for _ in range(config.num_layers)
        )

    def __call__(
        self,
        hidden_states: jax.Array,  # [b, in_channels, height, width]: noisy latents
        timestep: jax.Array,  # [b], 0 (data) to 999 (noise)
        class_labels: jax.Array,  # int [b]; the number of classes stands for none
    ) -> jax.Array:
        """Return the noise, [b, out_channels, height, width].

        Raises:
          ValueError: the latents have another shape.
        """
        carry = self.start(
            hidden_states=hidden_states, timestep=timestep, class_labels=class_labels
        )
        for _, block in self.blocks():
            carry = self.advance(block, carry)
        return self.finish(carry)

    def start(
        self, *, hidden_states: jax.Array, timestep: jax.Array, class_labels: jax.Array
    ) -> Carry:
        """Return what goes into the first block; arguments as the call's."""
        tokens = self.patches(hidden_states)
        base = self.config.sample_size // self.config.patch_size
        return Carry(
            x=add_positions(tokens, base),
            time=sinusoidal_embedding(timestep, last=1),
            labels=class_labels,
            grid=tokens.shape[1:3],
        )

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""
        return [(f"layers.{i}", block) for i, block in enumerate(self.layers)]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a block makes of the tokens."""
        return dataclasses.replace(carry, x=block(carry.x, carry.time, carry.labels))

    def finish(self, carry: Carry) -> jax.Array:
        """Return the noise, [b, out_channels, height, width], from what the blocks made."""
        vec = self.layers[0].condition(carry.time, carry.labels)
        return unpatch(self.final_layer(carry.x, vec), carry.grid, self.config.patch_size)
