"""Sizes of a Z-Image transformer, in the words of a diffusers config.json."""

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

_CLASS = "ZImageTransformer2DModel"
_CONDITION = 256  # channels of the condition, at most
# What other variants have and this model doesn't: several patch sizes, SigLIP's tokens (Omni).
_SUPPORTED = {"_class_name": (_CLASS,), "siglip_feat_dim": (None,), "qk_norm": (True,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZImageConfig:
    """Sizes of one transformer; the defaults are those of Z-Image and Z-Image-Turbo."""

    all_patch_size: tuple[int, ...] = (2,)  # latent pixels along one side of a token
    all_f_patch_size: tuple[int, ...] = (1,)  # frames of a token
    in_channels: int = 16  # of the latents
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2  # of each kind, before the layers
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5  # of the norms around attention and MLP
    cap_feat_dim: int = 2560  # channels of the text tokens
    rope_theta: float = 256.0  # base of the positions' frequencies
    t_scale: float = 1000.0  # of the timestep, before its embedding
    axes_dims: tuple[int, ...] = (32, 48, 48)  # channels of a head that each position axis turns
    axes_lens: tuple[int, ...] = (1024, 512, 512)  # positions on each axis; of diffusers' tables

    def __post_init__(self):
        sizes = ("all_patch_size", "in_channels", "dim", "n_heads", "cap_feat_dim", "axes_dims")
        check_bounds(self, **dict.fromkeys(sizes, WIDTHS))
        check_bounds(self, n_layers=BLOCKS, n_refiner_layers=BLOCKS, norm_eps=(0, 1))
        check_bounds(self, rope_theta=(1, 10**9), t_scale=(1e-6, 10**9))
        self._check_patches()
        if self.n_kv_heads != self.n_heads or self.dim % self.n_heads:
            raise CheckpointError(
                f"n_heads {self.n_heads} and n_kv_heads {self.n_kv_heads} must be the same and "
                f"divide dim {self.dim}"
            )
        axes, head = self.axes_dims, self.dim // self.n_heads
        if len(axes) != 3 or sum(axes) != head or any(dim % 2 for dim in axes):
            raise CheckpointError(
                f"axes_dims {axes} must be three even numbers that add up to dim / n_heads, {head}"
            )

    def _check_patches(self) -> None:
        if len(self.all_patch_size) != 1 or self.all_f_patch_size != (1,):
            raise CheckpointError(
                f"all_patch_size {self.all_patch_size} with all_f_patch_size "
                f"{self.all_f_patch_size} is not supported; expected one size, and (1,)"
            )

    @property
    def patch_size(self) -> int:
        """Latent pixels along one side of a token."""
        return self.all_patch_size[0]

    @property
    def token_channels(self) -> int:
        """Channels of a token of the image, before and behind the transformer."""
        return self.patch_size**2 * self.in_channels

    @property
    def condition_size(self) -> int:
        """Channels of the condition that time becomes."""
        return min(self.dim, _CONDITION)

    @property
    def mlp_size(self) -> int:
        """Channels inside an MLP, behind its gate."""
        return int(self.dim / 3 * 8)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ZImageConfig":
        """Build from the parsed config.json of a diffusers ZImageTransformer2DModel.

        Raises:
          CheckpointError: the config is of another class or variant, or a size is out of range.
        """
        return config_from_json(cls, values, _SUPPORTED)

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers would write."""
        fixed = {"_class_name": _CLASS, "siglip_feat_dim": None, "qk_norm": True}
        return fixed | dataclasses.asdict(self)
