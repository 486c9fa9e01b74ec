"""Checkpoints of models that no diffusers folder holds."""

import jax
import numpy as np
import pytest
from blocks import CONFIG, RECIPE, X, build
from flax import nnx

from quartz_jax import load_model, quantize_model, save_model
from quartz_jax.conversion import checkpoint

QUANTIZED, REPORT = quantize_model(build(), RECIPE)


def save_foreign(folder, model=QUANTIZED, **options):
    save_model(folder, model, **{"recipe": RECIPE, "report": REPORT, "config": CONFIG} | options)
    return folder


def test_a_model_without_a_base_is_saved_and_loaded_bit_for_bit(tmp_path):
    folder = save_foreign(tmp_path / "out")
    model, manifest = load_model(folder, build)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(QUANTIZED))
    np.testing.assert_array_equal(model(X), QUANTIZED(X))
    assert (manifest.base_name, manifest.recipe, manifest.report) == ("Model", RECIPE, REPORT)
    assert "quantized from Model" in checkpoint.describe(folder)


def test_a_model_without_a_base_may_have_no_config(tmp_path):
    folder = save_foreign(tmp_path / "out", config=None)
    model, _ = load_model(folder, lambda config: build(CONFIG | config))
    np.testing.assert_array_equal(model(X), QUANTIZED(X))


class WithKeys(nnx.Module):
    def __init__(self):
        self.inner, self.dropout = QUANTIZED, nnx.Dropout(0.1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"depth": X}}, "config must be a JSON object"),
        ({"model": WithKeys()}, r"random key, dropout\.rngs\.key"),
    ],
)
def test_a_model_that_cannot_be_saved_alone_is_refused_before_work(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_foreign(tmp_path / "out", **change)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_a_model_alone_is_not_replaced_unless_asked(tmp_path):
    folder = save_foreign(tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        save_foreign(folder)
    save_foreign(folder, overwrite=True)
    load_model(folder, build)
