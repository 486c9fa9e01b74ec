"""The image encoder of SigLIP (arXiv 2303.15343): a picture to a vector a patch.

Shapes: b batch, t patches, c hidden_size.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from models.attention import dot_product_attention, fused_mixture
from models.checkpoint_io import (
    BLOCKS,
    WIDTHS,
    CheckpointError,
    Rule,
    check_bounds,
    config_from_json,
)
from models.component import Component, Naming
from models.linear import Linear, Part

TELLING = "post_layernorm.weight"  # a tensor that every checkpoint has


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig:
    """Shape of a SigLIP image encoder; the field names and defaults are those of transformers."""

    hidden_size: int = 768  # width of the residual stream
    intermediate_size: int = 3072  # hidden width of the MLP
    num_hidden_layers: int = 12  # blocks
    num_attention_heads: int = 12  # attention heads
    num_channels: int = 3  # of a picture
    image_size: int = 224  # pixels along a side, which pictures are resized to
    patch_size: int = 16  # pixels along a side of a patch
    layer_norm_eps: float = 1e-6  # added to the variance before its root

    def __post_init__(self):
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_channels")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), num_hidden_layers=BLOCKS)
        check_bounds(self, image_size=(1, 8192), patch_size=(1, 8192), layer_norm_eps=(0, 1))
        if self.hidden_size % self.num_attention_heads or self.patch_size > self.image_size:
            raise CheckpointError(
                f"SiglipVisionConfig: hidden_size = {self.hidden_size} must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}, and patch_size = "
                f"{self.patch_size} at most image_size = {self.image_size}"
            )

    @property
    def patches(self) -> int:
        """Patches of a picture; pixels that are left over on the right and below are dropped."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SiglipVisionConfig":
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        supported = {"model_type": ("siglip_vision_model",), "hidden_act": ("gelu_pytorch_tanh",)}
        return config_from_json(cls, values, supported)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that transformers' SiglipVisionModel reads."""
        names = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
        fixed = {"hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
        return {**names, **fixed, **dataclasses.asdict(self)}


class SiglipVisionEncoder(nnx.Module):
    """Pictures to normed hidden states. The head that pools them isn't there.

    Args:
      config: the shape.
      rngs: random keys for the initial weights.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: SiglipVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, side = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embedding = nnx.Conv(
            config.num_channels, width, (side, side), (side, side), padding="VALID", **options
        )
        self.position_embedding = nnx.Embed(config.patches, width, **options)
        self.layers = nnx.List([_Layer(config, **options) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = _norm(config, **options)

    def __call__(
        self,
        pixels: jax.Array,  # [b, image_size, image_size, channels], in -1..1
    ) -> jax.Array:
        """Return the hidden states, [b, patches, hidden_size], row by row.

        Raises:
          ValueError: another shape.
        """
        side = self.config.image_size
        if pixels.shape[1:] != (side, side, self.config.num_channels):
            raise ValueError(
                f"pixels has shape {list(pixels.shape)}; expected [batch, {side}, {side}, "
                f"{self.config.num_channels}]"
            )
        x = self.patch_embedding(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position_embedding(jnp.arange(self.config.patches))
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class _Layer(nnx.Module):
    def __init__(self, config: SiglipVisionConfig, **options):
        width, hidden = config.hidden_size, config.intermediate_size
        linear = partial(Linear, **options)
        self.heads = config.num_attention_heads
        self.layer_norm1 = _norm(config, **options)
        self.qkv = linear(width, 3 * width, role="attention_in")
        self.out = linear(width, width, role="attention_out")
        self.mixtures = (fused_mixture((("qkv", "out"),), width, width // self.heads),)
        self.layer_norm2 = _norm(config, **options)
        self.fc1 = linear(width, hidden, role="mlp_in")
        self.fc2 = linear(hidden, width, role="mlp_out")

    def __call__(self, x):
        batch, patches, _ = x.shape
        qkv = self.qkv(self.layer_norm1(x)).reshape(batch, patches, 3, self.heads, -1)
        y = dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
        x = self.out(y.reshape(x.shape), residual=x)
        wide = self.fc1(self.layer_norm2(x))
        return self.fc2((Part(array=wide, size=wide.shape[-1], activation="gelu"),), residual=x)


def _norm(config: SiglipVisionConfig, **options) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, **options
    )


def to_pixels(images: Sequence[Image.Image], config: SiglipVisionConfig) -> np.ndarray:
    """Return pictures as transformers' SiglipImageProcessor prepares them, resized to a square.

    Returns:
      float32 [images, image_size, image_size, 3] in -1..1.
    """
    side = (config.image_size, config.image_size)
    resized = [x.convert("RGB").resize(side, Image.Resampling.BICUBIC) for x in images]
    return np.stack([np.asarray(x, np.float32) for x in resized]) / 127.5 - 1


def checkpoint_rules(config: SiglipVisionConfig, prefix: str = "vision_model.") -> list[Rule]:
    """Return the checkpoint's names, which have a prefix unless transformers 5 wrote them."""
    layer, there = r"layers\.(\d+)\.", prefix + r"encoder.layers.\1."
    qkv = tuple(f"{there}self_attn.{name}_proj" for name in "qkv")
    return [
        Rule(pattern="(.+_embedding)", sources=prefix + r"embeddings.\1"),
        Rule(pattern=layer + "qkv", sources=qkv, rows=(config.hidden_size,) * 3),
        Rule(pattern=layer + "out", sources=there + "self_attn.out_proj"),
        Rule(pattern=layer + "(fc[12])", sources=there + r"mlp.\2"),
        Rule(pattern=layer + "(layer_norm[12])", sources=there + r"\2"),
        Rule(pattern="post_layernorm", sources=prefix + "post_layernorm"),
    ]


def _rules(config: SiglipVisionConfig, names: Collection[str]) -> list[Rule]:
    bare = bool(names) and not any(name.startswith("vision_model.") for name in names)
    return checkpoint_rules(config, "" if bare else "vision_model.")


SIGLIP_VISION = Component(
    name="SigLIP image encoder",
    classes=("SiglipVisionModel",),
    library="transformers",
    config=SiglipVisionConfig,
    module=SiglipVisionEncoder,
    folder=Naming(
        telling=("vision_model." + TELLING, TELLING),
        rules=_rules,
        ignore=(r"(vision_model\.)?head\..+", r".*position_ids"),
    ),
)
