"""How Z-Image reads prompts: the last state but one of a Qwen3, without padding.

After diffusers' `ZImagePipeline._encode_prompt`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from models.text_encoders.chat import chat_tokens, qwen_turn
from models.text_encoders.decoder import Decoder, DecoderConfig, decoder_component
from models.tokenizers import Tokens

LONGEST = 512  # tokens, the template's included
_MULTIPLE = 32  # what the transformer pads texts to; lengths that share a compiled program
TEMPLATE = qwen_turn(thinking=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(DecoderConfig):
    """A decoder of which Z-Image takes what goes into the last layer, which is never read."""

    hidden_states: tuple[int, ...] | None = (-2,)


TEXT_ENCODER = decoder_component(TextConfig)


def text_tokens(tokenizer: Any, prompts: Sequence[str]) -> Tokens:
    """Return the tokens of prompts, padded on the right to a multiple of 32 and 512 at most.

    A warning says what is cut from a prompt.
    """
    return chat_tokens(tokenizer, prompts, TEMPLATE, longest=LONGEST, multiple=_MULTIPLE)


def encode_tokens(
    encoder: Decoder,
    ids: jax.Array,  # int32 [batch, tokens], padded on the right
) -> jax.Array:
    """Return the transformer's text tokens, [batch, tokens, channels].

    Those of padding mean nothing and are to be left out. No mask is needed for the others, since
    none of them sees what comes after it.
    """
    return encoder(ids)[0]
