"""The text encoder of CLIP (arXiv 2103.00020)."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
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

TELLING = "text_model.final_layer_norm.weight"  # a tensor that every checkpoint has


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Shape of a CLIP text encoder; the field names and defaults are those of transformers."""

    vocab_size: int = 49408  # rows of the token embedding
    hidden_size: int = 512  # width of the residual stream
    intermediate_size: int = 2048  # hidden width of the MLP
    num_hidden_layers: int = 12  # blocks
    num_attention_heads: int = 8  # attention heads
    max_position_embeddings: int = 77  # longest prompt in tokens
    hidden_act: str = "quick_gelu"  # "quick_gelu" or "gelu" (exact)
    layer_norm_eps: float = 1e-5  # added to the variance before its root
    eos_token_id: int = 49407  # token whose state is the pooled output; 2 has a meaning of its own
    # Which of transformers' `hidden_states` the call returns, such as -2 for what goes into the
    # last block; None for the last, behind the final norm. Our own key.
    hidden_state: int | None = None
    projection_dim: int | None = None  # channels of the projected pooled state; None: none is there

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        check_bounds(self, **dict.fromkeys((*sizes, "max_position_embeddings"), WIDTHS))
        check_bounds(self, num_hidden_layers=BLOCKS, layer_norm_eps=(0, 1), eos_token_id=(0, 2**31))
        blocks = self.num_hidden_layers
        check_bounds(self, hidden_state=(-blocks - 1, blocks), projection_dim=WIDTHS)
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"CLIPTextConfig: hidden_size = {self.hidden_size} must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CLIPTextConfig":
        """Build from a parsed config.json; raises CheckpointError on what isn't supported.

        A projection behind the model is left alone, unless the config is one of ours: transformers
        writes its size, be it there or not.
        """
        ours = "hidden_state" in values
        return cls._from_json(values if ours else {**values, "projection_dim": None})

    @classmethod
    def _from_json(cls, values: Mapping[str, Any]) -> Self:
        supported = {"model_type": ("clip_text_model",), "hidden_act": tuple(_ACTIVATIONS)}
        return config_from_json(cls, values, supported)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that transformers' class reads."""
        kind = "CLIPTextModel" if self.projection_dim is None else "CLIPTextModelWithProjection"
        names = {"architectures": [kind], "model_type": "clip_text_model"}
        values = dataclasses.asdict(self).items()
        return {**names, **{key: value for key, value in values if value is not None}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedCLIPTextConfig(CLIPTextConfig):
    """A CLIP text encoder as SD3 and SDXL take it: what goes into its last block, and a projection.

    Both are CLIP-L (SD3) and CLIP-G (arXiv 2307.01952, section 2.1).
    """

    hidden_state: int | None = -2
    projection_dim: int | None = 512

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ProjectedCLIPTextConfig":
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        return cls._from_json(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PenultimateCLIPTextConfig(CLIPTextConfig):
    """A CLIP text encoder as SDXL takes CLIP-L: what goes into its last block, no projection."""

    hidden_state: int | None = -2

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PenultimateCLIPTextConfig":
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        return cls._from_json({**values, "projection_dim": None})


class CLIPTextEncoder(nnx.Module):
    """Token ids to normed hidden states and the pooled state. Norms and softmax run in float32.

    Args:
      config: the shape.
      rngs: random keys for the initial weights, which are drawn as the original's are.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, init = config.hidden_size, nnx.initializers.normal(0.02)
        self.config = config
        self.dtype = dtype
        # Looked up in the parameters' dtype: training then sums a token's gradients in float32.
        lookup = options | {"dtype": param_dtype, "embedding_init": init}
        self.token_embedding = nnx.Embed(config.vocab_size, width, **lookup)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, width, **lookup)
        self.layers = nnx.List([_Layer(config, **options) for _ in range(config.num_hidden_layers)])
        self.final_layer_norm = _norm(config, **options)
        outputs, options = config.projection_dim, options | {"use_bias": False, "role": "head"}
        self.text_projection = outputs and _linear(width, outputs, width**-0.5, **options)

    def __call__(
        self,
        input_ids: jax.Array,  # int [batch, tokens]
        attention_mask: jax.Array | None = None,  # [batch, tokens], 0 for padding; None: no padding
    ) -> tuple[jax.Array, jax.Array]:
        """Return hidden states, [batch, tokens, hidden_size], and pooled, [batch, hidden_size].

        The states are those that the config names; the pooled one is projected, to
        [batch, projection_dim], where it names a projection.

        Raises:
          ValueError: more tokens than the model has positions.
        """
        tokens = input_ids.shape[1]
        if tokens > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(f"input_ids has {tokens} tokens; truncate it to at most {limit}")
        x = self.token_embedding(input_ids) + self.position_embedding(jnp.arange(tokens))
        x = x.astype(self.dtype)
        mask = jnp.tril(jnp.ones((tokens, tokens), bool))[None, None]
        if attention_mask is not None:
            mask &= attention_mask.astype(bool)[:, None, None, :]
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        last = self.final_layer_norm(states[-1])
        pooled = last[jnp.arange(last.shape[0]), self._eos_position(input_ids)]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        wanted = self.config.hidden_state
        return last if wanted is None else states[wanted], pooled

    def _eos_position(self, input_ids: jax.Array) -> jax.Array:
        """Return the index of the first end token of each row, int [batch].

        Configs from before transformers' pull request 24773 say 2, which was never the end token;
        there it is the one with the highest id.
        """
        if self.config.eos_token_id == 2:
            return jnp.argmax(input_ids, axis=-1)
        return jnp.argmax(input_ids == self.config.eos_token_id, axis=-1)


class _Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **options):
        self.layer_norm1 = _norm(config, **options)
        self.self_attn = _Attention(config, **options)
        self.layer_norm2 = _norm(config, **options)
        self.mlp = _MLP(config, **options)

    def __call__(self, x, mask):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **options):
        width, stddev = config.hidden_size, config.hidden_size**-0.5
        self.num_heads = config.num_attention_heads
        in_stddev = stddev * (2 * config.num_hidden_layers) ** -0.5
        self.q_proj = _linear(width, width, in_stddev, role="attention_in", **options)
        self.k_proj = _linear(width, width, in_stddev, role="attention_in", **options)
        self.v_proj = _linear(width, width, in_stddev, role="attention_in", **options)
        self.out_proj = _linear(width, width, stddev, role="attention_out", **options)
        self.mixtures = (
            Mixture(
                values=(("v_proj", 0),),
                rows=width,
                outputs=("out_proj",),
                columns=width,
                head_dim=width // self.num_heads,
            ),
        )

    def __call__(self, x, mask):
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).reshape(batch, tokens, self.num_heads, -1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(dot_product_attention(q, k, v, mask=mask).reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **options):
        width, hidden = config.hidden_size, config.intermediate_size
        out_stddev = (2 * width * config.num_hidden_layers) ** -0.5
        self.hidden_act = config.hidden_act
        self.fc1 = _linear(width, hidden, (2 * width) ** -0.5, role="mlp_in", **options)
        self.fc2 = _linear(hidden, width, out_stddev, role="mlp_out", **options)

    def __call__(self, x):
        return self.fc2(_ACTIVATIONS[self.hidden_act](self.fc1(x)))


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": _gelu}


def _linear(inputs: int, outputs: int, stddev: float, **options) -> Linear:
    return Linear(inputs, outputs, kernel_init=nnx.initializers.normal(stddev), **options)


def _norm(config: CLIPTextConfig, **options) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, **options
    )


def checkpoint_rules(prefix: str = "text_model.") -> list[Rule]:
    """Return the checkpoint's names, which have a prefix unless transformers 5 wrote them."""
    return [
        Rule(pattern="(.+_embedding)", sources=prefix + r"embeddings.\1"),
        Rule(pattern=r"layers\.(.+)", sources=prefix + r"encoder.layers.\1"),
        Rule(pattern="final_layer_norm", sources=prefix + "final_layer_norm"),
    ]


class _Published(NamedTuple):
    """What the shapes of a published encoder don't tell."""

    name: str
    heads: int
    hidden_act: str


_PUBLISHED = {  # by width
    768: _Published("CLIP-L", heads=12, hidden_act="quick_gelu"),
    1280: _Published("CLIP-G", heads=20, hidden_act="gelu"),
}


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], path: Path | str = ""
) -> CLIPTextConfig:
    """Return the sizes that a file without config.json has, if it is CLIP ViT-L's.

    Heads and activation aren't in the shapes; those of CLIP-L are in its published config.json.

    Args:
      shapes: its tensors', without a prefix.
      path: of the file, for errors.

    Raises:
      CheckpointError: it is another model, or not whole.
    """
    return CLIPTextConfig(**_sizes(shapes, path, (768,)))


def projected_config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], path: Path | str = ""
) -> ProjectedCLIPTextConfig:
    """Return the same of a file with a projection, if it is CLIP-L's or CLIP-G's."""
    projection = shapes.get("text_projection.weight", ())
    if len(projection) != 2:
        raise CheckpointError(f"{path} holds a text encoder without text_projection.weight")
    sizes = _sizes(shapes, path, tuple(_PUBLISHED))
    return ProjectedCLIPTextConfig(**sizes, projection_dim=projection[0])


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], path: Path | str, widths: tuple[int, ...]
) -> dict[str, Any]:
    """Return the fields of a published encoder of one of some widths."""
    telling = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    telling = (*telling, "encoder.layers.0.mlp.fc1.weight")
    token, position, hidden = (shapes.get(f"text_model.{name}", ()) for name in telling)
    width = token[1:]
    if {width, position[1:], hidden[1:]} != {width} or width not in {(x,) for x in widths}:
        names = " or ".join(_PUBLISHED[x].name for x in widths)
        raise CheckpointError(
            f"{path} holds a text encoder that isn't {names}, or only a part of it"
        )
    return {
        "vocab_size": token[0],
        "hidden_size": token[1],
        "intermediate_size": hidden[0],
        "num_hidden_layers": count_blocks(r"text_model\.encoder\.layers", shapes),
        "num_attention_heads": _PUBLISHED[token[1]].heads,
        "max_position_embeddings": position[0],
        "hidden_act": _PUBLISHED[token[1]].hidden_act,
        "eos_token_id": 2,
    }


def _rules(config: CLIPTextConfig, names: Collection[str]) -> list[Rule]:
    bare = bool(names) and not any(name.startswith("text_model.") for name in names)
    return checkpoint_rules("" if bare else "text_model.")


# A projection behind the model is left alone where the config names none.
_IGNORE = (r".*position_ids", r"text_projection\.weight", "logit_scale")
CLIP_TEXT = Component(
    name="CLIP text encoder",
    classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
    library="transformers",
    config=CLIPTextConfig,
    module=CLIPTextEncoder,
    folder=Naming(telling=(TELLING, "final_layer_norm.weight"), rules=_rules, ignore=_IGNORE),
    file=Naming(telling=TELLING, rules=_rules, ignore=_IGNORE, config=config_from_shapes),
)
CLIP_TEXT_PENULTIMATE = dataclasses.replace(
    CLIP_TEXT, config=PenultimateCLIPTextConfig, file=None
)  # SDXL's first
# SD3's, and SDXL's second.
CLIP_TEXT_PROJECTED = dataclasses.replace(
    CLIP_TEXT,
    classes=("CLIPTextModelWithProjection",),
    config=ProjectedCLIPTextConfig,
    file=Naming(telling=TELLING, rules=_rules, ignore=_IGNORE, config=projected_config_from_shapes),
)
