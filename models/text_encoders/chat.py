"""Prompts as turns of a chat, which is what the language models among the encoders read.

A template is text that a family's model was trained behind, so it is written down here and not
taken from the tokenizer's folder, whose own is a program.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from models.stored_files import CheckpointError
from models.tokenizers import Tokens, warn_of_cut

_MARK = r"<\|\w+\|>|</?\w+>"  # such as <|im_start|> and </think>: tokens of their own


# Qwen3's tokens of their own that templates have, behind that of padding.
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What stands around a prompt."""

    before: str
    after: str

    def __call__(self, prompt: str) -> str:
        """Return the text that the model reads."""
        return f"{self.before}{prompt}{self.after}"

    def misfits(self, tokenizer: Any) -> Iterator[str]:
        """Yield why a tokenizer of transformers isn't the text encoder's: it lacks marks.

        It would cut them into letters, which the model never saw there.
        """
        marks = dict.fromkeys(re.findall(_MARK, self.before + self.after))
        if missing := [x for x in marks if len(_ids(tokenizer, x)) > 1]:
            yield (
                f"the tokenizer has no token for {', '.join(missing)}; give the one that was "
                "published with the text encoder"
            )


def qwen_turn(*, thinking: bool) -> ChatTemplate:
    """Return Qwen3's template of one user's turn and the beginning of the answer.

    Args:
      thinking: whether the model is to think first; else the answer begins with empty thoughts, as
        transformers' `apply_chat_template(..., enable_thinking=False)` has it.
    """
    thoughts = "" if thinking else "<think>\n\n</think>\n\n"
    return ChatTemplate(
        before="<|im_start|>user\n",
        after=f"<|im_end|>\n<|im_start|>assistant\n{thoughts}",
    )


def chat_tokens(
    tokenizer: Any,
    prompts: Sequence[str],
    template: ChatTemplate,
    *,
    longest: int,
    multiple: int | None = None,
) -> Tokens:
    """Return the tokens of prompts in a template; a warning says what is cut from one.

    Args:
      tokenizer: of transformers.
      prompts: one or several.
      template: what stands around each.
      longest: tokens that are kept, the template's included; the rest is cut off the end.
      multiple: pad on the right, to the longest of the texts and a multiple of this, so that texts
        of some lengths share a compiled program. None: pad to `longest`, on the tokenizer's side.

    Raises:
      CheckpointError: the tokenizer is of another model: it lacks tokens of the template.
    """
    for misfit in template.misfits(tokenizer):
        raise CheckpointError(misfit)
    texts = [template(prompt) for prompt in prompts]
    whole = tokenizer(texts, verbose=False)["input_ids"]
    for prompt, ids in zip(prompts, whole, strict=True):
        warn_of_cut(tokenizer, prompt, ids, longest)
    padding: dict[str, Any] = {"padding": "max_length"}
    if multiple is not None:
        padding = {"padding": "longest", "pad_to_multiple_of": multiple, "padding_side": "right"}
    encoded = tokenizer(texts, max_length=longest, truncation=True, **padding)
    return Tokens.of(encoded)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
