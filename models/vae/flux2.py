"""FLUX.2's autoencoder: its component, and the sizes that a file in the original naming tells."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from models.component import Component
from models.vae.config import AutoencoderKLFlux2Config
from models.vae.modeling import AutoencoderKLFlux2
from models.vae.params import AUTOENCODER_KL, bfl_sizes, level_widths

_IGNORE = (r"bn\.num_batches_tracked",)  # how long torch counted


def config_from_bfl(
    shapes: Mapping[str, tuple[int, ...]], path: Path | str = ""
) -> AutoencoderKLFlux2Config:
    """Return the sizes that a file in Black Forest Labs' naming has; it brings no config.json.

    Args:
      shapes: its tensors'.
      path: of the file, for errors.

    Raises:
      CheckpointError: a tensor that tells a size is missing.
    """
    widths, decoder = level_widths("encoder.down", shapes), level_widths("decoder.up", shapes)
    return AutoencoderKLFlux2Config(
        **bfl_sizes(shapes, path, "FLUX.2"),
        block_out_channels=widths,
        decoder_block_out_channels=None if decoder == widths else decoder,
        use_quant_conv="encoder.quant_conv.weight" in shapes,
        use_post_quant_conv="decoder.post_quant_conv.weight" in shapes,
    )


AUTOENCODER_KL_FLUX2 = Component(
    name="FLUX.2 autoencoder",
    classes=("AutoencoderKLFlux2",),
    library="diffusers",
    config=AutoencoderKLFlux2Config,
    module=AutoencoderKLFlux2,
    folder=dataclasses.replace(AUTOENCODER_KL.folder, ignore=_IGNORE),
    file=dataclasses.replace(
        AUTOENCODER_KL.file, telling="bn.running_mean", ignore=_IGNORE, config=config_from_bfl
    ),
)
