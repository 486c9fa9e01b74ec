"""PixArt-Sigma (arXiv 2403.04692): a DiT on patches of latents that looks at text in each block.

The call follows diffusers' PixArtTransformer2DModel; projections that share an input are one
linear. One linear makes the modulation of all blocks from time, and each adds a table of its own.
Shapes: b batch, t image tokens, c hidden_size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Mixture, dot_product_attention, fused_mixture, split_heads
from models.conditioning import TIME_CHANNELS, Embedder, Modulation, sinusoidal_embedding
from models.linear import Linear, modulation
from models.mlp import MLP
from models.patches import PatchEmbed, add_positions, unpatch
from models.pixart.config import PixArtConfig

_MLP_RATIO = 4


class TextEmbedder(nnx.Module):
    """Two linears with GELU between them that bring text tokens to the model's width."""

    def __init__(self, config: PixArtConfig, *, linear):
        self.in_layer = linear(config.caption_channels, config.hidden_size, role="embed")
        self.out_layer = linear(config.hidden_size, config.hidden_size, role="embed")

    def __call__(self, text: jax.Array) -> jax.Array:
        """[b, text tokens, caption_channels] to [b, text tokens, c]."""
        return self.out_layer(self.in_layer(text, activation="gelu"))


class CrossAttention(nnx.Module):
    """Attention of image tokens to text tokens, with its projections."""

    def __init__(self, hidden: int, heads: int, *, linear):
        self.heads = heads
        self.q = linear(hidden, hidden, role="attention_in")
        self.kv = linear(hidden, 2 * hidden, role="attention_in")
        self.proj = linear(hidden, hidden, role="attention_out")
        self.mixtures = (
            Mixture(
                values=(("kv", hidden),),
                rows=hidden,
                outputs=("proj",),
                columns=hidden,
                head_dim=hidden // heads,
            ),
        )

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]
        text: jax.Array,  # [b, text tokens, c]
        mask: jax.Array | None,  # bool [b, text tokens]
    ) -> jax.Array:
        """Return x plus what it finds in the text, [b, t, c]."""
        (query,) = split_heads(self.q(x), self.heads)
        key, value = split_heads(self.kv(text), self.heads, 2)
        mask = None if mask is None else mask[:, None, None, :]
        found = dot_product_attention(query, key, value, mask=mask)
        return self.proj(found.reshape(x.shape), residual=x)


class Block(nnx.Module):
    """Self-attention, attention to text, then an MLP; the first and last modulated and gated."""

    def __init__(self, config: PixArtConfig, *, linear, table):
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.heads = heads
        self.epsilon = config.norm_eps
        self.table = table(6)
        self.qkv = linear(hidden, 3 * hidden, role="attention_in")
        self.proj = linear(hidden, hidden, role="attention_out")
        self.mixtures = (fused_mixture((("qkv", "proj"),), hidden, hidden // heads),)
        self.cross = CrossAttention(hidden, heads, linear=linear)
        self.mlp = MLP(hidden, _MLP_RATIO * hidden, linear=linear)

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]
        text: jax.Array,  # [b, text tokens, c]
        mods: jax.Array,  # [b, 6, c]
        mask: jax.Array | None,  # bool [b, text tokens]
    ) -> jax.Array:
        """Return the tokens after this block, [b, t, c]."""
        mods = jnp.split(mods + self.table.get_value().astype(mods.dtype), 6, axis=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mods
        qkv = self.qkv(x, norm=modulation(shift, scale, self.epsilon))
        attended = dot_product_attention(*split_heads(qkv, self.heads, 3))
        x = self.proj(attended.reshape(x.shape), gate=gate, residual=x)
        x = self.cross(x, text, mask)
        return self.mlp(x, modulation(mlp_shift, mlp_scale, self.epsilon), mlp_gate, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    x: jax.Array  # [b, t, c]
    text: jax.Array  # [b, text tokens, c]
    vec: jax.Array  # [b, c]: time
    mods: jax.Array  # [b, 6, c]: modulation of all blocks, before their tables
    mask: jax.Array | None  # bool [b, text tokens]: False for tokens that don't count
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})  # rows, columns of tokens


class PixArtTransformer(nnx.Module):
    """Predicts the noise in latents of a described image, and perhaps the variance of a step."""

    starts = ("modulation.lin",)  # linears before the blocks, besides embedders

    def __init__(
        self,
        config: PixArtConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of the tokens between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        linear, hidden = partial(Linear, **options), config.hidden_size

        def table(rows: int) -> nnx.Param:
            normal = jax.random.normal(rngs.params(), (rows, hidden), jnp.float32)
            return nnx.Param((normal / hidden**0.5).astype(param_dtype))

        self.config = config
        self.patches = PatchEmbed(config.in_channels, hidden, config.patch_size, **options)
        self.time_in = Embedder(TIME_CHANNELS, hidden, linear=linear)
        self.text_in = TextEmbedder(config, linear=linear)
        self.modulation = Modulation(hidden, 6, linear=linear)
        self.layers = nnx.List(
            Block(config, linear=linear, table=table) for _ in range(config.num_layers)
        )
        self.scale_shift_table = table(2)  # shift, then scale, before the last linear
        self.linear = linear(hidden, config.token_channels, role="head")

    def __call__(
        self,
        hidden_states: jax.Array,  # [b, in_channels, height, width]: noisy latents
        encoder_hidden_states: jax.Array,  # [b, text tokens, caption_channels]
        timestep: jax.Array,  # [b], 0 (data) to 999 (noise)
        encoder_attention_mask: jax.Array | None = None,  # [b, text tokens], 0 for padding
    ) -> jax.Array:
        """Return the noise, [b, out_channels, height, width].

        Raises:
          ValueError: the latents have another shape.
        """
        carry = self.start(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=encoder_attention_mask,
        )
        for _, block in self.blocks():
            carry = self.advance(block, carry)
        return self.finish(carry)

    def start(
        self,
        *,
        hidden_states: jax.Array,
        encoder_hidden_states: jax.Array,
        timestep: jax.Array,
        encoder_attention_mask: jax.Array | None = None,
    ) -> Carry:
        """Return what goes into the first block; arguments as the call's."""
        tokens, config = self.patches(hidden_states), self.config
        vec = self.time_in(sinusoidal_embedding(timestep))
        mask = encoder_attention_mask
        return Carry(
            x=add_positions(tokens, config.sample_size // config.patch_size, config.position_scale),
            text=self.text_in(encoder_hidden_states),
            vec=vec,
            mods=jnp.concatenate(self.modulation(vec), axis=1),
            mask=None if mask is None else mask.astype(bool),
            grid=tokens.shape[1:3],
        )

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""
        return [(f"layers.{i}", block) for i, block in enumerate(self.layers)]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a block makes of the tokens."""
        x = block(carry.x, carry.text, carry.mods, carry.mask)
        return dataclasses.replace(carry, x=x)

    def finish(self, carry: Carry) -> jax.Array:
        """Return the noise, [b, out_channels, height, width], from what the blocks made."""
        table = self.scale_shift_table.get_value().astype(carry.vec.dtype)
        shift, scale = jnp.split(table + carry.vec[:, None], 2, axis=1)
        y = self.linear(carry.x, norm=modulation(shift, scale))
        return unpatch(y, carry.grid, self.config.patch_size)
