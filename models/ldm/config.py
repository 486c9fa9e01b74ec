"""Sizes of a UNet without text, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from models.checkpoint_io import WIDTHS, CheckpointError, check_bounds
from models.levels.config import Level, UNetSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(UNetSizes):
    """Sizes of a UNet without text; the defaults are those of CompVis/ldm-celebahq-256."""

    class_name: ClassVar[str] = "UNet2DModel"
    attending: ClassVar[tuple[str, str]] = ("AttnDownBlock2D", "AttnUpBlock2D")
    middle: ClassVar[str] = "UNetMidBlock2D"
    supported: ClassVar[Mapping[str, tuple]] = {
        "add_attention": (True,),
        "attn_norm_num_groups": (None,),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
    }

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    attention_head_dim: int | None = 8  # channels of a head; one head if None

    def __post_init__(self):
        super().__post_init__()
        check_bounds(self, attention_head_dim=WIDTHS)
        size = self.attention_head_dim or 1
        wrong = [x.width for x in (*self.levels, self.middle_level) if x.heads and x.width % size]
        if wrong:
            raise CheckpointError(
                f"UNetConfig: attention_head_dim = {size} must divide block_out_channels, of which "
                f"{wrong[0]} is one"
            )

    def _level(self, index: int, attends: bool) -> Level:
        width = self.block_out_channels[index]
        heads = width // self.attention_head_dim if self.attention_head_dim else 1
        return Level(width=width, heads=heads if attends else None)
