"""Configurations of the embedded model, as diffusers and transformers write them.

The architecture is FLUX.1-dev's (joint and single-stream blocks, three-axis rope, guidance
embedding, T5 and CLIP conditioning) at a size that trains in minutes and samples on a CPU.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.text_encoders.clip import CLIPTextConfig, CLIPTextEncoder
from models.text_encoders.t5 import T5Config, T5Encoder
from models.vae.config import AutoencoderKLConfig
from models.vae.modeling import AutoencoderKL

FOLDER = Path(__file__).parent  # the trained weights lie beside this file
IMAGE_SIZE = 128  # pixels a side
TEXT_TOKENS = 32  # length of both token sequences

T5_CONFIG = T5Config(
    vocab_size=2048,
    d_model=256,
    d_kv=64,
    d_ff=640,
    num_layers=3,
    num_heads=4,
    feed_forward_proj="gated-gelu",
)
CLIP_CONFIG = CLIPTextConfig(
    vocab_size=2560,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=TEXT_TOKENS,
    hidden_act="quick_gelu",
    eos_token_id=1,
)
VAE_CONFIG = AutoencoderKLConfig(
    block_out_channels=(64, 128, 128),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=32,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.0,
    shift_factor=0.0,
)
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "_generation_defaults": {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "num_inference_steps": 12,
        "guidance_scale": 2.5,
    },
}


def transformer_config(latent_channels: int) -> FluxConfig:
    """Return the transformer's configuration, about 20M parameters."""
    return FluxConfig(
        in_channels=4 * latent_channels,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=5,
        joint_attention_dim=T5_CONFIG.d_model,
        pooled_projection_dim=CLIP_CONFIG.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


class TextToImage(nnx.Module):
    """What the flow-matching loss trains together: the transformer and both text encoders."""

    def __init__(self, config: FluxConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        self.transformer = FluxTransformer(config, **options)
        self.t5 = T5Encoder(T5_CONFIG, **options)
        self.clip = CLIPTextEncoder(CLIP_CONFIG, **options)

    def encode(
        self,
        t5_ids: jax.Array,  # [batch, text tokens] int32
        clip_ids: jax.Array,  # [batch, text tokens] int32
    ) -> tuple[jax.Array, jax.Array]:
        """Return T5's hidden states [batch, text tokens, 256] and CLIP's pooled [batch, 192]."""
        return self.t5(t5_ids), self.clip(clip_ids)[1]


def build_vae(latent_channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> AutoencoderKL:
    """Return a freshly initialised autoencoder with float32 parameters."""
    config = dataclasses.replace(VAE_CONFIG, latent_channels=latent_channels)
    return AutoencoderKL(config, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
