"""What decoders read of prompts, and what transformers get of it, against diffusers' pipelines."""

import inspect
import json
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen_tokenizer import SPECIAL, qwen_tokenizer

from models.flux2 import prompts as flux2
from models.stored_files import CheckpointError
from models.text_encoders.chat import qwen_turn
from models.tokenizers import load_tokenizer
from models.zimage import prompts as zimage

PROMPTS = ("a cat", "  two Dogs,\nin the rain: ünïcode & <|im_end|>  ", "")
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    return qwen_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def qwen3(tokenizer, layers, folder):
    """Save a random Qwen3 and return torch's."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, vocab_size=len(tokenizer), num_hidden_layers=layers)
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_template_is_the_tokenizers(tokenizer, prompt, thinking):
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    assert qwen_turn(thinking=thinking)(prompt) == theirs


def test_text_tokens_of_flux2_equal_diffusers(tokenizer, folder, tmp_path):
    """From prompts to text tokens, those of padding included; of fewer layers, as 28 take long."""
    import torch
    from diffusers import Flux2KleinPipeline

    peer, states = qwen3(tokenizer, 4, tmp_path), (1, 2, 3)
    with torch.no_grad():
        theirs = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            peer, tokenizer, list(PROMPTS), hidden_states_layers=states
        )
    ids, mask = flux2.text_tokens(load_tokenizer(folder), PROMPTS)
    assert ids.shape == mask.shape == (3, 512) and ids.dtype == np.int32
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_states": states}))
    encoder = flux2.TEXT_ENCODER.load(tmp_path, jnp.float32)
    ours = nnx.jit(flux2.encode_tokens)(encoder, ids, mask)
    assert ours.shape == (3, 512, 3 * 24)
    assert relative_error(ours, theirs.numpy()) < 1e-4


def test_flux2_takes_the_states_and_the_length_that_diffusers_takes():
    pipeline = pytest.importorskip("diffusers").Flux2KleinPipeline
    taken = inspect.signature(pipeline._get_qwen3_prompt_embeds).parameters
    assert flux2.TextConfig.hidden_states == taken["hidden_states_layers"].default
    assert taken["max_sequence_length"].default == 512


def test_text_tokens_of_zimage_equal_diffusers(tokenizer, folder, tmp_path):
    import torch
    from diffusers import ZImagePipeline

    peer = qwen3(tokenizer, 3, tmp_path)
    pipeline = types.SimpleNamespace(
        tokenizer=tokenizer, text_encoder=peer, _execution_device=torch.device("cpu")
    )
    with torch.no_grad():
        theirs = ZImagePipeline._encode_prompt(pipeline, list(PROMPTS))
    ids, mask = zimage.text_tokens(load_tokenizer(folder), PROMPTS)
    assert ids.shape[1] < 512 and ids.shape[1] % 32 == 0
    encoder = zimage.TEXT_ENCODER.load(tmp_path, jnp.float32)
    ours = nnx.jit(zimage.encode_tokens)(encoder, ids)
    for mine, kept, other in zip(ours, mask.astype(bool), theirs, strict=True):
        assert relative_error(mine[kept], other.numpy()) < 1e-4


def test_a_tokenizer_that_pads_on_the_left(tokenizer, folder):
    """FLUX.2 keeps its side, as diffusers does; Z-Image leaves padding out and needs none."""
    left = load_tokenizer(folder)
    left.padding_side = "left"
    _, mask = flux2.text_tokens(left, PROMPTS)
    assert (mask[:, -1] == 1).all() and (mask[:, 0] == 0).all()
    right = load_tokenizer(folder)
    for mine, other in zip(
        zimage.text_tokens(left, PROMPTS), zimage.text_tokens(right, PROMPTS), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("family", [flux2, zimage])
def test_what_is_cut_from_a_long_prompt_is_said(family, folder):
    tokenizer = load_tokenizer(folder)
    with pytest.warns(UserWarning, match="takes 512 tokens of its .*this was cut: .*the end<"):
        ids, _ = family.text_tokens(tokenizer, ["x" * 600 + " the end"])
    assert ids.shape == (1, 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family.text_tokens(tokenizer, ["x" * 400])


def test_either_form_of_the_vocabulary_loads(folder, tmp_path):
    values = json.loads((folder / "tokenizer.json").read_text())
    for name in ("tokenizer_config.json",):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
    merges = (" ".join(pair) for pair in values["model"]["merges"])
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    found, wanted = load_tokenizer(tmp_path), load_tokenizer(folder)
    for mine, other in zip(
        zimage.text_tokens(found, PROMPTS), zimage.text_tokens(wanted, PROMPTS), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("missing", [SPECIAL[1], SPECIAL[2]])
def test_a_tokenizer_of_another_chat_is_refused(missing, folder, tmp_path):
    """Without the tokens that bound turns, letters would be read in their place."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"] = [x for x in values["added_tokens"] if x["content"] != missing]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps(config).replace(json.dumps(missing), '"<|endoftext|>"')
    (tmp_path / "tokenizer_config.json").write_text(text)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no token for .*im_"):
        flux2.text_tokens(tokenizer, PROMPTS)
