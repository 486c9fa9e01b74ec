"""Sizes of UNets that read a text, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from models.checkpoint_io import BLOCKS, WIDTHS, CheckpointError, check_bounds
from models.levels.config import Level, UNetSizes

# Of an image, which SDXL reads: original height and width, crop's top and left, target's.
SIZES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConditionConfig(UNetSizes):
    """Sizes of a UNet that reads a text: SD's and SDXL's; the defaults are SD 1.4's."""

    class_name: ClassVar[str] = "UNet2DConditionModel"
    attending: ClassVar[tuple[str, str]] = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    middle: ClassVar[str] = "UNetMidBlock2DCrossAttn"
    supported: ClassVar[Mapping[str, tuple]] = {
        "addition_embed_type": ("text_time", None),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "num_attention_heads": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "timestep_post_act": (None,),
    }

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    cross_attention_dim: int = 1280  # channels of text tokens
    # heads, in all of these models (huggingface/diffusers#2011); of each level, or of all
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1  # of each level, or of all
    use_linear_projection: bool = False  # stored: linears around transformer blocks, or 1x1 kernels
    upcast_attention: bool | None = False  # no matter here: softmax is float32 always
    # "text_time": a pooled text and sizes join the time (arXiv 2307.01952, section 2.2)
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None  # channels of each size, embedded
    projection_class_embeddings_input_dim: int | None = None  # of all sizes and the pooled text

    def __post_init__(self):
        super().__post_init__()
        check_bounds(self, cross_attention_dim=WIDTHS, attention_head_dim=WIDTHS)
        check_bounds(self, transformer_layers_per_block=(1, BLOCKS[1]))
        check_bounds(self, addition_time_embed_dim=WIDTHS)
        check_bounds(self, projection_class_embeddings_input_dim=WIDTHS)
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            self._check_each(name, getattr(self, name))
        for level in (*self.levels, self.middle_level):
            if level.heads is not None and level.width % level.heads:
                raise CheckpointError(
                    f"UNetConditionConfig: attention_head_dim = {self.attention_head_dim} must be "
                    f"numbers of heads that divide block_out_channels = "
                    f"{list(self.block_out_channels)}"
                )
        if self.addition_embed_type is not None and self.pooled_channels < 1:
            raise CheckpointError(
                f"UNetConditionConfig: projection_class_embeddings_input_dim = "
                f"{self.projection_class_embeddings_input_dim} must be more than six times "
                f"addition_time_embed_dim = {self.addition_time_embed_dim}"
            )

    def _check_each(self, name: str, value: Any) -> None:
        if isinstance(value, tuple) and len(value) != len(self.block_out_channels):
            raise CheckpointError(
                f"UNetConditionConfig: {name} = {list(value)} must be one number, or one for each "
                f"of block_out_channels = {list(self.block_out_channels)}"
            )

    @property
    def pooled_channels(self) -> int:
        """Channels of the pooled text that joins the time; 0 for none."""
        whole, each = self.projection_class_embeddings_input_dim, self.addition_time_embed_dim
        return (whole or 0) - SIZES * (each or 0) if self.addition_embed_type else 0

    def _level(self, index: int, attends: bool) -> Level:
        width = self.block_out_channels[index]
        if not attends:
            return Level(width=width, heads=None)
        heads, depth = self.attention_head_dim, self.transformer_layers_per_block
        heads = heads[index] if isinstance(heads, tuple) else heads
        depth = depth[index] if isinstance(depth, tuple) else depth
        return Level(width=width, heads=heads, depth=depth)
