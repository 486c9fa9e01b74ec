"""Names of a UNet's tensors, diffusers'."""

from collections.abc import Iterator

from models.checkpoint_io import Rule
from models.component import Component, Naming
from models.levels.params import block_names, common_rules, embedder_rules
from models.unet.config import UNetConditionConfig
from models.unet.modeling import UNetCondition


def condition_rules(config: UNetConditionConfig) -> list[Rule]:
    """Return the rules from our module paths to those of diffusers' UNet2DConditionModel."""
    rules = list(embedder_rules("add_in", "add_embedding"))
    for ours, theirs, width in block_names(config):
        attention, to = ours + r"attentions\.(\d+)\.", theirs + r"attentions.\1."
        around = Rule(
            pattern=attention + "(proj_in|proj_out)",
            sources=to + r"\2",
            convolution=not config.use_linear_projection,
        )
        inner = _transformer_block(attention + r"blocks\.(\d+)\.", to, width)
        rules += [around, *inner, Rule(pattern=attention + "norm", sources=to + "norm")]
    return [*rules, *common_rules(config)]


def _transformer_block(ours: str, attention: str, width: int) -> Iterator[Rule]:
    to = attention + r"transformer_blocks.\2."
    joined = {"qkv": ("attn1", "qkv"), "cross_kv": ("attn2", "kv")}
    for name, (which, parts) in joined.items():
        sources = tuple(f"{to}{which}.to_{part}" for part in parts)
        yield Rule(pattern=ours + name, sources=sources, rows=(width,) * len(parts))
    table = {
        "proj": "attn1.to_out.0",
        "cross_q": "attn2.to_q",
        "cross_proj": "attn2.to_out.0",
        "up": "ff.net.0.proj",
        "down": "ff.net.2",
        r"(norm\d)": r"\3",
    }
    for name, source in table.items():
        yield Rule(pattern=ours + name, sources=to + source)


UNET_CONDITION = Component(
    name="UNet of described images",
    classes=("UNet2DConditionModel",),
    library="diffusers",
    config=UNetConditionConfig,
    module=UNetCondition,
    folder=Naming(
        telling="mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        rules=lambda config, names: condition_rules(config),
    ),
)
