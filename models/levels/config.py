"""Sizes of UNets, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.checkpoint_io import WIDTHS, CheckpointError, check_bounds, config_from_json

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
