"""Names of a FLUX.2 transformer's tensors, diffusers' and Black Forest Labs'."""

from collections.abc import Mapping
from pathlib import Path

from models.bfl_names import bfl_rules, swap_halves
from models.checkpoint_io import Rule, count_blocks
from models.component import Component, Naming
from models.flux2.config import Flux2Config
from models.flux2.modeling import Flux2Transformer
from models.stored_files import CheckpointError

# A tensor of Black Forest Labs' naming that every checkpoint has, and no other model's.
TELLING = "single_stream_modulation.lin.weight"


def diffusers_rules(config: Flux2Config) -> list[Rule]:
    """Return the rules from our module paths to diffusers' names."""
    thirds, embed = (config.hidden_size,) * 3, "time_guidance_embed."
    double, ours = r"transformer_blocks.\1.", r"double_blocks\.(\d+)\."
    single, ours_single = r"single_transformer_blocks.\1.", r"single_blocks\.(\d+)\."
    table = {
        r"img_in": "x_embedder",
        r"txt_in": "context_embedder",
        r"time_in\.in_layer": embed + "timestep_embedder.linear_1",
        r"time_in\.out_layer": embed + "timestep_embedder.linear_2",
        r"guidance_in\.in_layer": embed + "guidance_embedder.linear_1",
        r"guidance_in\.out_layer": embed + "guidance_embedder.linear_2",
        r"(double_stream_modulation_(?:img|txt)|single_stream_modulation)\.lin": r"\1.linear",
        ours + r"img_attn\.proj": double + "attn.to_out.0",
        ours + r"txt_attn\.proj": double + "attn.to_add_out",
        ours + r"img_attn\.query_norm": double + "attn.norm_q",
        ours + r"img_attn\.key_norm": double + "attn.norm_k",
        ours + r"txt_attn\.query_norm": double + "attn.norm_added_q",
        ours + r"txt_attn\.key_norm": double + "attn.norm_added_k",
        ours + r"img_mlp\.up": double + "ff.linear_in",
        ours + r"img_mlp\.down": double + "ff.linear_out",
        ours + r"txt_mlp\.up": double + "ff_context.linear_in",
        ours + r"txt_mlp\.down": double + "ff_context.linear_out",
        ours_single + r"linear1": single + "attn.to_qkv_mlp_proj",
        ours_single + r"linear2": single + "attn.to_out",
        ours_single + r"query_norm": single + "attn.norm_q",
        ours_single + r"key_norm": single + "attn.norm_k",
        r"final_layer\.linear": "proj_out",
    }
    joined = {
        ours + r"img_attn\.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        ours + r"txt_attn\.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    return [
        *(Rule(pattern=pattern, sources=source) for pattern, source in table.items()),
        *(
            Rule(pattern=pattern, sources=tuple(double + name for name in names), rows=thirds)
            for pattern, names in joined.items()
        ),
        Rule(pattern=r"final_layer\.modulation", sources="norm_out.linear", transform=swap_halves),
    ]


def config_from_bfl(shapes: Mapping[str, tuple[int, ...]], path: Path | str = "") -> Flux2Config:
    """Return the sizes that a file in Black Forest Labs' naming has; it brings no config.json.

    Args:
      shapes: its tensors'.
      path: of the file, for errors.

    Raises:
      CheckpointError: a tensor that tells a size is missing, or the head has an unusual width.
    """
    telling = {
        "img_in.weight": 2,
        "txt_in.weight": 2,
        "time_in.in_layer.weight": 2,
        "single_blocks.0.linear2.weight": 2,
        "single_blocks.0.norm.query_norm.scale": 1,
        "final_layer.linear.weight": 2,
    }
    if missing := [name for name in telling if name not in shapes]:
        raise CheckpointError(
            f"{path}: no FLUX.2 transformer: missing {'; missing '.join(missing)}"
        )
    image, text, time, mixed, head, last = found = [shapes[name] for name in telling]
    if [len(shape) for shape in found] != list(telling.values()) or 0 in (*image, *head):
        listed = ", ".join(f"{name} {list(shapes[name])}" for name in telling)
        raise CheckpointError(f"{path}: no FLUX.2 transformer: misshapen {listed}")
    if head[0] % 8:
        raise CheckpointError(
            f"{path}: heads of {head[0]} channels: how positions turn them is known for multiples "
            "of 8 only; convert to a diffusers folder, whose config.json says it"
        )
    return Flux2Config(
        in_channels=image[1],
        out_channels=None if last[0] == image[1] else last[0],
        num_layers=count_blocks("double_blocks", shapes),
        num_single_layers=count_blocks("single_blocks", shapes),
        attention_head_dim=head[0],
        num_attention_heads=image[0] // head[0],
        joint_attention_dim=text[1],
        timestep_guidance_channels=time[1],
        mlp_ratio=(mixed[1] - image[0]) / image[0],
        axes_dims_rope=(head[0] // 4,) * 4,
        guidance_embeds="guidance_in.in_layer.weight" in shapes,
    )


TRANSFORMER = Component(
    name="FLUX.2 transformer",
    classes=("Flux2Transformer2DModel",),
    library="diffusers",
    config=Flux2Config,
    module=Flux2Transformer,
    folder=Naming(telling="x_embedder.weight", rules=lambda config, names: diffusers_rules(config)),
    file=Naming(telling=TELLING, rules=lambda config, names: bfl_rules(), config=config_from_bfl),
)
