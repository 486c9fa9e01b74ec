"""The UNet of SD and SDXL (arXiv 2112.10752, 2307.01952), which reads a text.

The call follows diffusers' UNet2DConditionModel; projections that share an input are one linear.
Shapes: b batch, h rows, w columns, t pixels, c channels, s text tokens.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Mixture, dot_product_attention, fused_mixture, split_heads
from models.conditioning import Embedder, sinusoidal_embedding
from models.levels.config import Level
from models.levels.modeling import Carry, Levels, Make
from models.linear import Linear, layer_norm
from models.unet.config import SIZES, UNetConditionConfig

_MLP_RATIO = 4
_TRANSFORMER_EPSILON = 1e-6  # of the norm before transformer blocks


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, and an MLP gated by GELU, each behind a norm."""

    def __init__(self, level: Level, text: int, make: Make):
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
        size = width // level.heads
        self.mixtures = (
            fused_mixture((("qkv", "proj"),), width, size),
            Mixture(
                values=(("cross_kv", width),),
                rows=width,
                outputs=("cross_proj",),
                columns=width,
                head_dim=size,
            ),
        )
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

    def __init__(self, level: Level, text: int, make: Make):
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


class UNetCondition(Levels):
    """Predicts the noise in latents of a described image, or what its scheduler says instead."""

    config: UNetConditionConfig

    @staticmethod
    def attention(level: Level, make: Make) -> nnx.Module:
        """Return transformer blocks over an image's pixels."""
        config: Any = make.config
        return Transformer(level, config.cross_attention_dim, make)

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
