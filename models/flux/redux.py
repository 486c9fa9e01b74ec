"""FLUX.1 Redux: FLUX.1 that is given pictures, to vary them, beside a text.

Each picture's tokens stand behind the text's. Of several pictures, and of the text as often, the
scaled sum is taken, by one scale a picture where diffusers has two (diffusers 0.42.1,
`pipelines/flux/pipeline_flux_prior_redux.py`).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoint_io import WIDTHS, Rule, check_bounds, config_from_json
from models.component import Component, Naming
from models.denoiser import Canvas, Conditions, Inputs
from models.family import Schedule
from models.flux.family import FLUX, FluxDenoiser, dev_scheduler, misfits
from models.image_encoders import SIGLIP_VISION, SiglipVisionConfig, to_pixels
from models.linear import Linear

if TYPE_CHECKING:
    from models.sampler import Sampler

_WIDER = 3  # how often the text's channels the hidden layer has
_TOKENS, _WEIGHT = "image_tokens", "text_weight"  # among conditions


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


class FluxReduxDenoiser(FluxDenoiser):
    """Pictures become tokens behind the text's, which both weigh what the pictures' scales say."""

    scales_references: ClassVar[bool] = True

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError without an image, or with a mask."""
        if not inputs.references:
            raise ValueError("references holds no image; give one or more, the pictures to vary")
        if inputs.mask is not None:
            raise ValueError("mask: this model takes none; leave it out")

    def look(self, sampler: "Sampler", inputs: Inputs, canvas: Canvas) -> Conditions:
        """Return the scaled sum of the images' tokens [1, tokens, channels], and of scales [1]."""
        scales = np.asarray(inputs.scales or [1.0] * len(inputs.references), np.float32)
        pixels = to_pixels(inputs.references, self.configs["image_encoder"])
        states = sampler.run("image_encoder", "encode images", pixels)
        tokens = sampler.run("image_embedder", "encode images", states)
        scaled = tokens.astype(jnp.float32) * scales[:, None, None]
        return {_TOKENS: scaled.sum(0, keepdims=True), _WEIGHT: scales.sum(keepdims=True)}

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return texts and images with positions; without images, as in calibration, texts."""
        if _TOKENS in conditions:
            others = {x: y for x, y in conditions.items() if x not in (_TOKENS, _WEIGHT)}
            texts, pooled = others["encoder_hidden_states"], others["pooled_projections"]
            weight, images = (conditions[x].astype(texts.dtype) for x in (_WEIGHT, _TOKENS))
            joined = jnp.concatenate([weight[:, None, None] * texts, images], axis=1)
            weighed = weight[:, None].astype(pooled.dtype) * pooled
            conditions = {**others, "encoder_hidden_states": joined, "pooled_projections": weighed}
        return super().prepare(model, conditions, canvas)


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components of a FLUX.1 Redux model don't fit, naming both sizes."""
    yield from misfits(configs, tokenizers)
    encoder, embedder = configs.get("image_encoder"), configs.get("image_embedder")
    transformer = configs.get("transformer")
    if encoder and embedder and embedder.redux_dim != encoder.hidden_size:
        yield (
            f"image_embedder takes {embedder.redux_dim} channels a patch, and image_encoder gives "
            f"{encoder.hidden_size}"
        )
    if transformer and embedder and embedder.txt_in_features != transformer.joint_attention_dim:
        yield (
            f"the transformer takes text tokens of {transformer.joint_attention_dim} channels, and "
            f"image_embedder gives {embedder.txt_in_features}"
        )


def _schedule_of(configs: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[str, str | None]:
    return ("redux" if configs["transformer"].guidance_embeds else "redux-schnell"), None


# The model card's 50 steps and guidance with dev; schnell is made for 4.
_SCHEDULES = {
    "redux": Schedule(
        name="FLUX.1 Redux's",
        scheduler=dev_scheduler(),
        defaults={"num_inference_steps": 50, "guidance_scale": 2.5},
    ),
    "redux-schnell": dataclasses.replace(
        FLUX.schedules["schnell"], name="FLUX.1 Redux's with schnell"
    ),
}
_SIGLIP_SO400M = SiglipVisionConfig(  # google/siglip-so400m-patch14-384
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
FLUX_REDUX = dataclasses.replace(
    FLUX,
    name="FLUX.1 Redux",
    pipelines=("FluxPriorReduxPipeline",),
    components={"image_encoder": SIGLIP_VISION, "image_embedder": REDUX, **FLUX.components},
    denoiser=FluxReduxDenoiser,
    schedules=_SCHEDULES,
    schedule_of=_schedule_of,
    schedule_like=lambda scheduler, index: (
        "redux" if scheduler.use_dynamic_shifting else "redux-schnell"
    ),
    misfits=_misfits,
    sizes={
        "flux1-redux-dev": {
            "image_encoder": _SIGLIP_SO400M,
            "image_embedder": ReduxConfig(),
            **FLUX.sizes["flux1-dev"],
        }
    },
)
