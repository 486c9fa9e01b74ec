"""The embedder of FLUX.1 Redux: pictures to tokens that stand behind those of a text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.checkpoint_io import WIDTHS, Rule, check_bounds, config_from_json
from models.component import Component, Naming
from models.linear import Linear

_WIDER = 3  # how often the text's channels the hidden layer has


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """Sizes of a ReduxImageEncoder; the field names and defaults are those of diffusers."""

    redux_dim: int = 1152  # channels of what the image encoder gives
    txt_in_features: int = 4096  # channels of the text tokens

    def __post_init__(self):
        check_bounds(self, redux_dim=WIDTHS, txt_in_features=WIDTHS)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ReduxConfig":
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        return config_from_json(cls, values, {"_class_name": ("ReduxImageEncoder",)})

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers reads."""
        return {"_class_name": "ReduxImageEncoder", **dataclasses.asdict(self)}


class ReduxEmbedder(nnx.Module):
    """Two linears from SigLIP's states to text tokens (`src/flux/modules/image_embedders.py`)."""

    def __init__(
        self,
        config: ReduxConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs, "role": "embed"}
        hidden = _WIDER * config.txt_in_features
        self.config = config
        self.redux_up = Linear(config.redux_dim, hidden, **options)
        self.redux_down = Linear(hidden, config.txt_in_features, **options)

    def __call__(self, states: jax.Array) -> jax.Array:
        """[batch, patches, redux_dim] to text tokens, [batch, patches, txt_in_features]."""
        return self.redux_down(jax.nn.silu(self.redux_up(states)))


def _rules(config: ReduxConfig, names: object) -> list[Rule]:
    return []  # the names are the same, in diffusers and in Black Forest Labs' files


def _config_from_shapes(shapes: Mapping[str, tuple[int, ...]], path: object) -> ReduxConfig:
    outputs, inputs = shapes["redux_up.weight"]
    return ReduxConfig(redux_dim=inputs, txt_in_features=outputs // _WIDER)


REDUX = Component(
    name="FLUX.1 Redux embedder",
    classes=("ReduxImageEncoder",),
    library="diffusers",
    config=ReduxConfig,
    module=ReduxEmbedder,
    folder=Naming(telling="redux_up.weight", rules=_rules),
    file=Naming(telling="redux_up.weight", rules=_rules, config=_config_from_shapes),
)
