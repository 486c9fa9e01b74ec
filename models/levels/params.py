"""Names of the tensors that all UNets have, diffusers'."""

from collections.abc import Iterator

from models.checkpoint_io import Rule
from models.levels.config import UNetSizes


def block_names(config: UNetSizes) -> Iterator[tuple[str, str, int]]:
    """Yield our pattern of each block, its prefix in diffusers' names, and its width."""
    widths = config.block_out_channels
    for side, order in (("down_blocks", widths), ("up_blocks", widths[::-1])):
        for index, width in enumerate(order):
            yield rf"{side}\.{index}\.", f"{side}.{index}.", width
    yield r"mid_blocks\.0\.", "mid_block.", widths[-1]


def common_rules(config: UNetSizes) -> list[Rule]:
    """Return the rules of what all UNets have."""
    rules = list(embedder_rules("time_in", "time_embedding"))
    for ours, theirs, _ in block_names(config):
        resnet, to = ours + r"resnets\.(\d+)\.", theirs + r"resnets.\1."
        rules += [
            Rule(pattern=ours + "downsample", sources=theirs + "downsamplers.0.conv"),
            Rule(pattern=ours + "upsample", sources=theirs + "upsamplers.0.conv"),
            Rule(pattern=resnet + "time_proj", sources=to + "time_emb_proj"),
            Rule(pattern=resnet + "shortcut", sources=to + "conv_shortcut", convolution=True),
            Rule(pattern=resnet + "(.+)", sources=to + r"\2"),
        ]
    return rules


def embedder_rules(ours: str, theirs: str) -> Iterator[Rule]:
    """Yield the rules of two linears that embed a condition."""
    for index, name in enumerate(("in_layer", "out_layer"), 1):
        yield Rule(pattern=rf"{ours}\.{name}", sources=f"{theirs}.linear_{index}")
