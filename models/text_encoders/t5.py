"""The encoder half of T5 (arXiv 1910.10683) and T5 v1.1 (gated GELU, arXiv 2002.05202)."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import Mixture, dot_product_attention
from models.checkpoint_io import (
    BLOCKS,
    WIDTHS,
    CheckpointError,
    Rule,
    check_bounds,
    config_from_json,
    count_blocks,
)
from models.component import Component, Naming
from models.linear import Linear

TELLING = "encoder.final_layer_norm.weight"  # a tensor that every checkpoint has


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Shape of a T5 encoder; the field names and defaults are those of transformers."""

    vocab_size: int = 32128  # rows of the token embedding
    d_model: int = 512  # width of the residual stream
    d_kv: int = 64  # width of one attention head
    d_ff: int = 2048  # hidden width of the MLP
    num_layers: int = 6  # blocks
    num_heads: int = 8  # attention heads
    relative_attention_num_buckets: int = 32  # rows of the relative attention bias
    relative_attention_max_distance: int = 128  # distances from here on share the last bucket
    layer_norm_epsilon: float = 1e-6  # added to the mean square before its root
    feed_forward_proj: str = "relu"  # "relu", or "gated-gelu" (v1.1)

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads")
        sizes = (*sizes, "relative_attention_max_distance")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), num_layers=BLOCKS)
        check_bounds(self, layer_norm_epsilon=(0, 1), relative_attention_num_buckets=(4, 2**20))
        # Half the buckets of a direction hold a distance each, the others what lies beyond.
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise CheckpointError(
                f"T5Config: relative_attention_max_distance = "
                f"{self.relative_attention_max_distance} must be above a quarter of "
                f"relative_attention_num_buckets = {self.relative_attention_num_buckets}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "T5Config":
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        supported = {"model_type": ("t5",), "feed_forward_proj": ("relu", "gated-gelu")}
        return config_from_json(cls, values, supported)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that transformers' T5EncoderModel reads."""
        names = {"architectures": ["T5EncoderModel"], "model_type": "t5", "use_cache": False}
        return {**names, "is_encoder_decoder": False, **dataclasses.asdict(self)}


# The encoder of T5 v1.1 XXL, which image models read.
T5_XXL = T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)


class T5Encoder(nnx.Module):
    """Token ids to hidden states after the final norm. Norms and softmax run in float32.

    Args:
      config: the shape.
      rngs: random keys for the initial weights, which are drawn as the original's are.
      dtype: of the computation. float16 overflows in trained T5s; use bfloat16.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        self.embed = _embed(config.vocab_size, config.d_model, 1.0, **options)
        # One table for all blocks; the checkpoint keeps it in the first.
        self.relative_attention_bias = _embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            config.d_model**-0.5,
            **options,
        )
        self.blocks = nnx.List([_Block(config, **options) for _ in range(config.num_layers)])
        self.final_norm = _norm(config, **options)

    def __call__(
        self,
        input_ids: jax.Array,  # int [batch, tokens]
        attention_mask: jax.Array | None = None,  # [batch, tokens], 0 for padding; None: no padding
    ) -> jax.Array:
        """Return the hidden states, [batch, tokens, d_model]."""
        x = self.embed(input_ids).astype(self.dtype)
        bias = self._position_bias(input_ids.shape[1])
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        for block in self.blocks:
            x = block(x, bias, mask)
        return self.final_norm(x)

    def _position_bias(self, tokens: int) -> jax.Array:
        """Return the bias of the attention logits, [1, heads, tokens, tokens]."""
        position = np.arange(tokens)
        buckets = relative_position_buckets(
            position[None, :] - position[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        bias = self.relative_attention_bias(jnp.asarray(buckets)).astype(self.dtype)
        return bias.transpose(2, 0, 1)[None]


def relative_position_buckets(
    distance: np.ndarray,  # key position minus query position
    num_buckets: int,
    max_distance: int,
) -> np.ndarray:
    """Return the bucket of each distance, int32 of the same shape (both directions).

    Half the buckets are for keys after the query. In each half, small distances have a bucket each
    and larger ones share logarithmically wider buckets (arXiv 1910.10683, section 2.1).
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    # float32, as in the reference: the rounding decides the bucket at the borders.
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    wide = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (np.where(distance > 0, half, 0) + np.where(size < exact, size, wide)).astype(np.int32)


class _Block(nnx.Module):
    def __init__(self, config: T5Config, **options):
        self.attention_norm = _norm(config, **options)
        self.attention = _Attention(config, **options)
        self.mlp_norm = _norm(config, **options)
        gated = config.feed_forward_proj == "gated-gelu"
        self.mlp = (_GatedMLP if gated else _MLP)(config, **options)

    def __call__(self, x, bias, mask):
        x = x + self.attention(self.attention_norm(x), bias, mask)
        return x + self.mlp(self.mlp_norm(x))


class _Attention(nnx.Module):
    """Attention with a position bias and, as T5 has it, without scaling of the logits."""

    def __init__(self, config: T5Config, **options):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = _linear(
            width, inner, (width * config.d_kv) ** -0.5, role="attention_in", **options
        )
        self.k = _linear(width, inner, width**-0.5, role="attention_in", **options)
        self.v = _linear(width, inner, width**-0.5, role="attention_in", **options)
        self.o = _linear(inner, width, inner**-0.5, role="attention_out", **options)
        self.mixtures = (
            Mixture(
                values=(("v", 0),),
                rows=inner,
                outputs=("o",),
                columns=inner,
                head_dim=config.d_kv,
            ),
        )

    def __call__(self, x, bias, mask):
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).reshape(batch, tokens, self.num_heads, -1)
            for layer in (self.q, self.k, self.v)
        )
        y = dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return self.o(y.reshape(batch, tokens, -1))


class _MLP(nnx.Module):
    def __init__(self, config: T5Config, **options):
        self.wi = _linear(
            config.d_model, config.d_ff, config.d_model**-0.5, role="mlp_in", **options
        )
        self.wo = _linear(
            config.d_ff, config.d_model, config.d_ff**-0.5, role="outlier_out", **options
        )

    def __call__(self, x):
        return self.wo(jax.nn.relu(self.wi(x)))


class _GatedMLP(nnx.Module):
    def __init__(self, config: T5Config, **options):
        self.wi_0 = _linear(
            config.d_model, config.d_ff, config.d_model**-0.5, role="mlp_in", **options
        )
        self.wi_1 = _linear(
            config.d_model, config.d_ff, config.d_model**-0.5, role="mlp_in", **options
        )
        self.wo = _linear(
            config.d_ff, config.d_model, config.d_ff**-0.5, role="outlier_out", **options
        )

    def __call__(self, x):
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


def _linear(inputs: int, outputs: int, stddev: float, **options) -> Linear:
    init = nnx.initializers.normal(stddev)
    return Linear(inputs, outputs, use_bias=False, kernel_init=init, **options)


def _embed(rows: int, width: int, stddev: float, **options) -> nnx.Embed:
    # Looked up in the parameters' dtype: training then sums a token's gradients in float32.
    options = options | {"dtype": options["param_dtype"]}
    return nnx.Embed(rows, width, embedding_init=nnx.initializers.normal(stddev), **options)


def _norm(config: T5Config, **options) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, **options)


def checkpoint_rules(embedding: str = "shared") -> list[Rule]:
    """Return the checkpoint's names; the token embedding has one or both of two tied names."""
    block, layer = r"blocks\.(\d+)\.", r"encoder.block.\1.layer."
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    return [
        Rule(pattern="embed", sources=embedding),
        Rule(pattern="relative_attention_bias", sources=bias),
        Rule(pattern=block + "attention_norm", sources=layer + "0.layer_norm"),
        Rule(pattern=block + r"attention\.(.+)", sources=layer + r"0.SelfAttention.\2"),
        Rule(pattern=block + "mlp_norm", sources=layer + "1.layer_norm"),
        Rule(pattern=block + r"mlp\.(.+)", sources=layer + r"1.DenseReluDense.\2"),
        Rule(pattern="final_norm", sources="encoder.final_layer_norm"),
    ]


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path | str = "") -> T5Config:
    """Return the sizes that a file without config.json has.

    Args:
      shapes: its tensors', without a prefix.
      path: of the file, for errors.

    Raises:
      CheckpointError: a tensor that tells a size is missing or misshapen.
    """
    first = "encoder.block.0.layer."
    gated = f"{first}1.DenseReluDense.wi_0.weight" in shapes
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    telling = (
        embedding,
        f"{first}0.SelfAttention.q.weight",
        f"{first}0.SelfAttention.relative_attention_bias.weight",
        f"{first}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight",
    )
    found = [shapes.get(name, ()) for name in telling]
    if any(len(shape) != 2 or not all(shape) for shape in found):
        listed = ", ".join(telling)
        raise CheckpointError(f"{path} holds only a part of a T5 encoder: expected {listed}")
    embed, query, bias, hidden = found
    return T5Config(
        vocab_size=embed[0],
        d_model=embed[1],
        d_kv=query[0] // bias[1],
        d_ff=hidden[0],
        num_layers=count_blocks(r"encoder\.block", shapes),
        num_heads=bias[1],
        relative_attention_num_buckets=bias[0],
        feed_forward_proj="gated-gelu" if gated else "relu",
    )


def _rules(config: T5Config, names: Collection[str]) -> list[Rule]:
    shared = not names or "shared.weight" in names
    return checkpoint_rules("shared" if shared else "encoder.embed_tokens")


# A whole T5's decoder is left alone.
_IGNORE = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\..+",
    r"lm_head\.weight",
    "logit_scale",
)
T5_ENCODER = Component(
    name="T5 encoder",
    classes=("T5EncoderModel",),
    library="transformers",
    config=T5Config,
    module=T5Encoder,
    folder=Naming(telling=TELLING, rules=_rules, ignore=_IGNORE),
    file=Naming(telling=TELLING, rules=_rules, ignore=_IGNORE, config=config_from_shapes),
)
