"""The Z-Image transformer (arXiv 2511.22699): single-stream blocks over image and text tokens.

Module names follow diffusers' ZImageTransformer2DModel, whose call this is; projections that share
an input are one linear. Each block norms what goes into attention and MLP and what comes out, all
without a mean, and time scales and gates but shifts nothing.
Shapes: b batch, t tokens (image first, then text), d channels of a head, c dim.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import JointAttention, Stream, fused_mixture
from models.conditioning import TIME_CHANNELS, Embedder, sinusoidal_embedding
from models.linear import Linear, Norm, normalize, rms_norm
from models.mlp import MLP
from models.rope import rope_table
from models.zimage.config import ZImageConfig

MULTIPLE = 32  # tokens of image and of text are padded to it
_TIME_WIDTH = 1024  # inside the embedder of the timestep
_QK_EPSILON = 1e-5  # of the norms of queries and keys


class SelfAttention(nnx.Module):
    """The attention of a block, with its projections."""

    def __init__(self, config: ZImageConfig, *, linear, norm):
        head = config.dim // config.n_heads
        self.qkv = linear(config.dim, 3 * config.dim, use_bias=False, role="attention_in")
        self.out = linear(config.dim, config.dim, use_bias=False, role="attention_out")
        # float32 out of the norms: the rotation that follows wants it anyway
        self.q_norm = norm(head, epsilon=_QK_EPSILON, dtype=jnp.float32)
        self.k_norm = norm(head, epsilon=_QK_EPSILON, dtype=jnp.float32)
        self.attention = JointAttention(config.n_heads, head)
        self.mixtures = (fused_mixture((("qkv", "out"),), config.dim, head),)

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]
        norm: Norm,  # of [c] or [b, 1, c]
        rope: jax.Array,  # float32 [2, t, d / 2] or [b, 2, t, d / 2]
        mask: jax.Array | None,  # bool [b, t]
    ) -> jax.Array:
        """Return what attention makes of the normed x, [b, t, c]."""
        qkv = self.qkv(x, norm=norm)
        stream = Stream(qkv=qkv, query_norm=self.q_norm, key_norm=self.k_norm)
        (attended,) = self.attention(stream, rope=rope, mask=mask)
        return self.out(attended)


class Block(nnx.Module):
    """Attention, then a gated MLP, each between two norms."""

    def __init__(
        self,
        config: ZImageConfig,
        *,
        reads: str,  # "text", "image" or "both": the tokens that it works on
        linear,
        norm,
    ):
        self.reads = reads
        self.epsilon = config.norm_eps
        self.attention = SelfAttention(config, linear=linear, norm=norm)
        plain = partial(linear, use_bias=False)
        self.feed_forward = MLP(config.dim, config.mlp_size, gated=True, linear=plain)
        self.attention_norm1, self.attention_norm2 = norm(config.dim), norm(config.dim)
        self.ffn_norm1, self.ffn_norm2 = norm(config.dim), norm(config.dim)
        if reads != "text":
            # Stays in 16 bits: pictures bear no coarser one (vllm-omni#2795), and it is small.
            self.modulation = linear(config.condition_size, 4 * config.dim, role="embed")

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]
        vec: jax.Array | None,  # [b, condition_size]: time; not read by blocks of text
        rope: jax.Array,  # float32 [2, t, d / 2] or [b, 2, t, d / 2]
        mask: jax.Array | None,  # bool [b, t]: False for tokens that don't count
    ) -> jax.Array:
        """Return the tokens after this block, [b, t, c]."""
        scale, gate, mlp_scale, mlp_gate = self._modulate(vec)
        y = self.attention(x, self._norm(self.attention_norm1, scale), rope, mask)
        x = self._add(x, y, self.attention_norm2, gate)
        y = self.feed_forward(x, self._norm(self.ffn_norm1, mlp_scale))
        return self._add(x, y, self.ffn_norm2, mlp_gate)

    def _modulate(self, vec: jax.Array | None) -> Sequence[jax.Array | None]:
        """Return scale and gate of attention, then of the MLP, each [b, 1, c]."""
        if self.reads == "text":
            return (None,) * 4
        return jnp.split(self.modulation(vec)[:, None], 4, axis=-1)

    def _norm(self, norm: nnx.RMSNorm, scale: jax.Array | None) -> Norm:
        return rms_norm(norm.scale.get_value(), scale, self.epsilon)

    def _add(
        self, x: jax.Array, y: jax.Array, norm: nnx.RMSNorm, gate: jax.Array | None
    ) -> jax.Array:
        """Return x + tanh(gate) * norm(y), [b, t, c]; the gate joins the norm's weights."""
        weight = norm.scale.get_value().astype(jnp.float32)
        weight = weight if gate is None else weight * jnp.tanh(gate.astype(jnp.float32))
        return x + normalize(y, Norm(scale=weight, epsilon=self.epsilon, kind="rms"))


class CaptionEmbedder(nnx.Module):
    """A norm and a linear that bring text tokens to the model's width."""

    def __init__(self, config: ZImageConfig, *, linear, norm):
        self.epsilon = config.norm_eps
        self.norm = norm(config.cap_feat_dim)
        self.linear = linear(config.cap_feat_dim, config.dim, role="embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, cap_feat_dim] to [b, t, c]."""
        return self.linear(x, norm=rms_norm(self.norm.scale.get_value(), epsilon=self.epsilon))


class FinalLayer(nnx.Module):
    """A scaled norm and the linear to output channels."""

    def __init__(self, config: ZImageConfig, *, linear):
        self.modulation = linear(config.condition_size, config.dim, role="embed")
        self.linear = linear(config.dim, config.token_channels, role="head")

    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        """[b, t, c] and the condition [b, condition_size] to [b, t, token_channels]."""
        scale = self.modulation(nnx.silu(vec))[:, None].astype(jnp.float32)
        return self.linear(x, norm=Norm(scale=1 + scale))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block; `b` is left out of ropes that all images share."""

    img: jax.Array  # [b, image tokens, c]; all tokens, image first, behind the first of `layers`
    txt: jax.Array | None  # [b, text tokens, c]; None behind the first of `layers`
    vec: jax.Array  # [b, condition_size]
    img_rope: jax.Array  # float32 [b, 2, image tokens, d / 2]
    txt_rope: jax.Array  # float32 [2, text tokens, d / 2]
    txt_mask: jax.Array | None  # bool [b, text tokens]: False for tokens that don't count
    refined: bool = dataclasses.field(metadata={"static": True})  # the text, before the first block
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})  # rows, columns of tokens

    @property
    def rope(self) -> jax.Array:
        """Of all tokens."""
        shape = (*self.img_rope.shape[:-2], *self.txt_rope.shape[-2:])
        return jnp.concatenate([self.img_rope, jnp.broadcast_to(self.txt_rope, shape)], axis=-2)

    @property
    def mask(self) -> jax.Array | None:
        """Of all tokens."""
        if self.txt_mask is None:
            return None
        images = jnp.ones((len(self.txt_mask), self.img_rope.shape[-2]), bool)
        return jnp.concatenate([images, self.txt_mask], axis=1)


class ZImageTransformer(nnx.Module):
    """Predicts data minus noise, the velocity's opposite, of latents."""

    def __init__(
        self,
        config: ZImageConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,  # of the matmuls and of the tokens between blocks
        param_dtype: jnp.dtype = jnp.float32,
    ):
        linear = partial(Linear, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        norm = partial(nnx.RMSNorm, param_dtype=param_dtype, rngs=rngs)
        block = partial(Block, config, linear=linear, norm=norm)
        refiners = range(config.n_refiner_layers)
        self.config = config
        self.dtype = dtype
        self.x_embedder = linear(config.token_channels, config.dim, role="embed")
        self.t_embedder = Embedder(TIME_CHANNELS, _TIME_WIDTH, config.condition_size, linear=linear)
        self.cap_embedder = CaptionEmbedder(config, linear=linear, norm=norm)
        self.x_pad_token = nnx.Param(jnp.zeros((1, config.dim), param_dtype))
        self.cap_pad_token = nnx.Param(jnp.zeros((1, config.dim), param_dtype))
        self.context_refiner = nnx.List(block(reads="text") for _ in refiners)
        self.noise_refiner = nnx.List(block(reads="image") for _ in refiners)
        self.layers = nnx.List(block(reads="both") for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config, linear=linear)

    def __call__(
        self,
        x: jax.Array | Sequence[jax.Array],  # [b, in_channels, 1, height, width]: noisy latents
        t: jax.Array,  # [b], 0 (noise) to 1 (data)
        # [b, tokens, cap_feat_dim]: text; as a sequence, images may have different tokens
        cap_feats: jax.Array | Sequence[jax.Array] | None = None,
        cap_lengths: jax.Array | None = None,  # int [b]: tokens of text that count; None for all
        context: jax.Array | None = None,  # [b, text tokens, c]: of `prepare`, for cap_feats
        context_lengths: jax.Array | None = None,  # int [b]: cap_lengths; None if all fill context
    ) -> jax.Array:
        """Return data minus noise, of the shape of x.

        Each text is padded to a multiple of 32 with a learned token, and what is beyond that counts
        for nothing. Of one image nothing may be beyond it, so that nothing need be masked.

        Raises:
          ValueError: x has another shape, or there is no text.
        """
        if context is not None:
            cap_feats = None
        carry = self.start(
            x=x,
            t=t,
            cap_feats=cap_feats,
            cap_lengths=cap_lengths,
            context=context,
            context_lengths=context_lengths,
        )
        for _, block in self.blocks():
            carry = self.advance(block, carry)
        return self.finish(carry)

    def prepare(
        self,
        cap_feats: jax.Array,  # [b, tokens, cap_feat_dim]
        cap_lengths: jax.Array | None = None,  # int [b]: tokens that count; None for all
    ) -> jax.Array:
        """Return what text becomes before it meets time and image: the call's `context`."""
        txt = self._embed(cap_feats, cap_lengths)
        rope, mask = self._text_rope(txt.shape[1]), _text_mask(txt, cap_lengths)
        for block in self.context_refiner:
            txt = block(txt, None, rope, mask)
        return txt

    def start(
        self,
        *,
        x: jax.Array | Sequence[jax.Array],
        t: jax.Array,
        cap_feats: jax.Array | Sequence[jax.Array] | None = None,
        cap_lengths: jax.Array | None = None,
        context: jax.Array | None = None,
        context_lengths: jax.Array | None = None,
    ) -> Carry:
        """Return what goes into the first block; arguments as the call's.

        Of both forms of the text the plain one is taken, which goes through all blocks.
        """
        x = x if hasattr(x, "shape") else jnp.stack(x)
        if cap_feats is None and context is None:
            raise ValueError("there is no text: give cap_feats, or context as prepare() returns it")
        if cap_feats is not None and not hasattr(cap_feats, "shape"):
            cap_feats, cap_lengths = _stack(cap_feats)
        plain = cap_feats is not None
        txt = self._embed(cap_feats, cap_lengths) if plain else context
        lengths = cap_lengths if plain else context_lengths
        mask = _text_mask(txt, lengths)
        tokens, grid = self._patches(x)
        vec = self.t_embedder(sinusoidal_embedding(self.config.t_scale * t.astype(jnp.float32)))
        img = self.x_embedder(tokens)
        missing = -img.shape[1] % MULTIPLE
        pad = self.x_pad_token.get_value().astype(img.dtype)
        pad = jnp.broadcast_to(pad, (img.shape[0], missing, img.shape[2]))
        return Carry(
            img=jnp.concatenate([img, pad], axis=1),
            txt=txt,
            vec=vec,
            img_rope=self._image_rope(grid, missing, txt, None if mask is None else lengths),
            txt_rope=self._text_rope(txt.shape[1]),
            txt_mask=mask,
            refined=not plain,
            grid=grid,
        )

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""
        lists = ("context_refiner", "noise_refiner", "layers")
        return [(f"{name}.{i}", b) for name in lists for i, b in enumerate(getattr(self, name))]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a block makes of the tokens."""
        if block.reads == "text":
            if carry.refined:
                return carry
            txt = block(carry.txt, carry.vec, carry.txt_rope, carry.txt_mask)
            return dataclasses.replace(carry, txt=txt)
        if block.reads == "image":
            return dataclasses.replace(carry, img=block(carry.img, carry.vec, carry.img_rope, None))
        x = carry.img if carry.txt is None else jnp.concatenate([carry.img, carry.txt], axis=1)
        x = block(x, carry.vec, carry.rope, carry.mask)
        return dataclasses.replace(carry, img=x, txt=None)

    def finish(self, carry: Carry) -> jax.Array:
        """Return data minus noise, [b, in_channels, 1, height, width]."""
        rows, columns = carry.grid
        y = self.final_layer(carry.img[:, : rows * columns], carry.vec)
        p = self.config.patch_size
        y = y.reshape(len(y), rows, columns, p, p, self.config.in_channels)
        y = y.transpose(0, 5, 1, 3, 2, 4)
        return y.reshape(*y.shape[:2], 1, rows * p, columns * p)

    def _patches(self, x: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        """Return tokens [b, rows columns, token_channels], and rows and columns."""
        p, channels = self.config.patch_size, self.config.in_channels
        if x.ndim != 5 or x.shape[1:3] != (channels, 1) or any(side % p for side in x.shape[3:]):
            raise ValueError(
                f"x has shape {list(x.shape)}; it must be [b, {channels}, 1, height, width], both "
                f"multiples of {p}"
            )
        batch, rows, columns = len(x), x.shape[3] // p, x.shape[4] // p
        tokens = x.reshape(batch, channels, rows, p, columns, p).transpose(0, 2, 4, 3, 5, 1)
        return tokens.reshape(batch, rows * columns, -1), (rows, columns)

    def _embed(self, cap_feats: jax.Array, lengths: jax.Array | None) -> jax.Array:
        """Return text tokens [b, t, c], padded to `MULTIPLE`."""
        tokens = cap_feats.shape[1]
        padding = [(0, 0), (0, -tokens % MULTIPLE), (0, 0)]
        txt = self.cap_embedder(jnp.pad(cap_feats.astype(self.dtype), padding))
        counts = jnp.full(len(txt), tokens) if lengths is None else lengths
        inside = jnp.arange(txt.shape[1]) < counts[:, None]
        return jnp.where(inside[..., None], txt, self.cap_pad_token.get_value().astype(txt.dtype))

    def _text_rope(self, tokens: int) -> jax.Array:
        """Return the rotations of text, which counts from 1 on the first axis, padding too."""
        return self._rope(jnp.zeros((tokens, 3), int).at[:, 0].set(1 + jnp.arange(tokens)))

    def _image_rope(
        self,
        grid: tuple[int, int],
        missing: int,  # tokens of padding, which lie at 0 on all axes
        txt: jax.Array,  # [b, t, c]
        lengths: jax.Array | None,  # [b], where they differ
    ) -> jax.Array:
        """Return the rotations of the image, which is behind the padded text on the first axis."""
        rows, columns = (x.reshape(-1) for x in jnp.indices(grid))
        end = jnp.asarray(txt.shape[1]) if lengths is None else padded(lengths)
        axes = (end[..., None] + 1, rows, columns)
        ids = jnp.stack(jnp.broadcast_arrays(*axes), axis=-1)
        return self._rope(jnp.pad(ids, [(0, 0)] * end.ndim + [(0, missing), (0, 0)]))

    def _rope(self, ids: jax.Array) -> jax.Array:
        return rope_table(ids, self.config.axes_dims, self.config.rope_theta)


def padded(lengths: Any) -> Any:
    """Return what texts of lengths are padded to, an array of the same kind."""
    return -(-lengths // MULTIPLE) * MULTIPLE


def _text_mask(txt: jax.Array, lengths: jax.Array | None) -> jax.Array | None:
    """Return which tokens of text count, bool [b, t]; None where all do."""
    if lengths is None or len(txt) == 1:
        return None
    return jnp.arange(txt.shape[1]) < padded(lengths)[:, None]


def _stack(cap_feats: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """Return texts of any lengths as one array, and their lengths unless they are the same."""
    lengths = [len(text) for text in cap_feats]
    longest = max(lengths)
    padded = [jnp.pad(text, [(0, longest - len(text)), (0, 0)]) for text in cap_feats]
    return jnp.stack(padded), None if len(set(lengths)) == 1 else jnp.asarray(lengths)
