"""The transformer of SD3 and SD3.5 (MMDiT, arXiv 2403.03206): two streams and one attention.

The call follows diffusers' SD3Transformer2DModel; projections that share an input are one linear.
Shapes: b batch, t image tokens, s text tokens, h heads, d channels of a head, c hidden_size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import (
    JointAttention,
    SelfAttention,
    Stream,
    apart,
    dot_product_attention,
    fused_mixture,
    split_heads,
)
from models.conditioning import (
    TIME_CHANNELS,
    Embedder,
    FinalLayer,
    Modulation,
    sinusoidal_embedding,
)
from models.linear import EPSILON, Linear, modulation
from models.mlp import MLP
from models.patches import PatchEmbed, unpatch
from models.sd3.config import SD3Config

_MLP_RATIO = 4


class Positions(nnx.Module):
    """A square of positions, of which a grid of tokens takes the middle."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.side = config.pos_embed_max_size
        shape = (1, self.side**2, config.hidden_size)
        normal = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.table = nnx.Param((0.02 * normal).astype(param_dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [b, rows, columns, c] to [b, t, c], their positions added.

        Raises:
          ValueError: there are more rows or columns than positions.
        """
        batch, rows, columns, channels = tokens.shape
        if max(rows, columns) > self.side:
            raise ValueError(
                f"hidden_states has {rows} rows and {columns} columns of tokens; this model has "
                f"positions for {self.side} at most"
            )
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.table.get_value().reshape(self.side, self.side, channels)
        middle = table[top : top + rows, left : left + columns].astype(jnp.float32)
        placed = tokens.astype(jnp.float32) + middle
        return placed.astype(tokens.dtype).reshape(batch, rows * columns, channels)


class PlainAttention(nnx.Module):
    """Attention over the tokens of all streams, without norms or positions; holds no weights."""

    def __init__(self, heads: int):
        self.heads = heads

    def __call__(self, *streams: Stream, rope: jax.Array) -> tuple[jax.Array, ...]:
        """Return [b, t, h d] of each stream's t tokens; `rope` turns nothing and isn't read."""
        qkv = jnp.concatenate([stream.qkv for stream in streams], axis=1)
        out = dot_product_attention(*split_heads(qkv, self.heads, 3))
        return apart(out.reshape(*out.shape[:2], -1), streams)


class Block(nnx.Module):
    """Image and text tokens with weights of their own, and one attention over both.

    In some, image tokens attend once more, to themselves alone; behind the last, text is of no use.
    """

    def __init__(self, config: SD3Config, *, dual: bool, last: bool, linear, norm):
        hidden, options = config.hidden_size, {"linear": linear, "norm": norm}
        self.img_mod = Modulation(hidden, 9 if dual else 6, linear=linear)
        self.txt_mod = Modulation(hidden, 2 if last else 6, linear=linear)
        self.img_attn = SelfAttention(config, **options)
        self.txt_attn = SelfAttention(config, last=last, **options)
        self.img_attn2 = SelfAttention(config, **options) if dual else None
        self.img_mlp = MLP(hidden, _MLP_RATIO * hidden, linear=linear)
        self.txt_mlp = None if last else MLP(hidden, _MLP_RATIO * hidden, linear=linear)
        heads, size = config.num_attention_heads, config.attention_head_dim
        self.attention = PlainAttention(heads) if norm is None else JointAttention(heads, size)
        streams = (("img_attn.qkv", "img_attn.proj"),)
        streams += (("txt_attn.qkv", "" if last else "txt_attn.proj"),)
        again = ((("img_attn2.qkv", "img_attn2.proj"),),) if dual else ()
        self.mixtures = tuple(fused_mixture(x, hidden, size) for x in (streams, *again))

    def __call__(
        self,
        img: jax.Array,  # [b, t, c]
        txt: jax.Array,  # [b, s, c]
        vec: jax.Array,  # [b, c]: time and pooled text
        rope: jax.Array,  # float32 [2, s + t, d / 2]: of no rotation
    ) -> tuple[jax.Array, jax.Array]:
        """Return the image and text tokens after this block, shapes as they came."""
        mods = self.img_mod(vec)
        shift, scale, gate, *img_mlp_mod, img_mlp_gate = mods[:6]
        txt_shift, txt_scale, *txt_rest = self.txt_mod(vec)
        txt_qkv = self.txt_attn.project(txt, modulation(txt_shift, txt_scale))
        img_qkv = self.img_attn.project(img, modulation(shift, scale))
        txt_out, img_out = self.attention(txt_qkv, img_qkv, rope=rope)

        placed = self.img_attn.proj(img_out, gate=gate, residual=img)
        if self.img_attn2 is not None:
            placed = self._attend_again(img, placed, mods[6:], rope)
        img = self.img_mlp(placed, modulation(*img_mlp_mod), img_mlp_gate, placed)
        if self.txt_mlp is None:
            return img, txt
        txt_gate, *txt_mlp_mod, txt_mlp_gate = txt_rest
        txt = self.txt_attn.proj(txt_out, gate=txt_gate, residual=txt)
        return img, self.txt_mlp(txt, modulation(*txt_mlp_mod), txt_mlp_gate, txt)

    def _attend_again(self, img, placed, mods, rope) -> jax.Array:
        """Return `placed` and what image tokens, as they came, find in themselves."""
        shift, scale, gate = mods
        qkv = self.img_attn2.project(img, modulation(shift, scale))
        (found,) = self.attention(qkv, rope=rope[:, -img.shape[1] :])
        return self.img_attn2.proj(found, gate=gate, residual=placed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    img: jax.Array  # [b, t, c]
    txt: jax.Array  # [b, s, c]
    vec: jax.Array  # [b, c]: time and pooled text
    rope: jax.Array  # float32 [2, s + t, d / 2]: of no rotation
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})  # rows, columns of tokens


class SD3Transformer(nnx.Module):
    """Predicts the velocity (noise minus data) of latents of a described image."""

    def __init__(
        self,
        config: SD3Config,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of the tokens between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        linear, hidden = partial(Linear, **options), config.hidden_size
        # float32 out of the norms, as attention takes them
        norm = partial(nnx.RMSNorm, epsilon=EPSILON, **options | {"dtype": jnp.float32})
        given = {"linear": linear, "norm": norm if config.qk_norm else None}
        duals, last = config.dual_attention_layers, config.num_layers - 1
        self.config = config
        self.patches = PatchEmbed(config.in_channels, hidden, config.patch_size, **options)
        self.positions = Positions(config, rngs=rngs, param_dtype=param_dtype)
        self.txt_in = linear(config.joint_attention_dim, hidden, role="embed")
        self.time_in = Embedder(TIME_CHANNELS, hidden, linear=linear)
        self.vector_in = Embedder(config.pooled_projection_dim, hidden, linear=linear)
        self.joint_blocks = nnx.List(
            Block(config, dual=i in duals, last=i == last, **given)
            for i in range(config.num_layers)
        )
        self.final_layer = FinalLayer(hidden, config.token_channels, linear=linear)

    def __call__(
        self,
        hidden_states: jax.Array,  # [b, in_channels, height, width]: noisy latents
        encoder_hidden_states: jax.Array,  # [b, s, joint_attention_dim]
        pooled_projections: jax.Array,  # [b, pooled_projection_dim]
        timestep: jax.Array,  # [b], 1000 (noise) to 0 (data)
    ) -> jax.Array:
        """Return the velocity, [b, out_channels, height, width].

        Raises:
          ValueError: the latents have another shape, or more tokens than there are positions.
        """
        carry = self.start(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
        )
        for _, block in self.blocks():
            carry = self.advance(block, carry)
        return self.finish(carry)

    def start(
        self,
        *,
        hidden_states: jax.Array,
        encoder_hidden_states: jax.Array,
        pooled_projections: jax.Array,
        timestep: jax.Array,
    ) -> Carry:
        """Return what goes into the first block; arguments as the call's."""
        tokens, txt = self.patches(hidden_states), self.txt_in(encoder_hidden_states)
        img = self.positions(tokens)
        vec = self.time_in(sinusoidal_embedding(timestep)) + self.vector_in(pooled_projections)
        count = txt.shape[1] + img.shape[1], self.config.attention_head_dim // 2
        rope = jnp.stack([jnp.ones(count, jnp.float32), jnp.zeros(count, jnp.float32)])
        return Carry(img=img, txt=txt, vec=vec, rope=rope, grid=tokens.shape[1:3])

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""
        return [(f"joint_blocks.{i}", block) for i, block in enumerate(self.joint_blocks)]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a block makes of the tokens."""
        img, txt = block(carry.img, carry.txt, carry.vec, carry.rope)
        return dataclasses.replace(carry, img=img, txt=txt)

    def finish(self, carry: Carry) -> jax.Array:
        """Return the velocity, [b, out_channels, height, width], from what the blocks made."""
        y = self.final_layer(carry.img, carry.vec)
        return unpatch(y, carry.grid, self.config.patch_size)
