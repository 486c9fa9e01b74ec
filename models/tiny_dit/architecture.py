"""Configurations of tiny-dit, a small DiT, as diffusers writes them.

DiT's architecture (Peebles and Xie, arXiv 2212.09748): classes in place of text, adaLN-Zero, noise
and a learned variance predicted, at a size that trains in minutes and samples on a CPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from models.dit.config import DiTConfig
from models.dit.family import DIT

SCHEDULER_CONFIG = dict(DIT.schedules["dit"].scheduler)
STEPS = 25  # of DDIM, by default
GUIDANCE = 4.0  # classifier-free, by default


def transformer_config(latent_channels: int, classes: int, side: int) -> DiTConfig:
    """Return the transformer's configuration, about 15M parameters.

    Args:
      latent_channels: of the autoencoder.
      classes: without the one that stands for none.
      side: of the latents, in latent pixels.
    """
    return DiTConfig(
        num_attention_heads=5,
        attention_head_dim=64,
        in_channels=latent_channels,
        out_channels=2 * latent_channels,
        num_layers=7,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )


def model_index(
    classes: Sequence[Mapping[str, Any]], side: int, guidance: float = GUIDANCE
) -> dict[str, Any]:
    """Return model_index.json.

    Args:
      classes: entries with a `name` and perhaps `synonyms`, in the order of their numbers.
      side: of the images, in pixels.
      guidance: the default.
    """
    defaults = {"num_inference_steps": STEPS, "true_cfg_scale": guidance}
    return {
        **DIT.index,
        "id2label": {str(i): label(entry) for i, entry in enumerate(classes)},
        "_generation_defaults": {"height": side, "width": side, **defaults},
    }


def label(entry: Mapping[str, Any]) -> str:
    """Return the names of a class, the one that it goes by first, with commas between."""
    return ", ".join(dict.fromkeys([entry["name"], *entry.get("synonyms", ())]))
