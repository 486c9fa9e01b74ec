"""Recipes on the transformer of every family: which layers they touch, and that they run."""

import fnmatch
import inspect
import re
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
from quartz_jax.recipes.sites import ROLES

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from random_weights import random_module
from transformer_cases import CASES, SIZES

KEPT = {"embed", "head"}  # roles that every built-in recipe leaves in 16 bits


@pytest.fixture(scope="module", params=[name for name in CASES if name != "FLUX.2 dev"])
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case):
    config = case.component.config.from_json(case.config | case.shallow)
    return random_module(lambda: case.component.build(config, jnp.float32))


def calls(case, batch=1, count=2):
    """Return arguments of calls, which differ."""

    def scaled(factor):
        return lambda x: x * factor if jnp.issubdtype(x.dtype, jnp.floating) else x

    arguments = case.arguments(SIZES[0], batch)
    return [jax.tree.map(scaled(np.float32(1 + i)), arguments) for i in range(count)]


def run(model, arguments):
    return np.asarray(nnx.jit(lambda m, a: m(**a))(model, arguments))


def quantized_paths(model):
    return {
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedLinear)
    }


@pytest.fixture(scope="module")
def quantized(model):
    return quantize_model(model, get_recipe("w4a8x"))[0]


def test_a_recipe_applies_to_all_but_embedders_and_heads(model, quantized):
    assert quantized_paths(quantized) == {s.path for s in sites(model) if s.role not in KEPT}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_quantized_model_runs(case, model, quantized, batch):
    arguments = case.arguments(SIZES[0], batch)
    found, expected = run(place(quantized)[0], arguments), run(model, arguments)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.5  # random weights, which are hard on 4 bits


def test_the_layers_and_roles_are_those_of_the_family_s_readme(case, model):
    """Rows of the form | `glob of paths` | role | in the README beside the config."""
    readme = Path(inspect.getfile(case.component.config)).with_name("README.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \|", readme, re.M)
    stated = {glob: role for glob, role in rows if role in ROLES}
    found = {s.path: s.role for s in sites(model) if s.role not in KEPT}
    for path, role in found.items():
        assert [r for glob, r in stated.items() if fnmatch.fnmatch(path, glob)] == [role], path
    of_family = {site.path for other in CASES.values() for site in sites_like(case, other)}
    for glob in stated:  # those of a numbered block are of the published depth
        assert fnmatch.filter(of_family, re.sub(r"\.\d+\.", ".*.", glob)), glob


def sites_like(case, other):
    """Return the layers of another case, if it is of the same family."""
    if other.component is not case.component:
        return []
    config = case.component.config.from_json(other.config | other.shallow)
    return sites(nnx.eval_shape(lambda: case.component.build(config, jnp.float32)))


def test_every_linear_states_its_role(model):
    assert all(
        module.role for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)
    )


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
