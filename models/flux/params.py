"""Names of a FLUX transformer's tensors in diffusers checkpoints; loading and export."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoint_io import Rule, load_params, open_checkpoint, read_json, save_params
from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer


def _swap_halves(value: np.ndarray) -> np.ndarray:
    """Exchange shift (ours first) and scale (diffusers' first) along the rows."""
    return np.concatenate(np.split(value, 2)[::-1])


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
        Rule(pattern=r"final_layer\.modulation", sources="norm_out.linear", transform=_swap_halves),
    ]


def load_flux_transformer(folder: Path | str, dtype: jnp.dtype = jnp.bfloat16) -> FluxTransformer:
    """Load the `transformer` folder of a diffusers FLUX.1 model; computes and stores in `dtype`.

    Raises:
      CheckpointError: the folder, its config or a tensor can't be used; the message names it.
    """
    config = FluxConfig.from_json(read_json(Path(folder) / "config.json"))
    return load_params(
        lambda: FluxTransformer(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype),
        open_checkpoint(folder),
        diffusers_rules(config),
        dtype=dtype,
    )


def export_flux_transformer(
    module: FluxTransformer, folder: Path | str, dtype: jnp.dtype = jnp.bfloat16
) -> None:
    """Write a folder that diffusers' FluxTransformer2DModel and `load_flux_transformer` read."""
    save_params(
        module,
        folder,
        diffusers_rules(module.config),
        config=module.config.to_json(),
        filename="diffusion_pytorch_model.safetensors",
        dtype=dtype,
    )
