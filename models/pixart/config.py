"""Sizes of a PixArt transformer, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.checkpoint_io import BLOCKS, WIDTHS, CheckpointError, check_bounds, config_from_json

_CLASS = "PixArtTransformer2DModel"
FORMER_CLASS = "Transformer2DModel"  # of several kinds of transformer, in published files
_SUPPORTED = {
    "_class_name": (_CLASS, FORMER_CLASS),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default",),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_single",),
    "upcast_attention": (False,),
    "use_additional_conditions": (False, None),
}
_ALPHA = 128  # sample_size whose models, of PixArt-Alpha, read resolutions unless told otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """Sizes of one transformer; the defaults are those of PixArt-Sigma at 1024 pixels."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4  # of the latents
    out_channels: int | None = 8  # noise, then what was learned of its variance; None: in_channels
    num_layers: int = 28
    cross_attention_dim: int = 1152  # the hidden size
    caption_channels: int = 4096  # channels of the text tokens
    sample_size: int = 128  # latent pixels along a side, which positions are made for
    patch_size: int = 2  # latent pixels along one side of a token
    interpolation_scale: float | None = (
        None  # by which positions lie closer; by sample_size if None
    )
    norm_eps: float = 1e-6  # of the norms in blocks

    def __post_init__(self):
        sizes = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
        sizes = (*sizes, "sample_size", "patch_size", "caption_channels")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), num_layers=BLOCKS, norm_eps=(0, 1))
        check_bounds(self, interpolation_scale=(1e-3, 1e3))
        if self.hidden_size % 4 or self.sample_size % self.patch_size:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} * attention_head_dim "
                f"{self.attention_head_dim} must be a multiple of 4, and sample_size "
                f"{self.sample_size} one of patch_size {self.patch_size}"
            )
        if self.cross_attention_dim != self.hidden_size:
            raise CheckpointError(
                f"cross_attention_dim is {self.cross_attention_dim}; it must be "
                f"num_attention_heads * attention_head_dim, {self.hidden_size}"
            )

    @property
    def hidden_size(self) -> int:
        """Channels of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_channels(self) -> int:
        """Channels of an output token."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)

    @property
    def position_scale(self) -> float:
        """By which positions lie closer than whole numbers."""
        return self.interpolation_scale or max(self.sample_size // 64, 1)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PixArtConfig":
        """Build from the parsed config.json of a diffusers PixArtTransformer2DModel.

        Raises:
          CheckpointError: the config is of another class or variant, or a size is out of range.
        """
        config = config_from_json(cls, values, _SUPPORTED)
        if values.get("use_additional_conditions") is None and config.sample_size == _ALPHA:
            raise CheckpointError(
                "PixArtConfig: use_additional_conditions isn't false, so this is PixArt-Alpha at "
                "1024 pixels, which is not supported"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers would write."""
        fixed = {name: allowed[0] for name, allowed in _SUPPORTED.items()}
        return fixed | dataclasses.asdict(self)
