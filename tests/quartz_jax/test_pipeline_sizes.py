"""Bytes that pipelines say a model takes before it loads: those it has on the device then."""

from pathlib import Path

import jax
import pytest
from flax import nnx

import models
from quartz_jax.pipelines import open_16_bit

MODEL = Path(models.__file__).parent / "tiny_flux"


@pytest.mark.parametrize("name", ["vae", "transformer"])
def test_a_deferred_model_knows_its_bytes_on_the_device(name):
    deferred = open_16_bit(MODEL, {}).pipeline.models[name]
    loaded = jax.tree.leaves(nnx.state(deferred.load()))
    assert deferred.bytes == sum(leaf.nbytes for leaf in loaded)  # stored in other bytes
