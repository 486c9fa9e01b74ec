"""Captioned images from .npz files, and the two tokenizers made from their captions.

One file holds `blob` (image files end to end), `off` (int64 [n + 1] offsets into it), `caption`
and `style` (str [n]). A caption such as "pizza" in style "3d" reads "a pizza, 3d style".
A folder of photos by class (`models.photos`) is captioned "a photo of a goldfish".
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.photos import check_photos, decode, read_photos


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionedImages:
    """Images with their captions, whole in memory."""

    images: np.ndarray  # uint8 [n, height, width, 3]
    prompts: list[str]  # "a pizza, 3d style"
    prompts_bare: list[str]  # "pizza, 3d style"


def check_images(path: Path) -> None:
    """Raise ValueError unless a path is a file, or a folder with what one of photos holds."""
    if path.is_dir():
        check_photos(path)
    elif not path.is_file():
        raise ValueError(f"{path} doesn't exist; give an .npz of images or a folder of photos")


def read_captioned_images(path: Path) -> CaptionedImages:
    """Decode every image of the file, or of the folder of photos, and write out its captions."""
    return _read_photos(path) if path.is_dir() else _read_emoji(path)


def _read_emoji(path: Path) -> CaptionedImages:
    with np.load(path) as file:
        images = decode(file["blob"], file["off"])
        captions, styles = file["caption"].tolist(), file["style"].tolist()
    bare = [f"{caption}, {style} style" for caption, style in zip(captions, styles, strict=True)]
    return CaptionedImages(
        images=images, prompts=[with_article(text) for text in bare], prompts_bare=bare
    )


def _read_photos(folder: Path) -> CaptionedImages:
    photos = read_photos(folder)
    names = [entry["name"].lower() for entry in photos.classes]
    bare = [names[label] for label in photos.labels]
    return CaptionedImages(
        images=photos.images, prompts=[photo_prompt(x) for x in bare], prompts_bare=bare
    )


def photo_prompt(name: str) -> str:
    """Return the caption of a photo by the name of its class."""
    return f"a photo of {with_article(name)}"


def with_article(text: str) -> str:
    """Put "a" or "an" in front."""
    return ("an " if text[0] in "aeiou" else "a ") + text


def train_t5_tokenizer(prompts: Iterable[str], vocab_size: int, length: int):
    """Return a unigram tokenizer whose pieces are the captions' words, then single characters.

    A few thousand captions are too few for subwords to mean anything, so every word that occurs
    is a piece and characters only spell unknown words. Input is lower-cased.
    """
    counts: dict[str, int] = {}
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    for prompt in prompts:
        for piece, _ in splitter.pre_tokenize_str(prompt.lower()):
            counts[piece] = counts.get(piece, 0) + 1
    characters = [chr(code) for code in range(32, 127) if not chr(code).isupper()] + ["▁"]
    words = sorted(set(counts) - set(characters), key=lambda word: (-counts[word], word))
    total = sum(counts.values())
    scored = [(word, float(np.log(counts[word] / total))) for word in words]
    floor = min(score for _, score in scored) - 10.0
    special = ["<pad>", "</s>", "<unk>"]
    room = vocab_size - len(special) - len(characters)
    vocab = [(piece, 0.0) for piece in special] + scored[:room] + [(c, floor) for c in characters]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def train_clip_tokenizer(prompts: Iterable[str], vocab_size: int, length: int) -> CLIPTokenizer:
    """Return CLIP's byte-pair tokenizer with merges learned from the captions."""
    own = CLIPTokenizer().backend_tokenizer
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(unk_token=special[1], end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = own.normalizer, own.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=length)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> np.ndarray:
    """Return int32 [prompts, model_max_length], padded and truncated."""
    encoded = tokenizer(prompts, padding="max_length", truncation=True)
    return np.asarray(encoded["input_ids"], np.int32)
