"""Names of an SD3 transformer's tensors, diffusers' and those of single files."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from models.bfl_names import swap_halves
from models.checkpoint_io import Rule, count_blocks
from models.component import Component, Naming
from models.sd3.config import SD3Config
from models.sd3.modeling import SD3Transformer
from models.stored_files import CheckpointError

# A tensor of single files that every one has, and no other model's.
TELLING = "joint_blocks.0.context_block.attn.qkv.weight"
_HEAD = 64  # channels of a head in every model without norms of queries and keys
_BLOCK = r"joint_blocks\.(\d+)\."


def diffusers_rules(config: SD3Config) -> list[Rule]:
    """Return the rules from our module paths to diffusers' names."""
    theirs, thirds = r"transformer_blocks.\1.", (config.hidden_size,) * 3
    table = {
        r"patches\.proj": "pos_embed.proj",
        "txt_in": "context_embedder",
        r"time_in\.in_layer": "time_text_embed.timestep_embedder.linear_1",
        r"time_in\.out_layer": "time_text_embed.timestep_embedder.linear_2",
        r"vector_in\.in_layer": "time_text_embed.text_embedder.linear_1",
        r"vector_in\.out_layer": "time_text_embed.text_embedder.linear_2",
        _BLOCK + r"img_mod\.lin": theirs + "norm1.linear",
        _BLOCK + r"txt_mod\.lin": theirs + "norm1_context.linear",
        _BLOCK + r"img_attn(2?)\.proj": theirs + r"attn\2.to_out.0",
        _BLOCK + r"txt_attn\.proj": theirs + "attn.to_add_out",
        _BLOCK + r"img_attn(2?)\.query_norm": theirs + r"attn\2.norm_q",
        _BLOCK + r"img_attn(2?)\.key_norm": theirs + r"attn\2.norm_k",
        _BLOCK + r"txt_attn\.query_norm": theirs + "attn.norm_added_q",
        _BLOCK + r"txt_attn\.key_norm": theirs + "attn.norm_added_k",
        _BLOCK + r"img_mlp\.up": theirs + "ff.net.0.proj",
        _BLOCK + r"img_mlp\.down": theirs + "ff.net.2",
        _BLOCK + r"txt_mlp\.up": theirs + "ff_context.net.0.proj",
        _BLOCK + r"txt_mlp\.down": theirs + "ff_context.net.2",
        r"final_layer\.linear": "proj_out",
    }
    joined = {
        _BLOCK + r"img_attn(2?)\.qkv": [rf"attn\2.to_{name}" for name in "qkv"],
        _BLOCK + r"txt_attn\.qkv": [f"attn.add_{name}_proj" for name in "qkv"],
    }
    # What only shifts and scales is stored scale first.
    last = rf"joint_blocks\.({config.num_layers - 1})\.txt_mod\.lin"
    swapped = {last: theirs + "norm1_context.linear", r"final_layer\.modulation": "norm_out.linear"}
    return [
        Rule(pattern="positions", sources="pos_embed", leaf="pos_embed"),
        *(Rule(pattern=x, sources=y, transform=swap_halves) for x, y in swapped.items()),
        *(
            Rule(pattern=pattern, sources=tuple(theirs + name for name in names), rows=thirds)
            for pattern, names in joined.items()
        ),
        *(Rule(pattern=pattern, sources=source) for pattern, source in table.items()),
    ]


def file_rules() -> list[Rule]:
    """Return the rules to the names of single files, such as sd3.5_large.safetensors.

    As `convert_sd3_transformer_checkpoint_to_diffusers` of diffusers'
    `loaders/single_file_utils.py` reads them.
    """
    streams = {"img": r"joint_blocks.\1.x_block.", "txt": r"joint_blocks.\1.context_block."}
    table = {
        r"patches\.proj": "x_embedder.proj",
        "txt_in": "context_embedder",
        r"time_in\.in_layer": "t_embedder.mlp.0",
        r"time_in\.out_layer": "t_embedder.mlp.2",
        r"vector_in\.in_layer": "y_embedder.mlp.0",
        r"vector_in\.out_layer": "y_embedder.mlp.2",
        r"final_layer\.modulation": "final_layer.adaLN_modulation.1",
    }
    for stream, theirs in streams.items():
        ours = _BLOCK + stream
        table |= {
            ours + r"_mod\.lin": theirs + "adaLN_modulation.1",
            ours + r"_attn(2?)\.(qkv|proj)": theirs + r"attn\2.\3",
            ours + r"_attn(2?)\.query_norm": theirs + r"attn\2.ln_q",
            ours + r"_attn(2?)\.key_norm": theirs + r"attn\2.ln_k",
            ours + r"_mlp\.up": theirs + "mlp.fc1",
            ours + r"_mlp\.down": theirs + "mlp.fc2",
        }
    return [
        Rule(pattern="positions", sources="", leaf="pos_embed"),
        *(Rule(pattern=pattern, sources=source) for pattern, source in table.items()),
    ]


def config_from_file(shapes: Mapping[str, tuple[int, ...]], path: Path | str = "") -> SD3Config:
    """Return the sizes that a single file has; it brings no config.json.

    Args:
      shapes: its tensors'.
      path: of the file, for errors.

    Raises:
      CheckpointError: a tensor that tells a size is missing or misshapen.
    """
    telling = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "context_embedder.weight": 2,
        "y_embedder.mlp.0.weight": 2,
        "final_layer.linear.weight": 2,
    }
    if missing := [name for name in telling if name not in shapes]:
        raise CheckpointError(f"{path}: no SD3 transformer: missing {'; missing '.join(missing)}")
    image, positions, text, pooled, last = found = [shapes[name] for name in telling]
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm[0] if norm else _HEAD
    if [len(shape) for shape in found] != list(telling.values()) or 0 in (*image, head):
        listed = ", ".join(f"{name} {list(shapes[name])}" for name in telling)
        raise CheckpointError(f"{path}: no SD3 transformer: misshapen {listed}")
    twice = re.compile(r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight")
    return SD3Config(
        patch_size=image[2],
        in_channels=image[1],
        out_channels=last[0] // image[2] ** 2,
        num_layers=count_blocks("joint_blocks", shapes),
        attention_head_dim=head,
        num_attention_heads=image[0] // head,
        joint_attention_dim=text[1],
        caption_projection_dim=text[0],
        pooled_projection_dim=pooled[1],
        pos_embed_max_size=math.isqrt(positions[1]),
        dual_attention_layers=tuple(sorted(int(m[1]) for m in map(twice.fullmatch, shapes) if m)),
        qk_norm="rms_norm" if norm else None,
    )


TRANSFORMER = Component(
    name="SD3 transformer",
    classes=("SD3Transformer2DModel",),
    library="diffusers",
    config=SD3Config,
    module=SD3Transformer,
    folder=Naming(
        telling="context_embedder.weight", rules=lambda config, names: diffusers_rules(config)
    ),
    file=Naming(telling=TELLING, rules=lambda config, names: file_rules(), config=config_from_file),
)
