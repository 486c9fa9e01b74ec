"""Names of a PixArt transformer's tensors, diffusers'."""

from models.checkpoint_io import Rule
from models.component import Component, Naming
from models.pixart.config import FORMER_CLASS, PixArtConfig
from models.pixart.modeling import PixArtTransformer


def diffusers_rules(config: PixArtConfig) -> list[Rule]:
    """Return the rules from our module paths to diffusers' names."""
    ours, theirs = r"layers\.(\d+)\.", r"transformer_blocks.\1."
    time = "adaln_single.emb.timestep_embedder.linear_"
    table = {
        r"patches\.proj": "pos_embed.proj",
        r"time_in\.in_layer": time + "1",
        r"time_in\.out_layer": time + "2",
        r"text_in\.in_layer": "caption_projection.linear_1",
        r"text_in\.out_layer": "caption_projection.linear_2",
        r"modulation\.lin": "adaln_single.linear",
        ours + "proj": theirs + "attn1.to_out.0",
        ours + r"cross\.q": theirs + "attn2.to_q",
        ours + r"cross\.proj": theirs + "attn2.to_out.0",
        ours + r"mlp\.up": theirs + "ff.net.0.proj",
        ours + r"mlp\.down": theirs + "ff.net.2",
        "linear": "proj_out",
    }
    joined = {"qkv": ("attn1", "qkv"), r"cross\.kv": ("attn2", "kv")}
    return [
        Rule(pattern=r"layers\.(\d+)", sources=r"transformer_blocks.\1", leaf="scale_shift_table"),
        *(
            Rule(
                pattern=ours + path,
                sources=tuple(f"{theirs}{attention}.to_{name}" for name in names),
                rows=(config.hidden_size,) * len(names),
            )
            for path, (attention, names) in joined.items()
        ),
        *(Rule(pattern=pattern, sources=source) for pattern, source in table.items()),
    ]


TRANSFORMER = Component(
    name="PixArt transformer",
    classes=("PixArtTransformer2DModel",),
    library="diffusers",
    config=PixArtConfig,
    module=PixArtTransformer,
    folder=Naming(
        telling="adaln_single.linear.weight", rules=lambda config, names: diffusers_rules(config)
    ),
    formerly=(("_class_name", FORMER_CLASS), ("norm_type", "ada_norm_single")),
)
