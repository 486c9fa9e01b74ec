import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BF16, INT8, QUARTZ, RECIPE, Block, X, build, poison
from flax import nnx

from quartz_jax import QuartzLinear, Recipe, Report, Rule, quantize_model
from quartz_jax.conversion.model import abstract_quantized


@pytest.fixture(scope="module")
def quantized():
    return quantize_model(build(), RECIPE)


def types(model):
    modules = nnx.iter_modules(model)
    return {".".join(map(str, path)): type(module) for path, module in modules}


def test_linears_with_a_rule_are_replaced_and_others_are_not(quantized):
    found = types(quantized[0])
    replaced = {path for path, kind in found.items() if kind is QuartzLinear}
    assert replaced == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}
    assert found["embed"] is nnx.Linear


def test_the_original_model_is_untouched():
    model = build()
    before = model(X)
    quantize_model(model, RECIPE)
    np.testing.assert_array_equal(model(X), before)
    assert QuartzLinear not in types(model).values()


def test_the_quantized_model_computes_nearly_the_same(quantized):
    expected = build()(X)
    assert jnp.linalg.norm(quantized[0](X) - expected) < 0.1 * jnp.linalg.norm(expected)


def test_an_empty_recipe_only_rounds_to_bfloat16():
    state = nnx.state(quantize_model(build(), Recipe(name="bf16", rules=()))[0])
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(build()))
    jax.tree.map(np.testing.assert_array_equal, state, rounded)


def test_quantizing_the_rounded_model_gives_the_same_arrays(quantized):
    rounded, _ = quantize_model(build(), Recipe(name="bf16", rules=()))
    again, _ = quantize_model(rounded, RECIPE)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(quantized[0]))


def test_a_bf16_rule_leaves_a_linear_to_itself():
    rules = (Rule(pattern=r"blocks\.0\.up", weight=BF16, activation=BF16), *RECIPE.rules)
    model, report = quantize_model(build(), Recipe(name="test", rules=rules))
    assert types(model)["blocks.0.up"] is nnx.Linear
    assert "blocks.0.up" not in [layer.path for layer in report.layers]


def test_a_linear_directly_in_a_list_is_replaced():
    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=nnx.Rngs(0))])

    rule = Rule(pattern=r"layers\.0", weight=INT8, activation=INT8)
    model, _ = quantize_model(Stack(), Recipe(name="test", rules=(rule,)))
    assert isinstance(model.layers[0], QuartzLinear)


def test_a_rule_that_matches_nothing_is_refused_by_name():
    rule = Rule(pattern="blocks.9.up", weight=QUARTZ, activation=QUARTZ)
    with pytest.raises(ValueError, match=r"'blocks\.9\.up' matches no linear"):
        quantize_model(build(), Recipe(name="test", rules=(rule,)))


def test_nan_in_a_weight_is_refused_with_its_path():
    with pytest.raises(ValueError, match=r"weight of blocks\.1\.up holds NaN"):
        quantize_model(poison(build()), RECIPE)


def test_the_abstract_model_has_the_shapes_of_the_quantized_one(quantized):
    graphdef, state = nnx.split(abstract_quantized(build, RECIPE))
    expected_graphdef, expected = nnx.split(quantized[0])
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, expected)]
    assert shapes[0] == shapes[1]
    assert graphdef == expected_graphdef


def test_the_report_counts_the_bytes_that_are_stored(quantized):
    model, report = quantized
    packed = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.dtype != jnp.float32]
    scales = 4 * (2 * 64 + 2 * 32)
    sixteen_bit = 2 * sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert report.bytes == sum(leaf.nbytes for leaf in packed) + scales + sixteen_bit


def test_the_report_counts_two_bytes_a_parameter_of_the_original(quantized):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(build())))
    assert quantized[1].bytes_bf16 == 2 * parameters


def test_a_layer_s_error_is_that_of_its_dequantized_weight(quantized):
    layers = {layer.path: layer.relative_error for layer in quantized[1].layers}
    assert 0.05 < layers["blocks.0.up"] < 0.15  # 4 bits
    assert 0.001 < layers["blocks.0.down"] < 0.01  # 8 bits


def test_shifts_are_counted_a_group(quantized):
    layers = {layer.path: layer.shifts for layer in quantized[1].layers}
    assert sum(layers["blocks.0.up"]) == 64 * 32 // 16
    assert layers["blocks.0.down"] is None


def test_weight_bits_are_the_mean_over_the_stored_weights(quantized):
    layers = quantized[1].layers
    up = 4.25 + 32 / 32  # group of 16, a float32 scale a row of 32
    down = 8 + 32 / 64
    assert quantized[1].weight_bits == pytest.approx((up + down) / 2)
    assert layers[0].elements == layers[1].elements


def test_a_report_survives_json(quantized):
    text = json.dumps(quantized[1].to_json())
    assert Report.from_json(json.loads(text)) == quantized[1]


def test_a_report_that_does_not_add_up_is_refused(quantized):
    with pytest.raises(ValueError, match="don't add up"):
        Report.from_json(quantized[1].to_json() | {"bytes": 1})


def test_the_table_has_a_line_a_layer_and_the_totals(quantized):
    lines = quantized[1].table().splitlines()
    assert len(lines) == 1 + 4 + 2
    assert lines[-1].split()[0] == "total"
    assert f"{quantized[1].bytes:,}" in lines[-1]


def test_a_zero_weight_has_no_error():
    model = build()
    kernel = model.blocks[0].up.kernel
    kernel.set_value(jnp.zeros_like(kernel.get_value()))
    report = quantize_model(model, RECIPE)[1]
    assert {layer.path: layer.relative_error for layer in report.layers}["blocks.0.up"] == 0


def test_a_recipe_is_not_needed_to_know_the_model():
    report = dataclasses.asdict(quantize_model(Block(16, nnx.Rngs(0)), _all())[1])
    assert [layer["path"] for layer in report["layers"]] == ["down", "up"]


def _all():
    return Recipe(name="all", rules=(Rule(pattern=".*", weight=INT8, activation=INT8),))
