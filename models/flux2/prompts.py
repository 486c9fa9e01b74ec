"""How FLUX.2 klein reads prompts: three states of a Qwen3, side by side.

After diffusers' `Flux2KleinPipeline._get_qwen3_prompt_embeds`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.text_encoders.chat import chat_tokens, qwen_turn
from models.text_encoders.decoder import Decoder, DecoderConfig, decoder_component
from models.tokenizers import Tokens

LONGEST = 512  # tokens, the template's and padding included, which the transformer attends to
TEMPLATE = qwen_turn(thinking=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(DecoderConfig):
    """A decoder of whose states FLUX.2 klein takes three: layers above are never read."""

    hidden_states: tuple[int, ...] | None = (9, 18, 27)


TEXT_ENCODER = decoder_component(TextConfig)


def text_tokens(tokenizer: Any, prompts: Sequence[str]) -> Tokens:
    """Return the tokens of prompts, [prompts, 512]; a warning says what is cut from one."""
    return chat_tokens(tokenizer, prompts, TEMPLATE, longest=LONGEST)


def encode_tokens(
    encoder: Decoder,
    ids: jax.Array,  # int32 [batch, tokens]
    mask: jax.Array,  # int32 [batch, tokens], 0 for padding
) -> jax.Array:
    """Return the transformer's text tokens, [batch, tokens, channels of all states]."""
    return jnp.concatenate(encoder(ids, mask), axis=-1)
