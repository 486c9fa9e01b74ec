"""Sizes of UNets, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.checkpoint_io import BLOCKS, WIDTHS, CheckpointError, check_bounds, config_from_json

# Of an image, which SDXL reads: original height and width, crop's top and left, target's.
SIZES = 6
_TIME_WIDENING = 4  # channels of the embedded time over those of the finest level
_SUPPORTED = {
    "act_fn": ("silu",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of a UNet."""

    width: int  # channels
    heads: int | None  # of attention behind each residual block; None for none
    depth: int = 0  # transformer blocks in each attention; 0 for attention to pixels alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetSizes:
    """What UNets share, with a text or without; the field names and defaults are diffusers'."""

    class_name: ClassVar[str]  # in diffusers
    attending: ClassVar[tuple[str, str]]  # types of blocks with attention, down and up
    middle: ClassVar[str]  # type of the block in the middle
    supported: ClassVar[Mapping[str, tuple]]
    patch_size: ClassVar[int] = 1  # latent pixels along one side of what its latents are cut into

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: int = 2  # residual blocks of a level on the way down; one more on that up
    sample_size: int | None = None  # latent pixels along a side that it was trained with
    norm_num_groups: int = 32
    norm_eps: float = 1e-5  # of the norms of residual blocks

    def __post_init__(self):
        sizes = ("in_channels", "out_channels", "block_out_channels", "norm_num_groups")
        check_bounds(self, **dict.fromkeys((*sizes, "sample_size"), WIDTHS))
        check_bounds(self, layers_per_block=(1, 8), norm_eps=(0, 1))
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not 1 <= len(widths) <= 8 or any(width % groups or width % 2 for width in widths):
            raise CheckpointError(
                f"{type(self).__name__}: block_out_channels = {list(widths)} must be 1 to 8 even "
                f"multiples of norm_num_groups = {groups}"
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        kinds = zip(("down", "up"), self.attending, strict=True)
        for (side, attending), plain in zip(kinds, ("DownBlock2D", "UpBlock2D"), strict=True):
            types = getattr(self, f"{side}_block_types")
            if len(types) != len(self.block_out_channels) or not {*types} <= {attending, plain}:
                raise CheckpointError(
                    f"{type(self).__name__}: {side}_block_types = {list(types)} is not supported; "
                    f"expected {attending} or {plain} for each of block_out_channels"
                )
        down, up = ([x in self.attending for x in types] for types in self._types)
        if down != up[::-1]:
            raise CheckpointError(
                f"{type(self).__name__}: up_block_types = {list(self.up_block_types)} must attend "
                f"where down_block_types = {list(self.down_block_types)} do"
            )

    @property
    def _types(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.down_block_types, self.up_block_types

    @property
    def time_channels(self) -> int:
        """Channels of the embedded time."""
        return _TIME_WIDENING * self.block_out_channels[0]

    @property
    def levels(self) -> tuple[Level, ...]:
        """The resolutions, finest first."""
        return tuple(
            self._level(i, kind in self.attending) for i, kind in enumerate(self.down_block_types)
        )

    @property
    def middle_level(self) -> Level:
        """The block in the middle, which always attends."""
        return self._level(len(self.block_out_channels) - 1, True)

    def _level(self, index: int, attends: bool) -> Level:
        """Return the level of a width."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        known = {"_class_name": (cls.class_name,), "mid_block_type": (cls.middle, None)}
        return config_from_json(cls, values, {**known, **_SUPPORTED, **cls.supported})

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers reads."""
        fixed = {name: allowed[0] for name, allowed in {**_SUPPORTED, **self.supported}.items()}
        named = {"_class_name": self.class_name, "mid_block_type": self.middle}
        return {**fixed, **named, **dataclasses.asdict(self)}


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
