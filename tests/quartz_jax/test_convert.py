import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import INT8, QUARTZ, RECIPE, Block, X, build, poison, rule
from flax import nnx
from layers import EVERY_OP, rows_of, seen_of

from models.linear import Part
from quartz_jax import Int, QuantizedLinear, Recipe, Report, quantize_model
from quartz_jax.conversion.model import abstract_quantized, plan_parts, stored_arrays
from quartz_jax.formats import NVFP4
from quartz_jax.formats.storage import dequantize
from quartz_jax.rounding import Gptq
from quartz_jax.transforms import LowRank, Rotate, Sort, run_ops


@pytest.fixture(scope="module")
def quantized():
    return quantize_model(build(), RECIPE)


def types(model):
    modules = nnx.iter_modules(model)
    return {".".join(map(str, path)): type(module) for path, module in modules}


def test_linears_with_a_rule_are_replaced_and_others_are_not(quantized):
    found = types(quantized[0])
    replaced = {path for path, kind in found.items() if kind is QuantizedLinear}
    assert replaced == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}
    assert found["embed"] is nnx.Linear


def test_the_original_model_is_untouched():
    model = build()
    before = model(X)
    quantize_model(model, RECIPE)
    np.testing.assert_array_equal(model(X), before)
    assert QuantizedLinear not in types(model).values()


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
    rules = (rule(r"blocks\.0\.up"), *RECIPE.rules)
    model, report = quantize_model(build(), Recipe(name="test", rules=rules))
    assert types(model)["blocks.0.up"] is nnx.Linear
    assert "blocks.0.up" not in [layer.path for layer in report.layers]


HOLDERS = {
    "List": lambda x: nnx.List([x]),
    "Dict": lambda x: nnx.Dict({"x": x}),
    "Sequential": lambda x: nnx.Sequential(x, nnx.relu),
    "list": lambda x: nnx.data([x, None]),
    "dict": lambda x: nnx.data({"x": [x], "y": jnp.ones(3)}),
    "tuple": lambda x: nnx.data((x,)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_linear_is_replaced_wherever_it_lies(holder):
    class Holder(nnx.Module):
        def __init__(self):
            self.layers = HOLDERS[holder](nnx.Linear(16, 16, rngs=nnx.Rngs(0)))

    model, report = quantize_model(Holder(), everything())
    kinds = list(types(model).values())
    assert len(report.layers) == kinds.count(QuantizedLinear) == 1
    assert nnx.Linear not in kinds


class Shared(nnx.Module):
    """One linear under two names, arrays that are no weights, and integers among parameters."""

    def __init__(self):
        self.a = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        self.b = self.a
        self.ids = nnx.BatchStat(jnp.array([3003, 70001]))
        self.table = nnx.Param(jnp.array([3003]))
        self.factor = nnx.BatchStat(jnp.float32([1.0001]))

    def __call__(self, x):
        return self.b(self.a(x))


def test_defect_6_a_linear_under_two_names_is_one_quantized_linear_under_both():
    model, report = quantize_model(Shared(), everything())
    assert isinstance(model.a, QuantizedLinear)
    assert model.b is model.a
    assert [layer.path for layer in report.layers] == ["a"]


def test_defect_2_only_floating_parameters_are_rounded_and_stored_in_bfloat16():
    """Integer buffers and float32 ones were, too: 3003 became 3008."""
    model, _ = quantize_model(Shared(), everything())
    stored = stored_arrays(nnx.state(model))
    for arrays in ({name: getattr(model, name).get_value() for name in ("ids", "table")}, stored):
        np.testing.assert_array_equal(arrays["ids"], [3003, 70001])
        np.testing.assert_array_equal(arrays["table"], [3003])
    assert stored["factor"].dtype == jnp.float32
    assert stored["factor"] == jnp.float32(1.0001)
    assert stored["a.bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_quantized_linear_computes_in_the_dtype_of_the_linear(dtype):
    model = nnx.Sequential(nnx.Linear(16, 16, dtype=dtype, rngs=nnx.Rngs(0)))
    quantized, _ = quantize_model(model, everything())
    x = jnp.ones((2, 16))
    assert quantized(x).dtype == model(x).dtype
    parts = (Part(array=x, size=8), Part(array=x, start=8, size=8))
    assert quantized.layers[0](parts).dtype == model(x).dtype


def every_op(**fields):
    """A recipe that fits one of each op to the first linears of the blocks."""
    fields = {"weight": QUARTZ, "activation": INT8, "transforms": EVERY_OP} | fields
    return Recipe(name="every op", rules=(rule(r"blocks\.\d+\.up", **fields),))


SEEN = {f"blocks.{i}.up": seen_of(rows_of(i)) for i in range(2)}


@pytest.mark.parametrize("rounding", [{}, {"rounding": Gptq()}], ids=["nearest", "gptq"])
def test_a_layer_s_tree_and_a_part_s_arrays_are_those_that_were_planned(rounding):
    recipe = every_op(**rounding)
    model, _ = quantize_model(build(), recipe, SEEN)
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), stored_arrays(nnx.state(m)))
        for m in (model, abstract_quantized(build, recipe))
    ]
    assert shapes[0] == shapes[1]
    assert len(model.blocks[0].up.ops.get_value()) == len(EVERY_OP)

    expected = stored_arrays(nnx.state(model))
    params = {path: np.asarray(x) for path, x in flat(build()).items()}
    parts = plan_parts(nnx.eval_shape(build), recipe)
    assert [part.name for part in parts] == ["blocks.0", "blocks.1", "other"]
    found = {}
    for part in parts:
        arrays, reports = part.quantize({name: params[name] for name in part.params}, SEEN)
        assert len(reports) == len(part.layers)
        assert {n: (x.shape, x.dtype) for n, x in arrays.items()} == {
            n: (x.shape, x.dtype) for n, x in part.arrays.items()
        }
        found |= arrays
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def flat(model):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def test_rows_of_a_large_weight_go_in_slices_with_the_same_result(monkeypatch):
    recipes = [every_op(transforms=(), activation=None), every_op(weight=NVFP4(), transforms=())]
    expected = [flat(quantize_model(build(), recipe)[0]) for recipe in recipes]
    monkeypatch.setattr("quartz_jax.conversion.model._ELEMENTS_AT_ONCE", 8 * 32)
    for recipe, arrays in zip(recipes, expected, strict=True):
        jax.tree.map(
            np.testing.assert_array_equal, flat(quantize_model(build(), recipe)[0]), arrays
        )


def test_a_calibrated_recipe_without_statistics_is_refused_by_layer_and_need():
    with pytest.raises(ValueError, match=r"blocks\.0\.up needs absmax of its inputs"):
        quantize_model(build(), every_op())
    with pytest.raises(ValueError, match=r"is calibrated: blocks\.1\.up needs"):
        quantize_model(build(), every_op(), {"blocks.0.up": SEEN["blocks.0.up"]})


def test_a_transform_that_does_not_fit_a_layer_is_refused_by_name():
    class Odd(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(18, 4, rngs=nnx.Rngs(0))

    recipe = everything(transforms=(Rotate(),))
    for quantize in (
        lambda: quantize_model(Odd(), recipe),
        lambda: abstract_quantized(Odd, recipe),
    ):
        with pytest.raises(ValueError, match=r"a: rotation needs a multiple of 4 channels"):
            quantize()


def test_a_traced_model_is_refused_by_name():
    with pytest.raises(ValueError, match=r"weight of blocks\.0\.down is traced"):
        nnx.eval_shape(lambda: quantize_model(build(), RECIPE)[0])


def test_a_rule_that_matches_nothing_is_refused_by_name():
    recipe = Recipe(name="test", rules=(rule("blocks.9.up", QUARTZ, QUARTZ),))
    with pytest.raises(ValueError, match=r"'blocks\.9\.up' matches no linear"):
        quantize_model(build(), recipe)


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
    assert "int8" in lines[2]
    assert "weight-only" in lines[1]
    assert lines[-1].split()[0] == "total"
    assert f"{quantized[1].bytes:,}" in lines[-1]


def test_a_zero_weight_has_no_error():
    model = build()
    kernel = model.blocks[0].up.kernel
    kernel.set_value(jnp.zeros_like(kernel.get_value()))
    report = quantize_model(model, RECIPE)[1]
    assert {layer.path: layer.relative_error for layer in report.layers}["blocks.0.up"] == 0


def test_a_layer_s_error_is_measured_behind_its_ops_as_if_in_front_of_them():
    exact = build().blocks[0].up.kernel.get_value().astype(jnp.bfloat16).astype(jnp.float32)
    for chain in ((Sort(), Rotate(block=16)), EVERY_OP):
        recipe = every_op(transforms=chain, weight=Int(width=4))
        model, report = quantize_model(build(), recipe, SEEN)
        layer = model.blocks[0].up
        ops, weight = layer.ops.get_value(), dequantize(layer.weight.get_value())

        def product(x, ops=ops, weight=weight):
            given, more = run_ops(ops, x)
            return given @ weight.T + (0 if more is None else more)

        error = product(jnp.eye(32)) - product(jnp.zeros((1, 32))) - exact
        expected = float(jnp.linalg.norm(error) / jnp.linalg.norm(exact))
        # channels that are taken out are rounded to bfloat16, which isn't counted
        assert report.layers[0].relative_error == pytest.approx(expected, rel=1e-2), chain


def test_the_output_s_error_is_measured_on_what_was_seen():
    recipe = every_op(rounding=Gptq(), transforms=(), weight=Int(width=4))
    model, report = quantize_model(build(), recipe, SEEN)
    rows = SEEN["blocks.0.up"].rows.reshape(-1, 32)
    exact = build().blocks[0].up.kernel.get_value().astype(jnp.bfloat16).astype(jnp.float32)
    error = rows @ (dequantize(model.blocks[0].up.weight.get_value()).T - exact)
    expected = jnp.linalg.norm(error) / jnp.linalg.norm(rows @ exact)
    assert report.layers[0].output_error == pytest.approx(float(expected), rel=1e-3)


def test_what_ops_hold_is_counted():
    plain, branch = (
        quantize_model(build(), every_op(transforms=chain), SEEN)[1].layers[0].weight_bytes
        for chain in ((), (LowRank(rank=2, iterations=1),))
    )
    assert branch == plain + 2 * 2 * (32 + 64)


def test_a_report_says_role_execution_and_bits_of_the_input(quantized):
    layers = {layer.path: layer for layer in quantized[1].layers}
    assert layers["blocks.0.up"].role == "linear"
    assert layers["blocks.0.up"].execution == "int8"
    assert layers["blocks.0.up"].input_bits == pytest.approx(4.25 + 1)
    assert layers["blocks.0.down"].execution == "weight-only"
    assert quantized[1].execution == "int8"


def test_a_recipe_is_not_needed_to_know_the_model():
    report = quantize_model(Block(16, nnx.Rngs(0)), everything())[1]
    assert [layer.path for layer in report.layers] == ["down", "up"]


def everything(**fields):
    fields = {"weight": INT8, "activation": INT8} | fields
    return Recipe(name="all", rules=(rule(".*", **fields),))
