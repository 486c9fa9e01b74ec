"""A tokenizer as Qwen3's, small enough for tests."""

import transformers
from tokenizers import pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# What Qwen3's own template makes of one turn: the lines that matter, in the words of its kind.
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def qwen_tokenizer():
    """Return a Qwen2 tokenizer of single bytes and a few merges, with Qwen3's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "i"), ("Ġi", "n"), ("c", "a"), ("ca", "t"), ("u", "s")]
    pieces = [*letters, *("".join(pair) for pair in merges)]
    made = transformers.Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        chat_template=TEMPLATE,
    )
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:3])})
    made.add_tokens(list(SPECIAL[3:]))
    return made
