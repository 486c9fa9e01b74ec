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
