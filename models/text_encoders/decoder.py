"""Causal decoders as text encoders: Qwen3 (arXiv 2505.09388), Qwen2.5 and Mistral.

Diffusion models take hidden states from the middle of a language model, so only the layers below
the last state that is asked for are built and read; there is no head.
Shapes: b batch, t tokens, h query heads, g key and value heads, d head_dim, c hidden_size.
"""

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

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
from models.linear import Linear, Norm, rms_norm, swiglu
from models.rope import apply_rope_halves, rope_table
from models.stored_files import find_prefix

TELLING = "layers.0.input_layernorm.weight"  # a tensor that every checkpoint has


class _Kind(NamedTuple):
    """What sets a family of decoders apart, beyond the sizes in its config."""

    architecture: str  # transformers' class
    qk_norm: bool  # RMSNorm of each head's queries and keys before the rotation
    qkv_bias: bool  # always; Qwen3 says so by attention_bias, of the output too


_KINDS = {
    "qwen3": _Kind("Qwen3ForCausalLM", qk_norm=True, qkv_bias=False),
    "qwen2": _Kind("Qwen2ForCausalLM", qk_norm=False, qkv_bias=True),
    "mistral": _Kind("MistralForCausalLM", qk_norm=False, qkv_bias=False),
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_NEEDED = (*_NEEDED, "num_attention_heads", "num_key_value_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder; the field names are those of transformers."""

    model_type: str = "qwen3"  # or "qwen2" (2.5 too), "mistral"
    vocab_size: int  # rows of the token embedding
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # hidden width of the MLP
    num_hidden_layers: int  # of the whole model, whatever is built of it
    num_attention_heads: int  # query heads
    num_key_value_heads: int  # key and value heads; each serves several query heads
    head_dim: int = 128  # channels of a head
    rms_norm_eps: float = 1e-6  # added to the mean square before its root, in every norm
    rope_theta: float = 10000.0  # base of the position frequencies
    attention_bias: bool = False  # whether Qwen3's four attention linears have biases
    max_position_embeddings: int = 32768  # longest text in tokens
    sliding_window: int | None = None  # tokens that a query sees; a longer text is refused
    # Which states the call returns: 0 is the token embedding, i what layer i gives, the last one
    # behind the final norm; negative ones count from there. Our own key, as transformers numbers
    # its `hidden_states`. None: the last one, of a model whose use isn't said.
    hidden_states: tuple[int, ...] | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        sizes = (*sizes, "num_key_value_heads", "head_dim", "sliding_window")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), num_hidden_layers=BLOCKS)
        check_bounds(self, rms_norm_eps=(0, 1), rope_theta=(1, 1e12))
        check_bounds(self, max_position_embeddings=(1, 2**31))
        count = self.num_hidden_layers
        check_bounds(self, hidden_states=(-count - 1, count))
        if self.hidden_states == ():
            raise CheckpointError("DecoderConfig: hidden_states is empty; name at least one")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise CheckpointError(
                f"DecoderConfig: num_attention_heads = {self.num_attention_heads} must be a "
                f"multiple of num_key_value_heads = {self.num_key_value_heads}, and head_dim = "
                f"{self.head_dim} even"
            )

    @property
    def states(self) -> tuple[int, ...]:
        """Numbers of the states that the call returns, none of them negative."""
        return tuple(i % (self.num_hidden_layers + 1) for i in self.hidden_states or (-1,))

    @property
    def layers(self) -> int:
        """How many layers are built."""
        return max(self.states)

    @property
    def channels(self) -> int:
        """Channels of all returned states together."""
        return len(self.states) * self.hidden_size

    @property
    def longest(self) -> int:
        """Tokens that a text may have."""
        return min(self.max_position_embeddings, self.sliding_window or 2**31)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from a parsed config.json; raises CheckpointError on what isn't supported.

        Of a model that sees pictures too (Mistral3) it is the part that reads text.
        """
        if isinstance(inner := values.get("text_config"), Mapping):
            values = {**inner, **{key: x for key, x in values.items() if key == "hidden_states"}}
        supported = {"model_type": tuple(_KINDS), "hidden_act": ("silu",)}
        config_from_json(_Nothing, values, supported)
        if missing := [name for name in _NEEDED if name not in values]:
            raise CheckpointError(f"{cls.__name__}: config.json lacks {', '.join(missing)}")
        told = {"rope_theta": _rope_theta(values), "sliding_window": _sliding_window(values)}
        if values["num_key_value_heads"] is None:
            told["num_key_value_heads"] = values["num_attention_heads"]
        values = {key: x for key, x in {**values, **told}.items() if (key, x) != ("head_dim", None)}
        config = config_from_json(cls, values)
        if "head_dim" in values or config.model_type == "qwen3":
            return config
        divided = config.hidden_size // config.num_attention_heads
        return dataclasses.replace(config, head_dim=divided)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], path: Path | str = "") -> Self:
        """Return the sizes that a file without config.json has, if it is a Qwen3.

        Frequencies and epsilon aren't in the shapes; all published Qwen3s have the same.

        Args:
          shapes: its tensors', without a prefix.
          path: of the file, for errors.

        Raises:
          CheckpointError: it is another model, or not whole.
        """
        first = "layers.0."
        telling = {"embed_tokens": 2, f"{first}mlp.gate_proj": 2, f"{first}self_attn.q_norm": 1}
        telling |= {f"{first}self_attn.{name}_proj": 2 for name in "qk"}
        found = {name: shapes.get(f"{name}.weight", ()) for name in telling}
        if bad := [name for name, axes in telling.items() if len(found[name]) != axes]:
            raise CheckpointError(
                f"{path} holds no whole Qwen3: missing or misshapen {', '.join(bad)}; give its "
                "folder, with config.json, if it is another decoder"
            )
        embed, hidden, norm, query, key = found.values()
        return cls(
            vocab_size=embed[0],
            hidden_size=embed[1],
            intermediate_size=hidden[0],
            num_hidden_layers=count_blocks("layers", shapes),
            num_attention_heads=query[0] // norm[0],
            num_key_value_heads=key[0] // norm[0],
            head_dim=norm[0],
            rope_theta=1e6,
            max_position_embeddings=40960,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that transformers' class reads.

        Our own hidden_states is left out where none is named, so that a family takes its own.
        """
        architecture = _KINDS[self.model_type].architecture
        values = dataclasses.asdict(self)
        if self.hidden_states is None:
            del values["hidden_states"]
        return {
            "architectures": [architecture],
            "hidden_act": "silu",
            **values,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "use_sliding_window": self.sliding_window is not None,
            "tie_word_embeddings": True,  # there is no other head
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Nothing:
    """A config without fields."""


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """Return the base of the frequencies; newer files have it inside of rope_parameters."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if isinstance(rope, dict):
        kind, share = rope.get("rope_type", rope.get("type")), rope.get("partial_rotary_factor")
        if kind in ("default", None) and share in (1, None):
            return rope.get("rope_theta", values.get("rope_theta", 10000.0))
    raise CheckpointError(
        f"DecoderConfig: rotary positions {rope!r} are not supported; expected rope_type 'default'"
    )


def _sliding_window(values: Mapping[str, Any]) -> Any:
    """Return the window; Qwen's counts only where it is switched on."""
    if values.get("model_type") == "mistral":
        return values.get("sliding_window", 4096)
    return values.get("sliding_window", 4096) if values.get("use_sliding_window") else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from block to block."""

    x: jax.Array  # [b, t, c]
    mask: jax.Array | None  # bool [b, 1, 1, t], False for padding
    rope: jax.Array  # float32 [2, t, d / 2]


class Decoder(nnx.Module):
    """Token ids to chosen hidden states. Norms, rotations and softmax run in float32.

    Args:
      config: the shape, and which states are wanted.
      rngs: random keys for the initial weights, which are drawn as the original's are.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.dtype = dtype
        # Looked up in the parameters' dtype: training then sums a token's gradients in float32.
        lookup = options | {"dtype": param_dtype, "embedding_init": _INIT}
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, **lookup)
        self.layers = nnx.List([_Layer(config, **options) for _ in range(config.layers)])
        whole = config.num_hidden_layers in config.states
        self.final_norm = _norm(config, config.hidden_size, **options) if whole else None

    def __call__(
        self,
        input_ids: jax.Array,  # int [b, t]
        attention_mask: jax.Array | None = None,  # [b, t], 0 for padding on either side
    ) -> tuple[jax.Array, ...]:
        """Return the states that config.hidden_states names, each [b, t, c].

        Without a mask a text may be padded on its right all the same: no token sees a later one,
        so only the states of the padding differ.

        Raises:
          ValueError: more tokens than the model has positions.
        """
        carry = self.start(input_ids=input_ids, attention_mask=attention_mask)
        found = [carry.x]
        for _, block in self.blocks():
            carry = self.advance(block, carry)
            found.append(carry.x)
        if self.final_norm is not None:
            found[-1] = self.final_norm(found[-1])
        return tuple(found[i] for i in self.config.states)

    def start(
        self,
        *,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
    ) -> Carry:
        """Return what goes into the first layer; arguments as the call's."""
        tokens, config = input_ids.shape[1], self.config
        if tokens > config.longest:
            raise ValueError(
                f"input_ids has {tokens} tokens; truncate it to at most {config.longest}"
            )
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        rope = rope_table(jnp.arange(tokens)[:, None], (config.head_dim,), config.rope_theta)
        return Carry(x=self.embed(input_ids).astype(self.dtype), mask=mask, rope=rope)

    def blocks(self) -> list[tuple[str, nnx.Module]]:
        """Return the layers by path, in the order in which they run."""
        return [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]

    @staticmethod
    def advance(block: nnx.Module, carry: Carry) -> Carry:
        """Return what a layer makes of the tokens."""
        return dataclasses.replace(carry, x=block(carry.x, carry.mask, carry.rope))


class _Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, **options):
        self.attention_norm = _norm(config, config.hidden_size, **options)
        self.attention = _Attention(config, **options)
        self.mlp_norm = _norm(config, config.hidden_size, **options)
        self.mlp = _MLP(config, **options)

    def __call__(self, x, mask, rope):
        x = self.attention(x, _before(self.attention_norm), mask, rope)
        return self.mlp(x, _before(self.mlp_norm))


class _Attention(nnx.Module):
    """Causal attention with grouped queries, between two linears."""

    def __init__(self, config: DecoderConfig, **options):
        width, d = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        kind, biased = _KINDS[config.model_type], config.attention_bias
        linear = partial(Linear, kernel_init=_INIT, **options)
        self.rows = _qkv_rows(config)
        self.head_dim = d
        self.qkv = linear(
            width,
            (heads + 2 * groups) * d,
            use_bias=kind.qkv_bias or biased,
            role="attention_in",
        )
        self.out = linear(heads * d, width, use_bias=biased, role="attention_out")
        self.mixtures = (
            Mixture(
                values=(("qkv", (heads + groups) * d),),
                rows=groups * d,
                outputs=("out",),
                columns=heads * d,
                head_dim=d,
            ),
        )
        # float32 out of the norms: the rotation that follows wants it anyway
        head_norm = partial(_norm, config, d, **options | {"dtype": jnp.float32})
        self.query_norm = head_norm() if kind.qk_norm else None
        self.key_norm = head_norm() if kind.qk_norm else None

    def __call__(self, x, norm, mask, rope):
        batch, tokens, _ = x.shape
        parts = jnp.split(self.qkv(x, norm=norm), np.cumsum(self.rows)[:-1], axis=-1)
        q, k, v = (part.reshape(batch, tokens, -1, self.head_dim) for part in parts)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = (apply_rope_halves(x.astype(jnp.float32), rope).astype(v.dtype) for x in (q, k))
        y = dot_product_attention(q, k, v, mask=mask, causal=True)
        return self.out(y.reshape(batch, tokens, -1), residual=x)


class _MLP(nnx.Module):
    """silu(gate) * up, between two linears; both come from the first, gate before up."""

    def __init__(self, config: DecoderConfig, **options):
        width, hidden = config.hidden_size, config.intermediate_size
        linear = partial(Linear, use_bias=False, kernel_init=_INIT, **options)
        self.gate_up = linear(width, 2 * hidden, role="mlp_in")
        self.down = linear(hidden, width, role="mlp_out")

    def __call__(self, x, norm):
        return self.down((swiglu(self.gate_up(x, norm=norm)),), residual=x)


_INIT = nnx.initializers.normal(0.02)


def _norm(config: DecoderConfig, channels: int, **options) -> nnx.RMSNorm:
    return nnx.RMSNorm(channels, epsilon=config.rms_norm_eps, **options)


def _before(norm: nnx.RMSNorm) -> Norm:
    """Return a norm as the linear behind it does it."""
    return rms_norm(norm.scale[...], epsilon=norm.epsilon)


def _qkv_rows(config: DecoderConfig) -> tuple[int, int, int]:
    """Return the outputs of the query, key and value projections."""
    groups = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, groups, groups


def checkpoint_rules(config: DecoderConfig, prefix: str = "") -> list[Rule]:
    """Return the checkpoint's names: those of transformers' Qwen3Model and its relatives."""
    layer, there = r"layers\.(\d+)\.", prefix + r"layers.\1."
    qkv = tuple(f"{there}self_attn.{name}_proj" for name in "qkv")
    gate_up = tuple(f"{there}mlp.{name}_proj" for name in ("gate", "up"))
    halves = (config.intermediate_size,) * 2
    return [
        Rule(pattern="embed", sources=prefix + "embed_tokens"),
        Rule(pattern=layer + "attention_norm", sources=there + "input_layernorm"),
        Rule(pattern=layer + r"attention\.qkv", sources=qkv, rows=_qkv_rows(config)),
        Rule(pattern=layer + r"attention\.out", sources=there + "self_attn.o_proj"),
        Rule(pattern=layer + r"attention\.query_norm", sources=there + "self_attn.q_norm"),
        Rule(pattern=layer + r"attention\.key_norm", sources=there + "self_attn.k_norm"),
        Rule(pattern=layer + "mlp_norm", sources=there + "post_attention_layernorm"),
        Rule(pattern=layer + r"mlp\.gate_up", sources=gate_up, rows=halves),
        Rule(pattern=layer + r"mlp\.down", sources=there + "mlp.down_proj"),
        Rule(pattern="final_norm", sources=prefix + "norm"),
    ]


def _rules(config: DecoderConfig, names: Collection[str]) -> list[Rule]:
    if names:
        return checkpoint_rules(config, find_prefix(names, TELLING) or "")
    if config.layers < config.num_hidden_layers:
        raise ValueError(
            f"the decoder holds {config.layers} of {config.num_hidden_layers} layers; one with "
            "hidden_states None can be written"
        )
    return checkpoint_rules(config, "model.")  # as published, beside a head


def _ignored(config: DecoderConfig) -> tuple[str, ...]:
    """Return names of what isn't wanted: layers above the last state, a head, eyes."""
    above = "|".join(map(str, range(config.layers, config.num_hidden_layers)))
    return (
        rf"(.+\.)?layers\.({above})\..+",
        r"(.+\.)?(norm|lm_head)\.weight",
        r"(.+\.)?rotary_emb\.inv_freq",  # that old files hold
        r"(.+\.)?(vision_tower|visual|multi_modal_projector)\..+",
    )


def decoder_component(config: type[DecoderConfig]) -> Component:
    """Return a table entry for decoders of which a family takes the states that a config names.

    Args:
      config: a class whose default of hidden_states they are.
    """
    naming = Naming(telling=TELLING, rules=_rules, ignore=_ignored)
    classes = [kind.architecture for kind in _KINDS.values()]
    classes += [name.replace("ForCausalLM", "Model") for name in classes]
    return Component(
        name="decoder",
        classes=(*classes, "Mistral3ForConditionalGeneration"),
        library="transformers",
        config=config,
        module=Decoder,
        folder=naming,
        file=dataclasses.replace(naming, config=config.from_shapes),
        whole=lambda config: dataclasses.replace(config, hidden_states=None),
    )


DECODER = decoder_component(DecoderConfig)
