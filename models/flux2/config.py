"""Sizes of a FLUX.2 transformer, in the words of a diffusers config.json."""

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

_CLASS = "Flux2Transformer2DModel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux2Config:
    """Sizes of one transformer; the defaults are those of FLUX.2-dev, as diffusers has them."""

    patch_size: int = 1  # the last linear gives patch_size**2 * out_channels channels a token
    in_channels: int = 128  # channels of a packed latent token
    out_channels: int | None = None  # in_channels if None
    num_layers: int = 8  # double-stream blocks
    num_single_layers: int = 48  # single-stream blocks
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360  # channels of the text tokens
    timestep_guidance_channels: int = 256  # of the sinusoidal embedding of timestep and guidance
    mlp_ratio: float = 3.0  # of an MLP's inner width to the tokens'
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)  # channels that each position axis turns
    rope_theta: int = 2000  # base of the positions' frequencies
    eps: float = 1e-6  # of every norm
    guidance_embeds: bool = True  # False for klein, which takes no distilled guidance

    def __post_init__(self):
        sizes = ("in_channels", "out_channels", "attention_head_dim", "num_attention_heads")
        sizes = (*sizes, "joint_attention_dim", "timestep_guidance_channels", "axes_dims_rope")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), patch_size=(1, 64))
        check_bounds(self, num_layers=BLOCKS, num_single_layers=BLOCKS, mlp_ratio=(0.01, 64))
        check_bounds(self, rope_theta=(1, 10**9), eps=(0, 1))
        axes = self.axes_dims_rope
        if len(axes) != 4 or sum(axes) != self.attention_head_dim or any(dim % 2 for dim in axes):
            raise CheckpointError(
                f"axes_dims_rope {axes} must be four even numbers that add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )

    @property
    def hidden_size(self) -> int:
        """Channels of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_size(self) -> int:
        """Channels inside an MLP, behind its gate."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def token_channels(self) -> int:
        """Channels of an output token."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Flux2Config":
        """Build from the parsed config.json of a diffusers Flux2Transformer2DModel.

        Raises:
          CheckpointError: the config is of another class, or a size is out of range.
        """
        return config_from_json(cls, values, {"_class_name": (_CLASS,)})

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers would write."""
        return {"_class_name": _CLASS, **dataclasses.asdict(self)}
