"""Names of the tensors of a UNet without text, diffusers'."""

import re
from collections.abc import Collection
from typing import Any

from models.checkpoint_io import Rule
from models.component import Component, Naming
from models.ldm.config import UNetConfig
from models.ldm.modeling import UNet
from models.levels.params import block_names, common_rules

# Files of early diffusers releases name the projections of attention to pixels otherwise.
_NEW = {"qkv": ("to_q", "to_k", "to_v"), "proj": "to_out.0"}
_OLD = {"qkv": ("query", "key", "value"), "proj": "proj_attn"}


def diffusers_rules(config: UNetConfig, names: Collection[str] = ()) -> list[Rule]:
    """Return the rules from our module paths to those of diffusers' UNet2DModel.

    Args:
      config: of the model.
      names: of the tensors that are there, which tell how old the file is.
    """
    old = any(re.search(r"\.proj_attn\.", name) for name in names)
    table: dict[str, Any] = _OLD if old else _NEW
    rules = []
    for ours, theirs, width in block_names(config):
        attention, to = ours + r"attentions\.(\d+)\.", theirs + r"attentions.\1."
        joined = tuple(to + name for name in table["qkv"])
        rules += [
            Rule(pattern=attention + "qkv", sources=joined, rows=(width,) * 3),
            Rule(pattern=attention + "proj", sources=to + table["proj"]),
            Rule(pattern=attention + "norm", sources=to + "group_norm"),
        ]
    return [*rules, *common_rules(config)]


UNET = Component(
    name="UNet",
    classes=("UNet2DModel",),
    library="diffusers",
    config=UNetConfig,
    module=UNet,
    folder=Naming(
        telling=(
            "mid_block.attentions.0.to_q.weight",
            "mid_block.attentions.0.query.weight",
        ),
        rules=diffusers_rules,
    ),
)
