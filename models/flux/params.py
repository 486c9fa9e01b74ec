"""Names of a FLUX transformer's tensors, diffusers' and Black Forest Labs'."""

from collections.abc import Mapping
from pathlib import Path

from models.bfl_names import bfl_rules, swap_halves
from models.checkpoint_io import Rule, count_blocks
from models.component import Component, Naming
from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.stored_files import CheckpointError

# A tensor of Black Forest Labs' naming that every checkpoint has, those of FLUX.2 too.
TELLING = "double_blocks.0.img_attn.qkv.weight"


def diffusers_rules(config: FluxConfig) -> list[Rule]:
    """Return the rules from our module paths to diffusers' names."""
    hidden = config.hidden_size
    thirds = (hidden,) * 3
    double, ours = r"transformer_blocks.\1.", r"double_blocks\.(\d+)\."
    single, ours_single = r"single_transformer_blocks.\1.", r"single_blocks\.(\d+)\."
    table = {
        r"img_in": "x_embedder",
        r"txt_in": "context_embedder",
        r"time_in\.in_layer": "time_text_embed.timestep_embedder.linear_1",
        r"time_in\.out_layer": "time_text_embed.timestep_embedder.linear_2",
        r"vector_in\.in_layer": "time_text_embed.text_embedder.linear_1",
        r"vector_in\.out_layer": "time_text_embed.text_embedder.linear_2",
        r"guidance_in\.in_layer": "time_text_embed.guidance_embedder.linear_1",
        r"guidance_in\.out_layer": "time_text_embed.guidance_embedder.linear_2",
        ours + r"img_mod\.lin": double + "norm1.linear",
        ours + r"txt_mod\.lin": double + "norm1_context.linear",
        ours + r"img_attn\.proj": double + "attn.to_out.0",
        ours + r"txt_attn\.proj": double + "attn.to_add_out",
        ours + r"img_attn\.query_norm": double + "attn.norm_q",
        ours + r"img_attn\.key_norm": double + "attn.norm_k",
        ours + r"txt_attn\.query_norm": double + "attn.norm_added_q",
        ours + r"txt_attn\.key_norm": double + "attn.norm_added_k",
        ours + r"img_mlp\.up": double + "ff.net.0.proj",
        ours + r"img_mlp\.down": double + "ff.net.2",
        ours + r"txt_mlp\.up": double + "ff_context.net.0.proj",
        ours + r"txt_mlp\.down": double + "ff_context.net.2",
        ours_single + r"modulation\.lin": single + "norm.linear",
        ours_single + r"linear2": single + "proj_out",
        ours_single + r"query_norm": single + "attn.norm_q",
        ours_single + r"key_norm": single + "attn.norm_k",
        r"final_layer\.linear": "proj_out",
    }
    joined = {
        ours + r"img_attn\.qkv": (double, ("attn.to_q", "attn.to_k", "attn.to_v"), thirds),
        ours + r"txt_attn\.qkv": (
            double,
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            thirds,
        ),
        ours_single + r"linear1": (
            single,
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            (*thirds, 4 * hidden),
        ),
    }
    return [
        *(Rule(pattern=pattern, sources=source) for pattern, source in table.items()),
        *(
            Rule(pattern=pattern, sources=tuple(prefix + name for name in names), rows=rows)
            for pattern, (prefix, names, rows) in joined.items()
        ),
        Rule(pattern=r"final_layer\.modulation", sources="norm_out.linear", transform=swap_halves),
    ]


def config_from_bfl(shapes: Mapping[str, tuple[int, ...]], path: Path | str = "") -> FluxConfig:
    """Return the sizes that a file in Black Forest Labs' naming has; it brings no config.json.

    Args:
      shapes: its tensors'.
      path: of the file, for errors.

    Raises:
      CheckpointError: a tensor that tells a size is missing, or the head has an unusual width.
    """
    telling = (
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "final_layer.linear.weight",
    )
    if missing := [name for name in telling if name not in shapes]:
        raise CheckpointError(
            f"{path}: no FLUX.1 transformer: missing {'; missing '.join(missing)}"
        )
    image, text, pooled, head, last = found = [shapes[name] for name in telling]
    if [len(shape) for shape in found] != [2, 2, 2, 1, 2]:
        listed = ", ".join(f"{name} {list(shapes[name])}" for name in telling)
        raise CheckpointError(f"{path}: no FLUX.1 transformer: misshapen {listed}")
    if not head[0] or head[0] % 32:
        raise CheckpointError(
            f"{path}: heads of {head[0]} channels: how positions turn them is known for multiples "
            "of 32 only; convert to a diffusers folder, whose config.json says it"
        )
    return FluxConfig(
        in_channels=image[1],
        out_channels=None if last[0] == image[1] else last[0],
        num_layers=count_blocks("double_blocks", shapes),
        num_single_layers=count_blocks("single_blocks", shapes),
        attention_head_dim=head[0],
        num_attention_heads=image[0] // head[0],
        joint_attention_dim=text[1],
        pooled_projection_dim=pooled[1],
        guidance_embeds="guidance_in.in_layer.weight" in shapes,
        # 16, 56 and 56 of FLUX.1's 128 channels
        axes_dims_rope=(head[0] // 8, 7 * head[0] // 16, 7 * head[0] // 16),
    )


TRANSFORMER = Component(
    name="FLUX.1 transformer",
    classes=("FluxTransformer2DModel",),
    library="diffusers",
    config=FluxConfig,
    module=FluxTransformer,
    folder=Naming(telling="x_embedder.weight", rules=lambda config, names: diffusers_rules(config)),
    file=Naming(telling=TELLING, rules=lambda config, names: bfl_rules(), config=config_from_bfl),
)
