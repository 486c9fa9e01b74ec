"""Checkpoint names of the autoencoder, diffusers' and Black Forest Labs'."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoint_io import Rule
from models.component import Component, Naming
from models.stored_files import CheckpointError
from models.vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, VQModelConfig
from models.vae.modeling import AutoencoderKL, VQModel

# A tensor of Black Forest Labs' naming that every checkpoint has.
TELLING = "decoder.up.0.block.0.norm1.weight"
_ATTENTION = r"(.+\.mid_block)\.attention\."

RULES = (
    Rule(pattern=_ATTENTION + "to_out", sources=r"\1.attentions.0.to_out.0"),
    Rule(pattern=_ATTENTION + "(.+)", sources=r"\1.attentions.0.\2"),
    Rule(pattern=r"(.+)\.downsample", sources=r"\1.downsamplers.0.conv"),
    Rule(pattern=r"(.+)\.upsample", sources=r"\1.upsamplers.0.conv"),
)

# Files of early diffusers releases name the attention's projections otherwise.
_OLD_RULES = (
    *(
        Rule(pattern=_ATTENTION + ours, sources=rf"\1.attentions.0.{theirs}")
        for ours, theirs in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            "to_out": "proj_attn",
        }.items()
    ),
    *RULES,
)


def bfl_rules(config: AutoencoderKLConfig | AutoencoderKLFlux2Config) -> list[Rule]:
    """Return the rules to the names of Black Forest Labs' ae.safetensors.

    They are those of latent diffusion (`src/flux/modules/autoencoder.py` of
    github.com/black-forest-labs/flux): the decoder's levels count from the finest, and attention's
    projections are 1x1 convolutions. FLUX.2's have the quant convolutions inside of encoder and
    decoder (`src/flux2/autoencoder.py` of github.com/black-forest-labs/flux2).
    """
    last = len(config.block_out_channels) - 1
    down, up, mid = r"encoder\.down_blocks\.(\d+)\.", r"decoder\.up_blocks\.", r"(.+)\.mid_block\."
    levels = [(rf"{up}{level}\.", f"decoder.up.{last - level}.") for level in range(last + 1)]
    table = [
        (down + r"resnets\.(\d+)\.conv_shortcut", r"encoder.down.\1.block.\2.nin_shortcut"),
        *(
            (ours + r"resnets\.(\d+)\.conv_shortcut", theirs + r"block.\1.nin_shortcut")
            for ours, theirs in levels
        ),
        (down + r"resnets\.(\d+)\.(.+)", r"encoder.down.\1.block.\2.\3"),
        (down + "downsample", r"encoder.down.\1.downsample.conv"),
        *((ours + r"resnets\.(\d+)\.(.+)", theirs + r"block.\1.\2") for ours, theirs in levels),
        *((ours + "upsample", theirs + "upsample.conv") for ours, theirs in levels),
        (mid + r"resnets\.0\.(.+)", r"\1.mid.block_1.\2"),
        (mid + r"resnets\.1\.(.+)", r"\1.mid.block_2.\2"),
        (mid + r"attention\.group_norm", r"\1.mid.attn_1.norm"),
        (r"(.+)\.conv_norm_out", r"\1.norm_out"),
    ]
    if isinstance(config, AutoencoderKLFlux2Config):
        table += [("quant_conv", "encoder.quant_conv")]
        table += [("post_quant_conv", "decoder.post_quant_conv")]
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    return [
        *(Rule(pattern=pattern, sources=source) for pattern, source in table),
        *(
            Rule(
                pattern=rf"{mid}attention\.{ours}",
                sources=rf"\1.mid.attn_1.{theirs}",
                convolution=True,
            )
            for ours, theirs in attention.items()
        ),
    ]


def config_from_bfl(
    shapes: Mapping[str, tuple[int, ...]], path: Path | str = ""
) -> AutoencoderKLConfig:
    """Return the sizes that a file in Black Forest Labs' naming has; it brings no config.json.

    Scaling and shift are those of FLUX.1, `src/flux/util.py` of github.com/black-forest-labs/flux.

    Args:
      shapes: its tensors'.
      path: of the file, for errors.

    Raises:
      CheckpointError: a tensor that tells a size is missing.
    """
    return AutoencoderKLConfig(
        **bfl_sizes(shapes, path, "FLUX.1"),
        block_out_channels=level_widths("encoder.down", shapes),
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


def bfl_sizes(
    shapes: Mapping[str, tuple[int, ...]], path: Path | str, family: str
) -> dict[str, Any]:
    """Return the sizes that any autoencoder in this naming tells in the same way."""
    telling = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    if missing := [name for name in telling if name not in shapes]:
        raise CheckpointError(
            f"{path}: no {family} autoencoder: missing {'; missing '.join(missing)}"
        )
    if misshapen := [name for name in telling if len(shapes[name]) != 4]:
        raise CheckpointError(f"{path}: no {family} autoencoder: misshapen {', '.join(misshapen)}")
    block = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    image, latent, out = (shapes[name] for name in telling)
    return {
        "in_channels": image[1],
        "out_channels": out[0],
        "layers_per_block": sum(bool(block.fullmatch(name)) for name in shapes),
        "latent_channels": latent[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def level_widths(half: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the width of each level of one half, finest first."""
    first = re.compile(rf"{re.escape(half)}\.(\d+)\.block\.0\.conv1\.weight")
    levels = sorted((int(m[1]), shapes[m[0]][:1]) for m in map(first.fullmatch, shapes) if m)
    return tuple(size for _, width in levels for size in width)


def _diffusers_rules(config: Any, names: Collection[str]) -> Sequence[Rule]:
    old = any(name.endswith(".proj_attn.weight") for name in names)
    return _OLD_RULES if old else RULES


AUTOENCODER_KL = Component(
    name="autoencoder",
    classes=("AutoencoderKL",),
    library="diffusers",
    config=AutoencoderKLConfig,
    module=AutoencoderKL,
    folder=Naming(telling="decoder.conv_in.weight", rules=_diffusers_rules),
    file=Naming(
        telling=TELLING,
        rules=lambda config, names: bfl_rules(config),
        config=config_from_bfl,
        dtype="F32",
    ),
)


def _vq_rules(config: VQModelConfig, names: Collection[str]) -> list[Rule]:
    codebook = Rule(pattern="codebook", sources="quantize.embedding")
    return [codebook, *_diffusers_rules(config, names)]


VQ_MODEL = Component(
    name="VQ autoencoder",
    classes=("VQModel",),
    library="diffusers",
    config=VQModelConfig,
    module=VQModel,
    folder=Naming(telling="quantize.embedding.weight", rules=_vq_rules),
)
