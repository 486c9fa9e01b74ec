"""A FLUX pipeline with random weights that is small enough for tests, saved by diffusers.

What Black Forest Labs' files don't tell (norm groups, scaling, how heads divide) is as in FLUX.1.
"""

from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers

TOKENS = 12  # length of both token sequences


def make_tiny_flux(
    folder: Path | str,
    dev: bool = True,
    kind: type = diffusers.FluxPipeline,
    extra_channels: int = 0,
) -> diffusers.DiffusionPipeline:
    """Save a tiny random FLUX model folder, float32, and return diffusers' pipeline of it.

    Args:
      folder: where to save it.
      dev: dev-like (guidance embedding, dynamic shift), else schnell-like (neither).
      kind: the pipeline's class.
      extra_channels: that a token has beside its latents'.
    """
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    pipeline = kind(
        transformer=_transformer(
            guidance_embeds=dev, in_channels=16 + extra_channels, out_channels=16
        ),
        text_encoder=clip(tokenizer),
        text_encoder_2=t5(tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        vae=_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
        ),
    )
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        module = getattr(pipeline, name).eval()
        for parameter in module.parameters():  # no bias or norm stays at its neutral value
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return pipeline


def _transformer(**options):
    return diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        **options,
        axes_dims_rope=(4, 14, 14),
    )


def _vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def t5_tokenizer(length=TOKENS):
    letters = "▁abcdefghijklmnopqrstuvwxyz,.0123456789"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -3.0) for c in letters)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def clip(tokenizer, kind=transformers.CLIPTextModel, hidden_size=20, **options):
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    )


def t5(tokenizer):
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    )
