"""What the transformers of Black Forest Labs have in common in the names of their tensors."""

import numpy as np

from models.checkpoint_io import Rule


def swap_halves(value: np.ndarray) -> np.ndarray:
    """Exchange shift (ours first) and scale (diffusers' first) along the rows."""
    return np.concatenate(np.split(value, 2)[::-1])


def bfl_rules() -> list[Rule]:
    """Return the rules to the names of Black Forest Labs' files, such as flux1-dev.safetensors.

    Ours are the same but for the norms' nesting and what nn.Sequential numbers (`src/flux/model.py`
    and `modules/layers.py` of github.com/black-forest-labs/flux).
    """
    return [
        Rule(
            pattern=r"(double_blocks\.\d+\.(?:img|txt)_attn)\.(query_norm|key_norm)",
            sources=r"\1.norm.\2",
            leaf="scale",
        ),
        Rule(
            pattern=r"(single_blocks\.\d+)\.(query_norm|key_norm)",
            sources=r"\1.norm.\2",
            leaf="scale",
        ),
        Rule(pattern=r"(double_blocks\.\d+\.(?:img|txt)_mlp)\.up", sources=r"\1.0"),
        Rule(pattern=r"(double_blocks\.\d+\.(?:img|txt)_mlp)\.down", sources=r"\1.2"),
        Rule(pattern=r"final_layer\.modulation", sources="final_layer.adaLN_modulation.1"),
    ]
