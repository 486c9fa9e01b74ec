"""Whether the components of a model fit each other, from their configs alone."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from models.stored_files import CheckpointError

if TYPE_CHECKING:
    from models.family import Family


def check_fit(
    family: "Family", configs: Mapping[str, Any], tokenizers: Mapping[str, Any] | None = None
) -> None:
    """Raise CheckpointError, naming both sizes, where components of a model don't fit.

    Args:
      family: of the model.
      configs: of its components by name, such as a FluxConfig; those left out fit.
      tokenizers: of transformers, by name.
    """
    if problems := list(family.misfits(configs, tokenizers or {})):
        raise CheckpointError(f"components don't fit: {'; '.join(problems)}")


def tokenizer_misfits(name: str, tokenizer: Any, encoder: Any) -> Iterator[str]:
    """Yield why ids of a tokenizer mean nothing to a text encoder.

    Args:
      name: of the tokenizer.
      tokenizer: of transformers.
      encoder: the encoder's config, with `vocab_size` and perhaps `eos_token_id`.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= encoder.vocab_size:
        yield f"{name} gives ids up to {largest}, and its encoder takes {encoder.vocab_size}"
    # 2 stands for the highest id, see CLIPTextEncoder.
    wanted = getattr(encoder, "eos_token_id", 2)
    if wanted not in (2, tokenizer.eos_token_id):
        yield f"{name} ends texts with id {tokenizer.eos_token_id}, and its encoder wants {wanted}"


def picture_misfits(vae: Any) -> Iterator[str]:
    """Yield why an autoencoder isn't one of pictures.

    Args:
      vae: its config, with `in_channels` and `out_channels`; None for none.
    """
    if vae and (vae.in_channels, vae.out_channels) != (3, 3):
        yield (
            f"the autoencoder takes images of {vae.in_channels} channels and gives "
            f"{vae.out_channels}, and 3 are needed"
        )


def length_misfits(encoder: Any, longest: int) -> Iterator[str]:
    """Yield why a text encoder can't read what it is given.

    Args:
      encoder: its config, with `longest`; None for none.
      longest: tokens of a text.
    """
    if encoder and encoder.longest < longest:
        yield f"text_encoder reads {encoder.longest} tokens at most, and texts have up to {longest}"
