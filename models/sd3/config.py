"""Sizes of an SD3 transformer, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.checkpoint_io import BLOCKS, WIDTHS, CheckpointError, check_bounds, config_from_json

_SUPPORTED = {"_class_name": ("SD3Transformer2DModel",), "qk_norm": (None, "rms_norm")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SD3Config:
    """Sizes of one transformer; the defaults are those of SD3 medium."""

    sample_size: int = 128  # latent pixels along a side that it draws by default
    patch_size: int = 2  # latent pixels along one side of a token
    in_channels: int = 16  # of the latents
    out_channels: int | None = 16  # in_channels if None
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # channels of the text tokens
    caption_projection_dim: int = 1536  # the hidden size
    pooled_projection_dim: int = 2048  # channels of the pooled text vector
    pos_embed_max_size: int = 192  # tokens along a side of the grid of positions
    dual_attention_layers: tuple[int, ...] = ()  # blocks whose image tokens attend once more, alone
    qk_norm: str | None = None  # "rms_norm" in SD3.5: of queries and keys

    def __post_init__(self):
        sizes = ("sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim")
        sizes = (*sizes, "num_attention_heads", "joint_attention_dim", "caption_projection_dim")
        sizes = (*sizes, "pooled_projection_dim", "pos_embed_max_size")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), num_layers=BLOCKS)
        check_bounds(self, dual_attention_layers=(0, self.num_layers - 1))
        if self.caption_projection_dim != self.hidden_size:
            raise CheckpointError(
                f"caption_projection_dim is {self.caption_projection_dim}; it must be "
                f"num_attention_heads * attention_head_dim, {self.hidden_size}"
            )
        if self.attention_head_dim % 2:
            raise CheckpointError(
                f"attention_head_dim is {self.attention_head_dim}; it must be even"
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
    def from_json(cls, values: Mapping[str, Any]) -> "SD3Config":
        """Build from the parsed config.json of a diffusers SD3Transformer2DModel.

        Raises:
          CheckpointError: the config is of another class or variant, or a size is out of range.
        """
        return config_from_json(cls, values, _SUPPORTED)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers would write."""
        return {"_class_name": "SD3Transformer2DModel", **dataclasses.asdict(self)}
