"""Names of a DiT's tensors, diffusers'."""

from models.checkpoint_io import Rule
from models.component import Component, Naming
from models.dit.config import FORMER_CLASS, DiTConfig
from models.dit.modeling import DiT


def diffusers_rules(config: DiTConfig) -> list[Rule]:
    """Return the rules from our module paths to diffusers' names."""
    ours, theirs = r"layers\.(\d+)\.", r"transformer_blocks.\1."
    embed = theirs + "norm1.emb."
    table = {
        r"patches\.proj": "pos_embed.proj",
        ours + r"condition\.time\.in_layer": embed + "timestep_embedder.linear_1",
        ours + r"condition\.time\.out_layer": embed + "timestep_embedder.linear_2",
        ours + r"condition\.label": embed + "class_embedder.embedding_table",
        ours + r"modulation\.lin": theirs + "norm1.linear",
        ours + "proj": theirs + "attn1.to_out.0",
        ours + r"mlp\.up": theirs + "ff.net.0.proj",
        ours + r"mlp\.down": theirs + "ff.net.2",
        r"final_layer\.modulation": "proj_out_1",
        r"final_layer\.linear": "proj_out_2",
    }
    qkv = Rule(
        pattern=ours + "qkv",
        sources=tuple(f"{theirs}attn1.to_{name}" for name in "qkv"),
        rows=(config.hidden_size,) * 3,
    )
    return [qkv, *(Rule(pattern=pattern, sources=source) for pattern, source in table.items())]


TRANSFORMER = Component(
    name="DiT",
    classes=("DiTTransformer2DModel",),
    library="diffusers",
    config=DiTConfig,
    module=DiT,
    folder=Naming(
        telling="transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        rules=lambda config, names: diffusers_rules(config),
    ),
    formerly=(("_class_name", FORMER_CLASS), ("norm_type", "ada_norm_zero")),
)
