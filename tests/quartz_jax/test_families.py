"""Recipes on the transformer of every family: which layers they touch, and that they run."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quartz_jax import QuantizedLinear, get_recipe, observe, place, quantize_model, sites
from quartz_jax.conversion import calibrate
from quartz_jax.conversion.calibrate import BlockRun, Calibration, in_order
from quartz_jax.conversion.model import plan_parts

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from random_weights import random_module
from transformer_cases import CASES, SIZES

KEPT = {"embed", "head"}  # roles that every built-in recipe leaves in 16 bits


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case):
    config = case.component.config.from_json(case.config)
    return random_module(lambda: case.component.build(config, jnp.float32))


def calls(case, batch=1, count=2):
    """Return arguments of calls, which differ."""
    made = [case.arguments(SIZES[0], batch) for _ in range(count)]
    return [jax.tree.map(lambda x, i=i: x * np.float32(1 + i), made[i]) for i in range(count)]


def run(model, arguments):
    return np.asarray(nnx.jit(lambda m, a: m(**a))(model, arguments))


def quantized_paths(model):
    return {
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedLinear)
    }


@pytest.mark.parametrize("batch", [1, 2])
def test_a_recipe_applies_to_all_but_embedders_and_heads_and_runs(case, model, batch):
    quantized, _ = quantize_model(model, get_recipe("w4a8x"))
    assert quantized_paths(quantized) == {s.path for s in sites(model) if s.role not in KEPT}
    placed, _ = place(quantized)
    arguments = case.arguments(SIZES[0], batch)
    found, expected = run(placed, arguments), run(model, arguments)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.5  # random weights, which are hard on 4 bits


def test_every_linear_states_its_role(model):
    assert all(
        module.role for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)
    )


def test_the_blocks_one_by_one_are_the_call(case, model):
    arguments = case.arguments(SIZES[0])

    @nnx.jit
    def stepwise(model, arguments):
        carry = model.start(**arguments)
        for _, block in model.blocks():
            carry = model.advance(block, carry)
        return model.finish(carry)

    found = np.asarray(stepwise(model, arguments))
    np.testing.assert_allclose(found, run(model, arguments), rtol=1e-4, atol=1e-4)


def test_a_calibrated_conversion_sees_every_layer_as_the_whole_model_does(case, model):
    """The statistics of a conversion block by block are those of `observe`."""
    recipe = get_recipe("w4a8x-gptq")
    samples = calls(case)
    shapes = nnx.eval_shape(lambda: model)
    parts = plan_parts(shapes, recipe)
    calibrate.check(shapes, recipe, parts, Calibration(make=lambda: samples, record=None))
    params = {
        ".".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
    needs = recipe.needs(sites(model))
    expected = observe(model, samples, needs)
    blockwise, seen = BlockRun(shapes, samples), {}
    for part in in_order(shapes, parts):
        seen |= blockwise.observe(part, params)
        blockwise.advance(part, params, recipe)
    assert seen.keys() == expected.keys() == needs.keys()
    for path, found in seen.items():
        largest = np.abs(expected[path].gram).max()
        np.testing.assert_allclose(
            found.gram, expected[path].gram, rtol=1e-3, atol=1e-3 * largest, err_msg=path
        )
