"""Sizes of a FLUX.1 transformer, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.checkpoint_io import (
    BLOCKS,
    WIDTHS,
    CheckpointError,
    check_bounds,
    config_from_json,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of one transformer; the defaults are those of FLUX.1-schnell."""

    patch_size: int = 1  # the last linear gives patch_size**2 * out_channels channels a token
    in_channels: int = 64  # channels of a packed latent token
    out_channels: int | None = None  # in_channels if None
    num_layers: int = 19  # double-stream blocks
    num_single_layers: int = 38  # single-stream blocks
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # channels of the text tokens
    pooled_projection_dim: int = 768  # channels of the pooled text vector
    guidance_embeds: bool = False  # True for guidance-distilled models (dev)
    axes_dims_rope: tuple[int, ...] = (
        16,
        56,
        56,
    )  # channels of a head that each position axis turns

    def __post_init__(self):
        sizes = ("in_channels", "out_channels", "attention_head_dim", "num_attention_heads")
        sizes = (*sizes, "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), patch_size=(1, 64))
        check_bounds(self, num_layers=BLOCKS, num_single_layers=BLOCKS)
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(dim % 2 for dim in axes):
            raise CheckpointError(
                f"axes_dims_rope {axes} must be three even numbers that add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )

    @property
    def hidden_size(self) -> int:
        """Channels of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_channels(self) -> int:
        """Channels of an output token."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FluxConfig":
        """Build from the parsed config.json of a diffusers FluxTransformer2DModel.

        Raises:
          CheckpointError: the config is of another class.
        """
        return config_from_json(cls, values, {"_class_name": ("FluxTransformer2DModel",)})

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers would write."""
        return {"_class_name": "FluxTransformer2DModel", **dataclasses.asdict(self)}
