"""A decoder as text encoder under recipes: how near it stays, and its streamed conversion."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from random_weights import random_module

from models.checkpoint_io import TracingRngs
from models.text_encoders.decoder import DECODER, Decoder, DecoderConfig
from quartz_jax import get_recipe, observe, quantize_model, sites
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.calibrate import Calibration
from quartz_jax.conversion.checkpoint import CalibrationRecord
from quartz_jax.conversion.model import stored_arrays
from quartz_jax.conversion.stream import Conversion, Source

CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_states=(1, 2),  # so that one layer of the file is left alone
)
IDS = np.random.default_rng(0).integers(0, 50, (2, 13))
MASK = np.ones((2, 13), np.int32)
MASK[1, 8:] = 0
run = nnx.jit(Decoder.__call__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random decoder's files, in float32."""
    path = tmp_path_factory.mktemp("decoder")
    whole = DecoderConfig(**{**vars(CONFIG), "hidden_states": None})
    module = random_module(lambda: Decoder(whole, rngs=TracingRngs()))
    DECODER.export(module, path, jnp.float32)
    return path


@pytest.fixture(scope="module")
def opened(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_states": [1, 2]}))
    return DECODER.open(folder, jnp.float32)


# Rounding a normal row to b bits leaves about 2**(1 - b) of it: 1 % in 8 and 12 % in 4; 8 linears
# in a row add up to some 3 and 35 %. The steps of w4a16 are powers of two, up to twice
# as wide as need be.
@pytest.mark.parametrize("name,bound", [("w8a8", 0.05), ("w4a16", 0.6), ("w4a8x", 0.4)])
def test_a_quantized_decoder_stays_near(opened, name, bound):
    decoder = opened.load(jnp.float32)
    quantized, report = quantize_model(decoder, get_recipe(name))
    assert {layer.path.split(".", 2)[2] for layer in report.layers} == {
        "attention.qkv",
        "attention.out",
        "mlp.gate_up",
        "mlp.down",
    }
    for mine, other in zip(run(quantized, IDS, MASK), run(decoder, IDS, MASK), strict=True):
        error = np.linalg.norm(mine - other) / np.linalg.norm(other)
        assert 0 < error < bound


@pytest.mark.parametrize("name", ["w4a8x", "w4a8x-gptq"])
def test_a_streamed_conversion_gives_the_arrays_of_the_one_in_memory(opened, name, tmp_path):
    recipe, samples = get_recipe(name), [{"input_ids": IDS, "attention_mask": MASK}]
    record = CalibrationRecord(
        prompts_sha256="0" * 64, samples=1, steps=(0,), seed=0, propagate=False, size=(32, 32)
    )
    source = Source(
        name="transformer",  # what every checkpoint must have
        recipe=recipe,
        model=opened.abstract,
        read=opened.read,
        config=opened.config,
        files=tuple(set(opened.checkpoint.files.values())),
        calibration=Calibration(make=lambda: samples, record=record),
    )
    assert {part.name for part in source.parts} == {"other", "layers.0", "layers.1"}
    Conversion(base_name="base", sources=(source,), carried=()).run(tmp_path / "out")

    def build(values):
        config = DecoderConfig.from_json(values)
        return Decoder(config, rngs=TracingRngs())

    found, _ = checkpoint.load(tmp_path / "out", build)
    decoder = opened.load(jnp.float32)
    seen = observe(decoder, samples, recipe.needs(sites(decoder)))
    wanted, _ = quantize_model(decoder, recipe, seen)
    found, wanted = (stored_arrays(nnx.state(model)) for model in (found, wanted))
    assert found.keys() == wanted.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)
