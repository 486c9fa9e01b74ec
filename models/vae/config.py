"""Configurations of the autoencoders."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.checkpoint_io import WIDTHS, CheckpointError, check_bounds, config_from_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """What the convolutional autoencoders share; the field names are those of diffusers."""

    class_name: ClassVar[str]  # in diffusers
    # the values that other keys may have, and what is written for them: the first
    supported: ClassVar[Mapping[str, tuple]] = {"act_fn": ("silu",)}

    in_channels: int = 3  # of the image that is encoded
    out_channels: int = 3  # of the decoded image
    block_out_channels: tuple[int, ...] = (64,)  # width of each level, finest first
    layers_per_block: int = 1  # residual blocks a level; the decoder has one more
    latent_channels: int = 4  # of the latents
    norm_num_groups: int = 32  # groups of every norm
    use_quant_conv: bool = True  # 1x1 convolution after the encoder
    use_post_quant_conv: bool = True  # 1x1 convolution before the decoder
    mid_block_add_attention: bool = True  # attention at the coarsest level

    def __post_init__(self):
        sizes = ("in_channels", "out_channels", "block_out_channels", "latent_channels")
        check_bounds(self, **dict.fromkeys((*sizes, "norm_num_groups"), WIDTHS))
        check_bounds(self, layers_per_block=(1, 8))
        self._check_widths("block_out_channels", self.block_out_channels)

    def _check_widths(self, name: str, widths: tuple[int, ...]) -> None:
        groups = self.norm_num_groups
        if not 1 <= len(widths) <= 8 or any(width % groups for width in widths):
            raise CheckpointError(
                f"{type(self).__name__}: {name} = {list(widths)} must be 1 to 8 "
                f"multiples of norm_num_groups = {groups}"
            )

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Width of each level of the decoder, finest first."""
        return self.block_out_channels

    @property
    def encoded_channels(self) -> int:
        """Channels of what the encoder gives: mean and logarithm of the variance."""
        return 2 * self.latent_channels

    @property
    def downsampling(self) -> int:
        """Image pixels along one side of a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from a parsed config.json; raises CheckpointError on what isn't supported."""
        config = config_from_json(cls, values, cls.supported)
        for key, supported in config._block_types().items():
            if values.get(key, supported) != supported:
                raise CheckpointError(
                    f"{cls.__name__}: {key} = {values[key]!r} is not supported; expected "
                    f"{supported}"
                )
        return config

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers reads."""
        fixed = {"_class_name": self.class_name, "act_fn": "silu"}
        return {**fixed, **self._block_types(), **dataclasses.asdict(self)}

    def _block_types(self) -> dict[str, list[str]]:
        levels = len(self.block_out_channels)
        return {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(_Config):
    """Shape of an AutoencoderKL: SD's and SDXL's with 4 channels, FLUX.1's and SD3's with 16."""

    class_name: ClassVar[str] = "AutoencoderKL"
    supported: ClassVar[Mapping[str, tuple]] = {
        **_Config.supported,
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    scaling_factor: float = 0.18215  # diffusion runs on (latents - shift_factor) * scaling_factor
    shift_factor: float | None = None  # None: no shift

    def __post_init__(self):
        super().__post_init__()
        check_bounds(self, scaling_factor=(1e-9, 1e9), shift_factor=(-1e9, 1e9))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLFlux2Config(_Config):
    """Shape of FLUX.2's autoencoder; the defaults are those of diffusers, and of every FLUX.2."""

    class_name: ClassVar[str] = "AutoencoderKLFlux2"
    supported: ClassVar[Mapping[str, tuple]] = {
        **_Config.supported,
        "patch_size": ([2, 2], (2, 2)),
    }

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None  # block_out_channels if None
    layers_per_block: int = 2
    latent_channels: int = 32
    batch_norm_eps: float = 1e-4  # added to the variance of the packed latents

    def __post_init__(self):
        super().__post_init__()
        check_bounds(self, batch_norm_eps=(0, 1), decoder_block_out_channels=WIDTHS)
        self._check_widths("decoder_block_out_channels", self.decoder_widths)
        if len(self.decoder_widths) != len(self.block_out_channels):
            raise CheckpointError(
                f"AutoencoderKLFlux2Config: decoder_block_out_channels = "
                f"{list(self.decoder_widths)} must have as many levels as block_out_channels = "
                f"{list(self.block_out_channels)}"
            )

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Width of each level of the decoder, finest first."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def packed_channels(self) -> int:
        """Channels of packed latents."""
        return 4 * self.latent_channels

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers reads."""
        return {**super().to_json(), "patch_size": [2, 2]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQModelConfig(_Config):
    """Shape of an autoencoder whose latents are entries of a codebook."""

    class_name: ClassVar[str] = "VQModel"
    supported: ClassVar[Mapping[str, tuple]] = {
        **_Config.supported,
        "norm_type": ("group",),
        "lookup_from_codebook": (False,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    }

    latent_channels: int = 3
    sample_size: int = 32  # pixels along a side that it was trained with
    num_vq_embeddings: int = 256  # entries of the codebook
    vq_embed_dim: int | None = None  # channels of an entry; those of latents if None
    scaling_factor: float = 0.18215  # diffusion runs on latents times this

    def __post_init__(self):
        super().__post_init__()
        check_bounds(self, **dict.fromkeys(("num_vq_embeddings", "vq_embed_dim"), WIDTHS))
        check_bounds(self, sample_size=WIDTHS, scaling_factor=(1e-9, 1e9))

    @property
    def encoded_channels(self) -> int:
        """Channels of what the encoder gives: latents."""
        return self.latent_channels

    @property
    def entry_channels(self) -> int:
        """Channels of an entry of the codebook, which diffusion runs on."""
        return self.vq_embed_dim or self.latent_channels

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers reads."""
        values = super().to_json()
        ours = ("use_quant_conv", "use_post_quant_conv")
        return {key: value for key, value in values.items() if key not in ours}
