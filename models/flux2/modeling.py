"""The FLUX.2 transformer: double-stream blocks, then single-stream blocks, over packed latents.

Module names and fused projections follow Black Forest Labs' reference (`src/flux2/model.py` of
github.com/black-forest-labs/flux2); the call follows diffusers' Flux2Transformer2DModel. What
differs from FLUX.1: one modulation for all blocks of a kind, gated MLPs, no biases, no pooled text.
Shapes: b batch, t tokens (text first, then image), h heads, d head_dim, c hidden_size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import JointAttention, SelfAttention, Stream, fused_mixture
from models.conditioning import Embedder, FinalLayer, Modulation, sinusoidal_embedding
from models.flux2.config import Flux2Config
from models.linear import Linear, Part, modulation, swiglu
from models.mlp import MLP
from models.rope import rope_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Modulations:
    """Shifts, scales and gates of all blocks, each [b, 1, c]; they depend on time alone."""

    img: list[jax.Array]  # six of double-stream blocks' image tokens: attention's, then the MLP's
    txt: list[jax.Array]  # six of their text tokens
    single: list[jax.Array]  # three of single-stream blocks


class DoubleStreamBlock(nnx.Module):
    """Image and text tokens with weights of their own, and one attention over both."""

    def __init__(self, config: Flux2Config, *, linear, norm):
        hidden = config.hidden_size
        self.epsilon = config.eps
        self.img_attn = SelfAttention(config, linear=linear, norm=norm)
        self.txt_attn = SelfAttention(config, linear=linear, norm=norm)
        self.img_mlp = MLP(hidden, config.mlp_size, gated=True, linear=linear)
        self.txt_mlp = MLP(hidden, config.mlp_size, gated=True, linear=linear)
        self.attention = JointAttention(config.num_attention_heads, config.attention_head_dim)
        streams = (("img_attn.qkv", "img_attn.proj"), ("txt_attn.qkv", "txt_attn.proj"))
        self.mixtures = (fused_mixture(streams, hidden, config.attention_head_dim),)

    def __call__(
        self,
        img: jax.Array,  # [b, image tokens, c]
        txt: jax.Array,  # [b, text tokens, c]
        img_mod: list[jax.Array],  # six [b, 1, c]
        txt_mod: list[jax.Array],  # six [b, 1, c]
        rope: jax.Array,  # float32 [2, t, d / 2]
    ) -> tuple[jax.Array, jax.Array]:
        """Return the image and text tokens after this block, shapes as they came."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = img_mod
        txt_shift, txt_scale, txt_gate, txt_mlp_shift, txt_mlp_scale, txt_mlp_gate = txt_mod

        img_qkv = self.img_attn.project(img, modulation(shift, scale, self.epsilon))
        txt_qkv = self.txt_attn.project(txt, modulation(txt_shift, txt_scale, self.epsilon))
        txt_out, img_out = self.attention(txt_qkv, img_qkv, rope=rope)

        img = self.img_attn.proj(img_out, gate=gate, residual=img)
        txt = self.txt_attn.proj(txt_out, gate=txt_gate, residual=txt)
        img_norm = modulation(mlp_shift, mlp_scale, self.epsilon)
        txt_norm = modulation(txt_mlp_shift, txt_mlp_scale, self.epsilon)
        img = self.img_mlp(img, img_norm, mlp_gate, img)
        return img, self.txt_mlp(txt, txt_norm, txt_mlp_gate, txt)


class SingleStreamBlock(nnx.Module):
    """Attention and gated MLP side by side on the joined tokens, between two fused linears."""

    def __init__(self, config: Flux2Config, *, linear, norm):
        hidden, inner = config.hidden_size, config.mlp_size
        self.epsilon = config.eps
        # q, k, v, then what silu takes, then what that multiplies
        self.linear1 = linear(hidden, 3 * hidden + 2 * inner, role="mixed_in")
        # of attention, mlp
        self.linear2 = linear(hidden + inner, hidden, role="mixed_out")
        self.query_norm = norm(config.attention_head_dim)
        self.key_norm = norm(config.attention_head_dim)
        self.attention = JointAttention(config.num_attention_heads, config.attention_head_dim)
        stream = (("linear1", "linear2"),)
        self.mixtures = (fused_mixture(stream, hidden, config.attention_head_dim),)

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]: text and image tokens
        mod: list[jax.Array],  # shift, scale and gate, [b, 1, c]
        rope: jax.Array,  # float32 [2, t, d / 2]
    ) -> jax.Array:
        """Return the tokens after this block, [b, t, c]."""
        shift, scale, gate = mod
        wide = self.linear1(x, norm=modulation(shift, scale, self.epsilon))
        hidden = x.shape[-1]
        stream = Stream(qkv=wide, query_norm=self.query_norm, key_norm=self.key_norm)
        (attended,) = self.attention(stream, rope=rope)
        attended = Part(array=attended, size=hidden)
        return self.linear2((attended, swiglu(wide, 3 * hidden)), gate=gate, residual=x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    img: jax.Array  # [b, image tokens, c]; all tokens, text first, behind the first single block
    txt: jax.Array | None  # [b, text tokens, c]; None behind the first single block
    vec: jax.Array  # [b, c]: time and guidance
    mods: Modulations
    rope: jax.Array  # float32 [2, t, d / 2]
    text_tokens: int = dataclasses.field(metadata={"static": True})


class Flux2Transformer(nnx.Module):
    """Predicts the velocity (noise minus data) of packed latent tokens."""

    # linears before the blocks, besides embedders
    starts = (
        "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.lin",
        "single_stream_modulation.lin",
    )

    def __init__(
        self,
        config: Flux2Config,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of the tokens between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        linear = partial(Linear, use_bias=False, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        # float32 out of the norms: the rotation that follows wants it anyway
        norm = partial(
            nnx.RMSNorm, epsilon=config.eps, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )
        hidden, channels = config.hidden_size, config.timestep_guidance_channels
        self.config = config
        self.img_in = linear(config.in_channels, hidden, role="embed")
        self.txt_in = linear(config.joint_attention_dim, hidden, role="embed")
        self.time_in = Embedder(channels, hidden, linear=linear)
        if config.guidance_embeds:
            self.guidance_in = Embedder(channels, hidden, linear=linear)
        self.double_stream_modulation_img = Modulation(hidden, 6, linear=linear)
        self.double_stream_modulation_txt = Modulation(hidden, 6, linear=linear)
        self.single_stream_modulation = Modulation(hidden, 3, linear=linear)
        self.double_blocks = nnx.List(
            DoubleStreamBlock(config, linear=linear, norm=norm) for _ in range(config.num_layers)
        )
        self.single_blocks = nnx.List(
            SingleStreamBlock(config, linear=linear, norm=norm)
            for _ in range(config.num_single_layers)
        )
        self.final_layer = FinalLayer(hidden, config.token_channels, config.eps, linear=linear)

    def __call__(
        self,
        hidden_states: jax.Array,  # [b, image tokens, in_channels]: noisy latents, then references
        encoder_hidden_states: jax.Array,  # [b, text tokens, joint_attention_dim]
        timestep: jax.Array,  # [b], 1 (noise) to 0 (data)
        img_ids: jax.Array,  # [image tokens, axes], or [b, ...] of which the first is taken
        txt_ids: jax.Array,  # [text tokens, axes], or [b, ...] likewise
        guidance: jax.Array | None = None,  # [b], the distilled guidance scale, such as 4
    ) -> jax.Array:
        """Return the velocity, [b, image tokens, token_channels]; of references it means nothing.

        Raises:
          ValueError: guidance is missing where the model has a guidance embedding, or given to one
            without.
        """
        carry = self.start(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
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
        img_ids: jax.Array,
        txt_ids: jax.Array,
        guidance: jax.Array | None = None,
    ) -> Carry:
        """Return what goes into the first block; arguments as the call's."""
        vec = self._condition(timestep, guidance)
        mods = Modulations(
            img=self.double_stream_modulation_img(vec),
            txt=self.double_stream_modulation_txt(vec),
            single=self.single_stream_modulation(vec),
        )
        img, txt = self.img_in(hidden_states), self.txt_in(encoder_hidden_states)
        img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
        ids = jnp.concatenate([txt_ids, img_ids])
        rope = rope_table(ids, self.config.axes_dims_rope, self.config.rope_theta)
        return Carry(img=img, txt=txt, vec=vec, mods=mods, rope=rope, text_tokens=txt.shape[1])

    def _condition(self, timestep: jax.Array, guidance: jax.Array | None) -> jax.Array:
        """Return the condition vector [b, c]."""
        if (guidance is not None) != self.config.guidance_embeds:
            wanted = "needs guidance" if self.config.guidance_embeds else "takes no guidance"
            raise ValueError(f"guidance is {guidance}, but this model {wanted}")
        channels = self.config.timestep_guidance_channels
        vec = self.time_in(sinusoidal_embedding(1000 * timestep.astype(jnp.float32), channels))
        if guidance is None:
            return vec
        scale = sinusoidal_embedding(1000 * guidance.astype(jnp.float32), channels)
        return vec + self.guidance_in(scale)

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""
        lists = ("double_blocks", "single_blocks")
        return [(f"{name}.{i}", b) for name in lists for i, b in enumerate(getattr(self, name))]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a block makes of the tokens."""
        mods = carry.mods
        if isinstance(block, DoubleStreamBlock):
            img, txt = block(carry.img, carry.txt, mods.img, mods.txt, carry.rope)
            return dataclasses.replace(carry, img=img, txt=txt)
        x = carry.img if carry.txt is None else jnp.concatenate([carry.txt, carry.img], axis=1)
        return dataclasses.replace(carry, img=block(x, mods.single, carry.rope), txt=None)

    def finish(self, carry: Carry) -> jax.Array:
        """Return the velocity, [b, image tokens, token_channels], from what the blocks made."""
        x = carry.img if carry.txt is not None else carry.img[:, carry.text_tokens :]
        return self.final_layer(x, carry.vec)
