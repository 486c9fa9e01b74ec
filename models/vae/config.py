"""Configuration of the autoencoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.checkpoint_io import WIDTHS, CheckpointError, check_bounds, config_from_json

_SUPPORTED = {"act_fn": ("silu",), "latents_mean": (None,), "latents_std": (None,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Shape of an AutoencoderKL; the field names and defaults are those of diffusers."""

    in_channels: int = 3  # of the image that is encoded
    out_channels: int = 3  # of the decoded image
    block_out_channels: tuple[int, ...] = (64,)  # width of each level, finest first
    layers_per_block: int = 1  # residual blocks a level; the decoder has one more
    latent_channels: int = 4  # of the latents
    norm_num_groups: int = 32  # groups of every norm
    scaling_factor: float = 0.18215  # diffusion runs on (latents - shift_factor) * scaling_factor
    shift_factor: float | None = None  # None: no shift
    use_quant_conv: bool = True  # 1x1 convolution after the encoder
    use_post_quant_conv: bool = True  # 1x1 convolution before the decoder
    mid_block_add_attention: bool = True  # attention at the coarsest level

    def __post_init__(self):
        sizes = ("in_channels", "out_channels", "block_out_channels", "latent_channels")
        check_bounds(self, **dict.fromkeys((*sizes, "norm_num_groups"), WIDTHS))
        check_bounds(self, layers_per_block=(1, 8), scaling_factor=(1e-9, 1e9))
        check_bounds(self, shift_factor=(-1e9, 1e9))
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not 1 <= len(widths) <= 8 or any(width % groups for width in widths):
            raise CheckpointError(
                f"AutoencoderKLConfig: block_out_channels = {list(widths)} must be 1 to 8 "
                f"multiples of norm_num_groups = {groups}"
            )

    @property
    def downsampling(self) -> int:
        """Image pixels along one side of a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        config = config_from_json(cls, values, _SUPPORTED)
        for key, supported in config._block_types().items():
            if values.get(key, supported) != supported:
                raise CheckpointError(
                    f"AutoencoderKLConfig: {key} = {values[key]!r} is not supported; expected "
                    f"{supported}"
                )
        return config

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers' AutoencoderKL reads."""
        fixed = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
        return {**fixed, **self._block_types(), **dataclasses.asdict(self)}

    def _block_types(self) -> dict[str, list[str]]:
        levels = len(self.block_out_channels)
        return {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
