"""Transformers of every family at small sizes: how to call them, and diffusers' own."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from models.component import Component
from models.dit.params import TRANSFORMER as DIT
from models.flux2.params import TRANSFORMER as FLUX2
from models.ldm.params import UNET
from models.pixart.params import TRANSFORMER as PIXART
from models.sd3.params import TRANSFORMER as SD3
from models.unet.params import UNET_CONDITION
from models.zimage.params import TRANSFORMER as ZIMAGE

SIZES = [(3, 5), (4, 4)]  # rows and columns of tokens
BATCH = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A transformer small enough for tests."""

    component: Component
    config: dict[str, Any]  # of diffusers' class
    inputs: Callable[..., dict[str, Any]]  # from rows, columns, the config, a generator: arguments
    # of a single file: diffusers' function that renames its tensors, of `single_file_utils`
    converter: str | None = None
    prefix: str = "model.diffusion_model."  # of a single file's names, as ComfyUI writes them

    @property
    def shallow(self) -> dict[str, Any]:
        """Sizes with which one of each kind of block is left, and few sizes of layers."""
        if "block_out_channels" in self.config:
            return {"block_out_channels": (16, 16), "layers_per_block": 1}
        if self.component is SD3:  # the last block is another kind
            dual = {"dual_attention_layers": (0,)} if "dual_attention_layers" in self.config else {}
            return {"num_layers": 2} | dual
        return {key: 1 for key in self.config if re.fullmatch(r"n(um)?_.*layers", key)}

    def arguments(self, size: tuple[int, int], batch: int = BATCH) -> dict[str, Any]:
        """Return arguments of a call, float32 unless they count something."""
        rng = np.random.default_rng(0)
        return self.inputs(*size, self.config, rng, batch)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def times(batch):
    return np.float32([0.9, 0.37])[:batch]


def grid_ids(rows, columns, axes, first=0):
    """Return positions [rows columns, axes]: `first`, then row and column."""
    ids = np.zeros((rows, columns, axes), np.float32)
    ids[..., 0] = first
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)
    return ids.reshape(-1, axes)


def flux2_inputs(rows, columns, config, rng, batch):
    """Arguments with a reference image behind the latents, as editing has them."""
    text = 7
    txt_ids = np.zeros((text, 4), np.float32)
    txt_ids[:, 3] = np.arange(text)
    img_ids = np.concatenate([grid_ids(rows, columns, 4), grid_ids(2, 3, 4, first=10)])
    inputs = {
        "hidden_states": normal(rng, batch, len(img_ids), config["in_channels"]),
        "encoder_hidden_states": normal(rng, batch, text, config["joint_attention_dim"]),
        "timestep": times(batch),
        "img_ids": img_ids,
        "txt_ids": txt_ids,
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = np.float32([4.0, 2.5])[:batch]
    return inputs


def zimage_inputs(rows, columns, config, rng, batch):
    """Arguments with texts of several lengths, one of them longer than it is padded to at least."""
    shape = (config["in_channels"], 1, 2 * rows, 2 * columns)
    lengths = (40, 7)[:batch]
    return {
        "x": [normal(rng, *shape) for _ in lengths],
        "t": 1 - times(batch),
        "cap_feats": [normal(rng, length, config["cap_feat_dim"]) for length in lengths],
    }


def dit_inputs(rows, columns, config, rng, batch):
    """Arguments of latents of as many rows as columns, which are all that diffusers' takes."""
    side = 2 * columns
    return {
        "hidden_states": normal(rng, batch, config["in_channels"], side, side),
        "timestep": np.int32([937, 12])[:batch],
        "class_labels": np.int32([3, config["num_embeds_ada_norm"]])[:batch],
    }


def pixart_inputs(rows, columns, config, rng, batch):
    """Arguments with texts of two lengths."""
    latents = (config["in_channels"], 2 * rows, 2 * columns)
    return {
        "hidden_states": normal(rng, batch, *latents),
        "encoder_hidden_states": normal(rng, batch, 6, config["caption_channels"]),
        "timestep": np.int32([937, 12])[:batch],
        "encoder_attention_mask": np.float32([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])[:batch],
    }


def sd3_inputs(rows, columns, config, rng, batch):
    """Arguments with a text shorter than the image."""
    latents = (config["in_channels"], 2 * rows, 2 * columns)
    return {
        "hidden_states": normal(rng, batch, *latents),
        "encoder_hidden_states": normal(rng, batch, 6, config["joint_attention_dim"]),
        "pooled_projections": normal(rng, batch, config["pooled_projection_dim"]),
        "timestep": 1000 * times(batch),
    }


def unet_inputs(rows, columns, config, rng, batch):
    """Arguments of latents whose sides may be odd, so that they are rounded up on the way down."""
    inputs = {
        "sample": normal(rng, batch, config.get("in_channels", 4), rows, columns),
        "timestep": np.int32([937, 12])[:batch],
        "encoder_hidden_states": normal(rng, batch, 6, config["cross_attention_dim"]),
    }
    if "addition_embed_type" in config:
        sizes = np.float32([[64, 48, 0, 0, 64, 48], [32, 32, 4, 8, 24, 16]])[:batch]
        added = {"text_embeds": normal(rng, batch, 16), "time_ids": sizes}
        inputs["added_cond_kwargs"] = added
    return inputs


def ldm_inputs(rows, columns, config, rng, batch):
    """Arguments of latents whose sides can be halved, which diffusers' asks for."""
    sample = normal(rng, batch, 3, 2 * rows, 2 * columns)
    return {"sample": sample, "timestep": np.int32([937, 12])[:batch]}


_UNET = {"block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 8}
_SD3 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 9,
}
_FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
CASES = {
    "FLUX.2 dev": Case(
        component=FLUX2,
        config=_FLUX2 | {"guidance_embeds": True, "mlp_ratio": 2.0},
        inputs=flux2_inputs,
        converter="convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    "FLUX.2 klein": Case(
        component=FLUX2,
        config=_FLUX2 | {"guidance_embeds": False},
        inputs=flux2_inputs,
        converter="convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    "Z-Image": Case(
        component=ZIMAGE,
        config={
            "in_channels": 4,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 32,
            "axes_dims": (4, 6, 6),
        },
        inputs=zimage_inputs,
        converter="convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    "DiT": Case(
        component=DIT,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 5,
        },
        inputs=dit_inputs,
    ),
    "PixArt": Case(
        component=PIXART,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 32,
            "sample_size": 8,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        inputs=pixart_inputs,
    ),
    "SD3 medium": Case(
        component=SD3,
        config=_SD3 | {"num_attention_heads": 1, "caption_projection_dim": 64},
        inputs=sd3_inputs,
        converter="convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "SD3.5 large": Case(
        component=SD3,
        config=_SD3
        | {"num_attention_heads": 2, "attention_head_dim": 24, "caption_projection_dim": 48}
        | {"qk_norm": "rms_norm"},
        inputs=sd3_inputs,
        converter="convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "SD3.5 medium": Case(
        component=SD3,
        config=_SD3
        | {"num_attention_heads": 2, "attention_head_dim": 24, "caption_projection_dim": 48}
        | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        inputs=sd3_inputs,
        converter="convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "SD": Case(
        component=UNET_CONDITION,
        config=_UNET
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
        | {"cross_attention_dim": 32, "attention_head_dim": 2},
        inputs=unet_inputs,
    ),
    "SDXL": Case(
        component=UNET_CONDITION,
        config=_UNET
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
        | {"transformer_layers_per_block": (1, 2), "attention_head_dim": (1, 4)}
        | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        | {"projection_class_embeddings_input_dim": 64, "use_linear_projection": True}
        | {"cross_attention_dim": 32},
        inputs=unet_inputs,
    ),
    "LDM": Case(
        component=UNET,
        config=_UNET
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16},
        inputs=ldm_inputs,
    ),
}
