"""The FLUX.1 transformer: double-stream blocks, then single-stream blocks, over packed latents.

Module names and fused projections follow Black Forest Labs' reference (`src/flux/model.py` of
github.com/black-forest-labs/flux); the call follows diffusers' FluxTransformer2DModel.
Shapes: b batch, t tokens (text first, then image), h heads, d head_dim, c hidden_size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import dot_product_attention
from models.flux.config import FluxConfig
from models.linear import Linear, Part

_EPSILON = 1e-6  # of every norm
_THETA = 10000.0  # base of both position and timestep frequencies
_TIME_CHANNELS = 256  # of the sinusoidal embedding of timestep and guidance
_MLP_RATIO = 4


def sinusoidal_embedding(
    position: jax.Array,  # float32 [b]
    channels: int = _TIME_CHANNELS,
) -> jax.Array:
    """Return float32 [b, channels]: cosines, then sines, of falling frequencies."""
    half = channels // 2
    frequency = jnp.asarray(_THETA ** (-np.arange(half) / half), jnp.float32)
    angle = position.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rope_table(
    ids: jax.Array,  # [t, axes]: position of each token on each axis
    axes_dims: tuple[int, ...],
) -> jax.Array:
    """Return cosine and sine of the rotation of each pair of channels, float32 [2, t, d / 2]."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequency = jnp.asarray(_THETA ** (-np.arange(0, dim, 2) / dim), jnp.float32)
        angles.append(ids[:, axis, None].astype(jnp.float32) * frequency)
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Projected tokens of one stream, and the norms of its queries and keys."""

    qkv: jax.Array  # [b, t, at least 3 c]: queries, keys, values, each [h, d]
    query_norm: nnx.RMSNorm  # over the channels of a head
    key_norm: nnx.RMSNorm


def qk_norm_rope(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2], for the tokens of all streams
    *,
    heads: int,
) -> tuple[jax.Array, ...]:
    """Return normed and rotated queries and keys, and values, of the joined streams, [b, t, h, d].

    Norms and rotations are float32, and rounded once.
    """
    parts = zip(*(_split_heads(stream, heads) for stream in streams), strict=True)
    q, k, v = (jnp.concatenate(part, axis=1) for part in parts)
    return *(apply_rope(x, rope).astype(v.dtype) for x in (q, k)), v


def _split_heads(stream: Stream, heads: int) -> tuple[jax.Array, ...]:
    """Return float32 normed queries and keys, and values, each [b, t, h, d]."""
    batch, tokens, _ = stream.qkv.shape
    d = stream.query_norm.num_features
    qkv = stream.qkv[..., : 3 * heads * d].reshape(batch, tokens, 3, heads, d)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    return stream.query_norm(q), stream.key_norm(k), v


def apply_rope(
    x: jax.Array,  # float32 [b, t, h, d]
    rope: jax.Array,  # float32 [2, t, d / 2]: from `rope_table`
) -> jax.Array:
    """Rotate neighbouring channels (2i, 2i + 1) of each token; same shape and dtype."""
    cos, sin = rope[0, :, None], rope[1, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def attend(
    streams: tuple[Stream, ...],
    rope: jax.Array,  # float32 [2, t, d / 2], for the tokens of all streams
    *,
    heads: int,
) -> jax.Array:
    """Return attention over the tokens of all streams, [b, t, h, d]."""
    return dot_product_attention(*qk_norm_rope(streams, rope, heads=heads))


class JointAttention(nnx.Module):
    """Attention with rotary positions over the tokens of all streams; holds no weights."""

    def __init__(self, heads: int, head_dim: int):
        self.heads, self.head_dim = heads, head_dim
        # What may take its place: an RMSNorm of queries and keys, then a rotation of neighbouring
        # channels, then attention without a mask.
        self.attention_of = "qk_norm_rope"
        self.attend = attend

    def __call__(
        self,
        *streams: Stream,
        rope: jax.Array,  # float32 [2, t, d / 2]
    ) -> jax.Array:
        """Return [b, t, c], t tokens of all streams."""
        out = self.attend(streams, rope, heads=self.heads)
        return out.reshape(*out.shape[:2], -1)


class Embedder(nnx.Module):
    """Two linears that bring one condition (time, guidance, pooled text) to hidden_size."""

    def __init__(self, inputs: int, hidden: int, *, linear):
        self.in_layer = linear(inputs, hidden, role="embed")
        self.out_layer = linear(hidden, hidden, role="embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, inputs] to [b, c]."""
        return self.out_layer(nnx.silu(self.in_layer(x)))


class Modulation(nnx.Module):
    """Shifts, scales and gates of one block from the condition vector; zero at initialisation."""

    def __init__(self, hidden: int, parts: int, *, linear):
        self.parts = parts
        zeros = nnx.initializers.zeros
        self.lin = linear(hidden, parts * hidden, kernel_init=zeros, role="modulation")

    def __call__(self, vec: jax.Array) -> list[jax.Array]:
        """[b, c] to `parts` arrays [b, 1, c]."""
        return jnp.split(self.lin(nnx.silu(vec))[:, None], self.parts, axis=-1)


class SelfAttention(nnx.Module):
    """The projections of one stream; the attention itself joins both streams."""

    def __init__(self, config: FluxConfig, *, linear, norm):
        hidden = config.hidden_size
        self.qkv = linear(hidden, 3 * hidden, role="attention_in")
        self.proj = linear(hidden, hidden, role="attention_out")
        self.query_norm = norm(config.attention_head_dim)
        self.key_norm = norm(config.attention_head_dim)

    def project(
        self,
        x: jax.Array,  # [b, t, c]
        modulation: tuple[jax.Array, jax.Array],  # shift and scale, [b, 1, c]
    ) -> Stream:
        """Return the queries, keys and values of the modulated x."""
        qkv = self.qkv(x, modulation=modulation)
        return Stream(qkv=qkv, query_norm=self.query_norm, key_norm=self.key_norm)


class MLP(nnx.Module):
    """The feed-forward part of a double-stream block."""

    def __init__(self, hidden: int, *, linear):
        self.up = linear(hidden, _MLP_RATIO * hidden, role="mlp_in")
        self.down = linear(_MLP_RATIO * hidden, hidden, role="mlp_out")

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]
        shift: jax.Array,  # [b, 1, c], like scale and gate
        scale: jax.Array,
        gate: jax.Array,
    ) -> jax.Array:
        """Return x plus its gated update, [b, t, c]."""
        wide = self.up(x, modulation=(shift, scale))
        wide = Part(array=wide, size=wide.shape[-1], activation="gelu")
        return self.down((wide,), gate=gate, residual=x)


class DoubleStreamBlock(nnx.Module):
    """Image and text tokens with weights of their own, and one attention over both."""

    def __init__(self, config: FluxConfig, *, linear, norm):
        hidden = config.hidden_size
        self.img_mod = Modulation(hidden, 6, linear=linear)
        self.txt_mod = Modulation(hidden, 6, linear=linear)
        self.img_attn = SelfAttention(config, linear=linear, norm=norm)
        self.txt_attn = SelfAttention(config, linear=linear, norm=norm)
        self.img_mlp = MLP(hidden, linear=linear)
        self.txt_mlp = MLP(hidden, linear=linear)
        self.attention = JointAttention(config.num_attention_heads, config.attention_head_dim)

    def __call__(
        self,
        img: jax.Array,  # [b, image tokens, c]
        txt: jax.Array,  # [b, text tokens, c]
        vec: jax.Array,  # [b, c]: time, guidance and pooled text
        rope: jax.Array,  # float32 [2, t, d / 2]
    ) -> tuple[jax.Array, jax.Array]:
        """Return the image and text tokens after this block, shapes as they came."""
        shift, scale, gate, *img_mlp_mod = self.img_mod(vec)
        txt_shift, txt_scale, txt_gate, *txt_mlp_mod = self.txt_mod(vec)

        img_qkv = self.img_attn.project(img, (shift, scale))
        txt_qkv = self.txt_attn.project(txt, (txt_shift, txt_scale))
        attended = self.attention(txt_qkv, img_qkv, rope=rope)
        txt_out, img_out = jnp.split(attended, [txt.shape[1]], axis=1)

        img = self.img_attn.proj(img_out, gate=gate, residual=img)
        txt = self.txt_attn.proj(txt_out, gate=txt_gate, residual=txt)
        return self.img_mlp(img, *img_mlp_mod), self.txt_mlp(txt, *txt_mlp_mod)


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

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]: text and image tokens
        vec: jax.Array,  # [b, c]: time, guidance and pooled text
        rope: jax.Array,  # float32 [2, t, d / 2]
    ) -> jax.Array:
        """Return the tokens after this block, [b, t, c]."""
        shift, scale, gate = self.modulation(vec)
        wide = self.linear1(x, modulation=(shift, scale))
        hidden, mlp = x.shape[-1], _MLP_RATIO * x.shape[-1]
        stream = Stream(qkv=wide, query_norm=self.query_norm, key_norm=self.key_norm)
        joined = (
            Part(array=self.attention(stream, rope=rope), size=hidden),
            Part(array=wide, start=3 * hidden, size=mlp, activation="gelu"),
        )
        return self.linear2(joined, gate=gate, residual=x)


class FinalLayer(nnx.Module):
    """Modulated norm and the linear to output channels; both linears zero at initialisation."""

    def __init__(self, hidden: int, outputs: int, *, linear):
        zeros = nnx.initializers.zeros
        self.modulation = linear(hidden, 2 * hidden, kernel_init=zeros, role="embed")
        self.linear = linear(hidden, outputs, kernel_init=zeros, role="head")

    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        """[b, t, c] and the condition [b, c] to [b, t, outputs]."""
        shift, scale = jnp.split(self.modulation(nnx.silu(vec))[:, None], 2, axis=-1)
        return self.linear(x, modulation=(shift, scale))


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
        self.time_in = Embedder(_TIME_CHANNELS, hidden, linear=linear)
        self.vector_in = Embedder(config.pooled_projection_dim, hidden, linear=linear)
        if config.guidance_embeds:
            self.guidance_in = Embedder(_TIME_CHANNELS, hidden, linear=linear)
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
