"""A FLUX model small enough for tests, its heads as wide as single files need them."""

import jax.numpy as jnp
from random_weights import random_module
from safetensors.numpy import save_file

from models.checkpoint_io import TracingRngs, export_params
from models.flux import TRANSFORMER, FluxConfig, FluxTransformer
from models.flux.params import bfl_rules as transformer_rules
from models.text_encoders import CLIPTextConfig, T5Config
from models.vae import AutoencoderKL, AutoencoderKLConfig
from models.vae.params import bfl_rules as vae_rules

SIZES = dict(  # noqa: C408
    transformer=FluxConfig(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    ),
    text_encoder=CLIPTextConfig(
        vocab_size=2560,
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=2,
    ),
    text_encoder_2=T5Config(
        vocab_size=2048,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    ),
    vae=AutoencoderKLConfig(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
)


def random_transformer(config=SIZES["transformer"]):
    return random_module(lambda: FluxTransformer(config, rngs=TracingRngs()))


def random_vae(config=SIZES["vae"]):
    return random_module(lambda: AutoencoderKL(config, rngs=TracingRngs()))


def save_bfl_transformer(module, file, prefix=""):
    tensors = export_params(module, transformer_rules())
    save_file({prefix + name: x for name, x in tensors.items()}, file)


def save_bfl_vae(module, file):
    save_file(export_params(module, vae_rules(module.config)), file)


def save_diffusers_transformer(module, folder):
    TRANSFORMER.export(module, folder, dtype=jnp.float32)
