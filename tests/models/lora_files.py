"""Random adapters for FLUX transformers in the namings that are in use."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Of one double-stream and one single-stream block: diffusers' module to its inputs and outputs,
# in units of the hidden size (and of the MLP's width, which is four times that).
DOUBLE = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.add_q_proj": (1, 1),
    "attn.add_k_proj": (1, 1),
    "attn.add_v_proj": (1, 1),
    "attn.to_out.0": (1, 1),
    "attn.to_add_out": (1, 1),
    "ff.net.0.proj": (1, 4),
    "ff.net.2": (4, 1),
    "ff_context.net.0.proj": (1, 4),
    "ff_context.net.2": (4, 1),
    "norm1.linear": (1, 6),
    "norm1_context.linear": (1, 6),
}
SINGLE = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "proj_mlp": (1, 4),
    "proj_out": (5, 1),
    "norm.linear": (1, 3),
}
# The same in Black Forest Labs' naming.
BFL_DOUBLE = {
    f"{stream}_{name}": shape
    for stream in ("img", "txt")
    for name, shape in {
        "attn.qkv": (1, 3),
        "attn.proj": (1, 1),
        "mlp.0": (1, 4),
        "mlp.2": (4, 1),
        "mod.lin": (1, 6),
    }.items()
}
BFL_SINGLE = {"linear1": (1, 7), "linear2": (5, 1), "modulation.lin": (1, 3)}


def diffusers_modules(config) -> dict[str, tuple[int, int]]:
    """Return every linear of a transformer, by diffusers' name, to its inputs and outputs."""
    hidden = config.hidden_size
    outer = {
        "x_embedder": (config.in_channels, hidden),
        "context_embedder": (config.joint_attention_dim, hidden),
        "time_text_embed.timestep_embedder.linear_1": (256, hidden),
        "time_text_embed.timestep_embedder.linear_2": (hidden, hidden),
        "time_text_embed.text_embedder.linear_1": (config.pooled_projection_dim, hidden),
        "time_text_embed.text_embedder.linear_2": (hidden, hidden),
        "norm_out.linear": (hidden, 2 * hidden),
        "proj_out": (hidden, config.token_channels),
    }
    if config.guidance_embeds:
        guidance = "time_text_embed.guidance_embedder.linear_"
        outer |= {guidance + "1": (256, hidden), guidance + "2": (hidden, hidden)}
    return outer | _blocks(
        config, "transformer_blocks", DOUBLE, "single_transformer_blocks", SINGLE
    )


def bfl_modules(config) -> dict[str, tuple[int, int]]:
    """Return the linears of the blocks, by Black Forest Labs' name, to inputs and outputs."""
    return _blocks(config, "double_blocks", BFL_DOUBLE, "single_blocks", BFL_SINGLE)


def _blocks(config, double_name, double, single_name, single):
    hidden = config.hidden_size
    counts = {
        double_name: (config.num_layers, double),
        single_name: (config.num_single_layers, single),
    }
    return {
        f"{name}.{i}.{module}": (hidden * inputs, hidden * outputs)
        for name, (count, modules) in counts.items()
        for i in range(count)
        for module, (inputs, outputs) in modules.items()
    }


def random_factors(
    modules: dict[str, tuple[int, int]], rank: int = 4, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return module to down, float32 [rank, inputs], and up, float32 [outputs, rank]."""
    random = np.random.default_rng(seed)
    return {
        name: (
            random.normal(size=(rank, inputs), scale=0.3).astype(np.float32),
            random.normal(size=(outputs, rank), scale=0.3).astype(np.float32),
        )
        for name, (inputs, outputs) in modules.items()
    }


def diffusers_tensors(factors: dict, alphas: dict[str, float] | None = None) -> dict:
    """Name factors as diffusers saves them, with an alpha where one is given."""
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    for name, alpha in (alphas or {}).items():
        tensors[f"transformer.{name}.alpha"] = np.float32(alpha)
    return tensors


def kohya_tensors(factors: dict, alpha: float | None = None) -> dict:
    """Name factors of Black Forest Labs' modules as kohya's scripts save them."""
    tensors = {}
    for name, (down, up) in factors.items():
        module = "lora_unet_" + name.replace(".", "_")
        tensors[f"{module}.lora_down.weight"] = down
        tensors[f"{module}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.float32(alpha)
    return tensors


def only(factors: dict, names: Iterable[str]) -> dict:
    """Return the factors of the modules whose name ends so."""
    return {name: pair for name, pair in factors.items() if name.endswith(tuple(names))}


def save(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> Path:
    """Write an adapter."""
    save_file({name: np.asarray(x) for name, x in tensors.items()}, path, metadata=metadata)
    return path
