"""Whether the components of a FLUX.1 model fit each other, from their configs alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.stored_files import CheckpointError
from models.text_encoders.clip import CLIPTextConfig
from models.text_encoders.t5 import T5Config


def check_fit(configs: Mapping[str, Any], tokenizers: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError, naming both sizes, where components of a FLUX.1 model don't fit.

    Args:
      configs: of the models by component, such as a FluxConfig; those left out fit.
      tokenizers: of transformers, by component.
    """
    transformer, vae = configs.get("transformer"), configs.get("vae")
    clip, t5 = configs.get("text_encoder"), configs.get("text_encoder_2")
    problems = []
    if transformer and transformer.in_channels != transformer.token_channels:
        problems.append(
            f"the transformer takes {transformer.in_channels} channels a token and gives "
            f"{transformer.token_channels}, so it isn't for text to image (those of FLUX.1 Fill, "
            "Canny and Depth aren't)"
        )
    elif transformer and vae and transformer.in_channels != 4 * vae.latent_channels:
        problems.append(
            f"the transformer takes {transformer.in_channels} channels a token, and the "
            f"autoencoder gives {4 * vae.latent_channels}"
        )
    if transformer and t5 and transformer.joint_attention_dim != t5.d_model:
        problems.append(
            f"the transformer takes text tokens of {transformer.joint_attention_dim} channels, and "
            f"text_encoder_2 gives {t5.d_model}"
        )
    if transformer and clip and transformer.pooled_projection_dim != clip.hidden_size:
        problems.append(
            f"the transformer takes pooled text of {transformer.pooled_projection_dim} channels, "
            f"and text_encoder gives {clip.hidden_size}"
        )
    if vae and (vae.in_channels, vae.out_channels) != (3, 3):
        problems.append(
            f"the autoencoder takes images of {vae.in_channels} channels and gives "
            f"{vae.out_channels}, and 3 are needed"
        )
    tokenizers = tokenizers or {}
    for name, encoder in {"tokenizer": clip, "tokenizer_2": t5}.items():
        if encoder and name in tokenizers:
            problems += _misfits(name, tokenizers[name], encoder)
    if problems:
        raise CheckpointError(f"components don't fit: {'; '.join(problems)}")


def _misfits(name: str, tokenizer: Any, encoder: CLIPTextConfig | T5Config) -> Iterator[str]:
    """Yield why ids of a tokenizer mean nothing to a text encoder."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= encoder.vocab_size:
        yield f"{name} gives ids up to {largest}, and its encoder takes {encoder.vocab_size}"
    # 2 stands for the highest id, see CLIPTextEncoder.
    wanted = getattr(encoder, "eos_token_id", 2)
    if wanted not in (2, tokenizer.eos_token_id):
        yield f"{name} ends texts with id {tokenizer.eos_token_id}, and its encoder wants {wanted}"
