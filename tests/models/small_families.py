"""Small models of the families beside FLUX.1, in the layout that they are published in."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from small_flux import SIZES as FLUX_SIZES

from models.dit.config import DiTConfig
from models.dit.family import DIT
from models.family import Family
from models.flux.redux import FLUX_REDUX, ReduxConfig
from models.flux2.config import Flux2Config
from models.flux2.family import FLUX2
from models.flux2.prompts import TextConfig as Flux2Text
from models.image_encoders import SiglipVisionConfig
from models.pixart.config import PixArtConfig
from models.pixart.family import PIXART
from models.sd3.config import SD3Config
from models.sd3.family import SD3
from models.synthetic import write_random_model
from models.text_encoders import ProjectedCLIPTextConfig, T5Config
from models.tiny_flux.architecture import FOLDER
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
        given = {"schedule": self.schedule, "tokenizers": FOLDER}  # of FLUX.1 none are made
        write_random_model(folder, self.family, self.sizes, **given)
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
_T5 = T5Config(
    vocab_size=261,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=1,
    num_heads=3,
    feed_forward_proj="gated-gelu",
)
_PLANAR_VAE = AutoencoderKLConfig(**_VAE, latent_channels=4)
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
_CLIP = ProjectedCLIPTextConfig(
    vocab_size=514,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=2,
    projection_dim=12,
)
_DIT = {
    "vae": _PLANAR_VAE,
    "transformer": DiTConfig(**_HEADS, out_channels=8, sample_size=8, num_embeds_ada_norm=10),
}
_PIXART = {
    "text_encoder": _T5,
    "vae": _PLANAR_VAE,
    "transformer": PixArtConfig(
        **_HEADS, cross_attention_dim=64, caption_channels=32, sample_size=8
    ),
}
_SD3 = {
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "text_encoder_3": _T5,
    "vae": _PLANAR_VAE,
    "transformer": SD3Config(
        **_HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
}
_REDUX = {
    "image_encoder": SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=3,
        image_size=28,
        patch_size=14,
    ),
    "image_embedder": ReduxConfig(redux_dim=24, txt_in_features=24),
    **FLUX_SIZES,
}
SMALL = {
    "klein": Small(FLUX2, _KLEIN, "distilled"),
    "klein-base": Small(FLUX2, _KLEIN, "base"),
    "Z-Image-Turbo": Small(ZIMAGE, _ZIMAGE, "turbo"),
    "Z-Image": Small(ZIMAGE, _ZIMAGE, "base"),
    "DiT": Small(DIT, _DIT, "dit"),
    "PixArt": Small(PIXART, _PIXART, "pixart-sigma"),
    "SD3.5": Small(SD3, _SD3, "sd3.5-medium"),
    "FLUX.1 Redux": Small(FLUX_REDUX, _REDUX, "redux"),
}
