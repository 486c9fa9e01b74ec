"""The FLUX.1 transformer: double-stream blocks, then single-stream blocks, over packed latents.

Module names and fused projections follow Black Forest Labs' reference (`src/flux/model.py` of
github.com/black-forest-labs/flux); the call follows diffusers' FluxTransformer2DModel.
Shapes: b batch, t tokens (text first, then image), h heads, d head_dim, c hidden_size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import JointAttention, SelfAttention, Stream, fused_mixture
from models.conditioning import (
    TIME_CHANNELS,
    Embedder,
    FinalLayer,
    Modulation,
    sinusoidal_embedding,
)
from models.flux.config import FluxConfig
from models.linear import Linear, Part, modulation
from models.mlp import MLP
from models.rope import rope_table

_EPSILON = 1e-6  # of every norm
_MLP_RATIO = 4


class DoubleStreamBlock(nnx.Module):
    """Image and text tokens with weights of their own, and one attention over both."""

    def __init__(self, config: FluxConfig, *, linear, norm):
        hidden = config.hidden_size
        self.img_mod = Modulation(hidden, 6, linear=linear)
        self.txt_mod = Modulation(hidden, 6, linear=linear)
        self.img_attn = SelfAttention(config, linear=linear, norm=norm)
        self.txt_attn = SelfAttention(config, linear=linear, norm=norm)
        self.img_mlp = MLP(hidden, _MLP_RATIO * hidden, linear=linear)
        self.txt_mlp = MLP(hidden, _MLP_RATIO * hidden, linear=linear)
        self.attention = JointAttention(config.num_attention_heads, config.attention_head_dim)
        streams = (("img_attn.qkv", "img_attn.proj"), ("txt_attn.qkv", "txt_attn.proj"))
        self.mixtures = (fused_mixture(streams, hidden, config.attention_head_dim),)

    def __call__(
        self,
        img: jax.Array,  # [b, image tokens, c]
        txt: jax.Array,  # [b, text tokens, c]
        vec: jax.Array,  # [b, c]: time, guidance and pooled text
        rope: jax.Array,  # float32 [2, t, d / 2]
    ) -> tuple[jax.Array, jax.Array]:
        """Return the image and text tokens after this block, shapes as they came."""
        shift, scale, gate, *img_mlp_mod, img_mlp_gate = self.img_mod(vec)
        txt_shift, txt_scale, txt_gate, *txt_mlp_mod, txt_mlp_gate = self.txt_mod(vec)

        img_qkv = self.img_attn.project(img, modulation(shift, scale))
        txt_qkv = self.txt_attn.project(txt, modulation(txt_shift, txt_scale))
        txt_out, img_out = self.attention(txt_qkv, img_qkv, rope=rope)

        img = self.img_attn.proj(img_out, gate=gate, residual=img)
        txt = self.txt_attn.proj(txt_out, gate=txt_gate, residual=txt)
        img = self.img_mlp(img, modulation(*img_mlp_mod), img_mlp_gate, img)
        return img, self.txt_mlp(txt, modulation(*txt_mlp_mod), txt_mlp_gate, txt)


class SingleStreamBlock(nnx.Module):
    """Attention and MLP side by side on the joined tokens, between two fused linears."""

    def __init__(self, config: FluxConfig, *, linear, norm):
        hidden = config.hidden_size
        self.modulation = Modulation(hidden, 3, linear=linear)
        # q, k, v, mlp
        self.linear1 = linear(hidden, (3 + _MLP_RATIO) * hidden, role="mixed_in")
        # of attention, mlp
        self.linear2 = linear((1 + _MLP_RATIO) * hidden, hidden, role="mixed_out")
        self.query_norm = norm(config.attention_head_dim)
        self.key_norm = norm(config.attention_head_dim)
        self.attention = JointAttention(config.num_attention_heads, config.attention_head_dim)
        stream = (("linear1", "linear2"),)
        self.mixtures = (fused_mixture(stream, hidden, config.attention_head_dim),)

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]: text and image tokens
        vec: jax.Array,  # [b, c]: time, guidance and pooled text
        rope: jax.Array,  # float32 [2, t, d / 2]
    ) -> jax.Array:
        """Return the tokens after this block, [b, t, c]."""
        shift, scale, gate = self.modulation(vec)
        wide = self.linear1(x, norm=modulation(shift, scale))
        hidden, mlp = x.shape[-1], _MLP_RATIO * x.shape[-1]
        stream = Stream(qkv=wide, query_norm=self.query_norm, key_norm=self.key_norm)
        (attended,) = self.attention(stream, rope=rope)
        joined = (
            Part(array=attended, size=hidden),
            Part(array=wide, start=3 * hidden, size=mlp, activation="gelu"),
        )
        return self.linear2(joined, gate=gate, residual=x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    img: jax.Array  # [b, image tokens, c]; all tokens, text first, behind the first single block
    txt: jax.Array | None  # [b, text tokens, c]; None behind the first single block
    vec: jax.Array  # [b, c]: time, guidance and pooled text
    rope: jax.Array  # float32 [2, t, d / 2]
    text_tokens: int = dataclasses.field(metadata={"static": True})


class FluxTransformer(nnx.Module):
    """Predicts the velocity (noise minus data) of packed latent tokens."""

    def __init__(
        self,
        config: FluxConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of the tokens between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        linear = partial(Linear, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        # float32 out of the norms: the rotation that follows wants it anyway
        norm = partial(
            nnx.RMSNorm, epsilon=_EPSILON, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )
        hidden = config.hidden_size
        self.config = config
        self.img_in = linear(config.in_channels, hidden, role="embed")
        self.txt_in = linear(config.joint_attention_dim, hidden, role="embed")
        self.time_in = Embedder(TIME_CHANNELS, hidden, linear=linear)
        self.vector_in = Embedder(config.pooled_projection_dim, hidden, linear=linear)
        if config.guidance_embeds:
            self.guidance_in = Embedder(TIME_CHANNELS, hidden, linear=linear)
        self.double_blocks = nnx.List(
            DoubleStreamBlock(config, linear=linear, norm=norm) for _ in range(config.num_layers)
        )
        self.single_blocks = nnx.List(
            SingleStreamBlock(config, linear=linear, norm=norm)
            for _ in range(config.num_single_layers)
        )
        self.final_layer = FinalLayer(hidden, config.token_channels, linear=linear)

    def __call__(
        self,
        hidden_states: jax.Array,  # [b, image tokens, in_channels]: packed noisy latents
        encoder_hidden_states: jax.Array,  # [b, text tokens, joint_attention_dim]
        pooled_projections: jax.Array,  # [b, pooled_projection_dim]
        timestep: jax.Array,  # [b], 1 (noise) to 0 (data)
        img_ids: jax.Array,  # [image tokens, axes]
        txt_ids: jax.Array,  # [text tokens, axes]
        guidance: jax.Array | None = None,  # [b], the distilled guidance scale, such as 3.5
    ) -> jax.Array:
        """Return the velocity, [b, image tokens, token_channels].

        Raises:
          ValueError: guidance is given to a model without guidance embedding, or missing.
        """
        inputs = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": guidance,
        }
        carry = self.start(**inputs)
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
        img_ids: jax.Array,
        txt_ids: jax.Array,
        guidance: jax.Array | None = None,
    ) -> Carry:
        """Return what goes into the first block; arguments as the call's."""
        if (guidance is not None) != self.config.guidance_embeds:
            wanted = "needs guidance" if self.config.guidance_embeds else "takes no guidance"
            raise ValueError(f"guidance is {guidance}, but this model {wanted}")
        vec = self.time_in(sinusoidal_embedding(1000 * timestep.astype(jnp.float32)))
        vec = vec + self.vector_in(pooled_projections)
        if guidance is not None:
            vec = vec + self.guidance_in(sinusoidal_embedding(1000 * guidance.astype(jnp.float32)))

        img, txt = self.img_in(hidden_states), self.txt_in(encoder_hidden_states)
        rope = rope_table(jnp.concatenate([txt_ids, img_ids]), self.config.axes_dims_rope)
        return Carry(img=img, txt=txt, vec=vec, rope=rope, text_tokens=txt.shape[1])

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""
        lists = ("double_blocks", "single_blocks")
        return [(f"{name}.{i}", b) for name in lists for i, b in enumerate(getattr(self, name))]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a block makes of the tokens."""
        if isinstance(block, DoubleStreamBlock):
            img, txt = block(carry.img, carry.txt, carry.vec, carry.rope)
            return dataclasses.replace(carry, img=img, txt=txt)
        x = carry.img if carry.txt is None else jnp.concatenate([carry.txt, carry.img], axis=1)
        return dataclasses.replace(carry, img=block(x, carry.vec, carry.rope), txt=None)

    def finish(self, carry: Carry) -> jax.Array:
        """Return the velocity, [b, image tokens, token_channels], from what the blocks made."""
        x = carry.img if carry.txt is not None else carry.img[:, carry.text_tokens :]
        return self.final_layer(x, carry.vec)
