"""Sizes of a DiT, in the words of a diffusers config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.checkpoint_io import BLOCKS, WIDTHS, CheckpointError, check_bounds, config_from_json

_CLASS = "DiTTransformer2DModel"
FORMER_CLASS = "Transformer2DModel"  # of several kinds of transformer, in published files
_SUPPORTED = {
    "_class_name": (_CLASS, FORMER_CLASS),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_zero",),
    "upcast_attention": (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of one transformer; the defaults are those of DiT-XL/2 but for what it learns of noise.

    DiT-XL/2 has out_channels 8: noise, then how its variance lies between two bounds.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4  # of the latents
    out_channels: int | None = None  # in_channels if None
    num_layers: int = 28
    sample_size: int = 32  # latent pixels along a side, which positions are made for
    patch_size: int = 2  # latent pixels along one side of a token
    num_embeds_ada_norm: int = 1000  # classes; one more stands for none
    norm_eps: float = 1e-5  # of the norm before an MLP

    def __post_init__(self):
        sizes = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
        sizes = (*sizes, "sample_size", "patch_size", "num_embeds_ada_norm")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS), num_layers=BLOCKS, norm_eps=(0, 1))
        if self.hidden_size % 4 or self.sample_size % self.patch_size:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} * attention_head_dim "
                f"{self.attention_head_dim} must be a multiple of 4, and sample_size "
                f"{self.sample_size} one of patch_size {self.patch_size}"
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
    def from_json(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """Build from the parsed config.json of a diffusers DiTTransformer2DModel.

        Raises:
          CheckpointError: the config is of another class or variant, or a size is out of range.
        """
        return config_from_json(cls, values, _SUPPORTED)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers would write."""
        fixed = {name: allowed[0] for name, allowed in _SUPPORTED.items()}
        return fixed | dataclasses.asdict(self)
