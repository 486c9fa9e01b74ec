"""Checkpoint names of the autoencoder, loading and export."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from models.checkpoint_io import Rule, load_params, open_checkpoint, read_json, save_params
from models.vae.config import AutoencoderKLConfig
from models.vae.modeling import AutoencoderKL

_ATTENTION = r"(.+\.mid_block)\.attention\."

RULES = (
    Rule(pattern=_ATTENTION + "to_out", sources=r"\1.attentions.0.to_out.0"),
    Rule(pattern=_ATTENTION + "(.+)", sources=r"\1.attentions.0.\2"),
    Rule(pattern=r"(.+)\.downsample", sources=r"\1.downsamplers.0.conv"),
    Rule(pattern=r"(.+)\.upsample", sources=r"\1.upsamplers.0.conv"),
)

# Files of early diffusers releases name the attention's projections otherwise.
_OLD_RULES = (
    *(
        Rule(pattern=_ATTENTION + ours, sources=rf"\1.attentions.0.{theirs}")
        for ours, theirs in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            "to_out": "proj_attn",
        }.items()
    ),
    *RULES,
)


def load_autoencoder_kl(folder: Path | str, dtype: jnp.dtype = jnp.float32) -> AutoencoderKL:
    """Load a diffusers AutoencoderKL folder.

    Args:
      folder: holds config.json and safetensors.
      dtype: of the parameters and the computation.

    Raises:
      CheckpointError: a file or tensor is missing or malformed, or the config isn't supported.
    """
    folder = Path(folder)
    config = AutoencoderKLConfig.from_json(read_json(folder / "config.json"))
    checkpoint = open_checkpoint(folder)
    old = any(name.endswith(".proj_attn.weight") for name in checkpoint.shapes)
    return load_params(
        lambda: AutoencoderKL(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype),
        checkpoint,
        _OLD_RULES if old else RULES,
        dtype=dtype,
    )


def export_autoencoder_kl(
    module: AutoencoderKL, folder: Path | str, dtype: jnp.dtype = jnp.bfloat16
) -> None:
    """Write a folder that diffusers' AutoencoderKL and `load_autoencoder_kl` read."""
    save_params(
        module,
        folder,
        RULES,
        config=module.config.to_json(),
        filename="diffusion_pytorch_model.safetensors",
        dtype=dtype,
    )
