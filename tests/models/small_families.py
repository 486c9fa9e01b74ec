"""Small models of the families after FLUX.1, in the layout that they are published in."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from models.family import Family
from models.flux2.config import Flux2Config
from models.flux2.family import FLUX2
from models.flux2.prompts import TextConfig as Flux2Text
from models.synthetic import write_random_model
from models.vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config
from models.zimage.config import ZImageConfig
from models.zimage.family import ZIMAGE
from models.zimage.prompts import TextConfig as ZImageText

_QWEN3: dict[str, Any] = {
    "vocab_size": 261,  # bytes and the marks of the template
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_VAE: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}


class Small(NamedTuple):
    """A model to write, and the schedule that it is made for."""

    family: Family
    sizes: dict[str, Any]  # configs by component
    schedule: str

    def write(self, folder: Path) -> None:
        """Write it with random weights."""
        write_random_model(folder, self.family, self.sizes, schedule=self.schedule)
        if self.family is FLUX2:  # whose encoder is read up to layer 27
            config = self.sizes["text_encoder"].to_json()
            (folder / "text_encoder" / "config.json").write_text(json.dumps(config))


_KLEIN = {
    "text_encoder": Flux2Text(**_QWEN3, num_hidden_layers=4, hidden_states=(1, 2, 3)),
    "vae": AutoencoderKLFlux2Config(**_VAE, latent_channels=4),
    "transformer": Flux2Config(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    ),
}
_ZIMAGE = {
    "text_encoder": ZImageText(**_QWEN3, num_hidden_layers=3),
    "vae": AutoencoderKLConfig(
        **_VAE, latent_channels=4, use_quant_conv=False, use_post_quant_conv=False
    ),
    "transformer": ZImageConfig(
        in_channels=4,
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=32,
        axes_dims=(8, 12, 12),
    ),
}
SMALL = {
    "klein": Small(FLUX2, _KLEIN, "distilled"),
    "klein-base": Small(FLUX2, _KLEIN, "base"),
    "Z-Image-Turbo": Small(ZIMAGE, _ZIMAGE, "turbo"),
    "Z-Image": Small(ZIMAGE, _ZIMAGE, "base"),
}
