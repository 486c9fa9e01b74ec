"""QuantizedLinear against the definition of a layer, and what surrounds its product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import INT8, QUARTZ
from flax import nnx
from layers import layer_of
from test_transforms import FORMS

from models.linear import Linear, Norm, Part, modulation, normalize
from pallas_kernels.operands import Epilogue
from quartz_jax import (
    BlockRows,
    Int,
    LayerRecipe,
    QuantizedLinear,
    Quartz,
    dequantize,
    get_recipe,
)
from quartz_jax.conversion.model import quantize_layer
from quartz_jax.engine.linear import FEW_ROWS, how_it_runs
from quartz_jax.engine.matmul import multiply, simulated_dot
from quartz_jax.engine.observe import whole_input
from quartz_jax.formats import IF4, MXFP4, NVFP4, SDR, FittedTable, HiF4, Table
from quartz_jax.recipes import RECIPES
from quartz_jax.transforms import (
    BlockRotation,
    LowRank,
    Offset,
    Op,
    Permute,
    Product,
    ResidualChannels,
    Rotate,
    Scale,
    Seen,
    Shift,
    Smooth,
    Sort,
    TakeOut,
    run_ops,
)

K, N = 48, 6  # K is no multiple of 64
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 3, K)) * np.exp(RNG.normal(size=K)), jnp.float32)
LAYER = layer_of(0, N, K)
BIAS = LAYER.bias
STRETCHED = Quartz(step="integer", levels="stretched")
BLOCKS = Quartz(scale_block=16)
WEIGHTS = [INT8, Int(width=4), QUARTZ, Quartz(step="integer", search=True), BLOCKS, MXFP4()]
WEIGHTS += [Table(), FittedTable(), Quartz(group_size=128), IF4()]
ACTIVATIONS = [INT8, Int(width=8, range="minmax"), Int(width=4), QUARTZ, STRETCHED, BLOCKS]
ACTIVATIONS += [Quartz(range="minmax"), Quartz(group_size=128), NVFP4(), SDR(base=16)]
# A chain for each op, and one with all of them
CHAINS = [
    (Smooth(alpha=0.5),),
    (Rotate(block=16),),
    (Rotate(block=4),),  # of a size that the quantize pass lacks
    (Sort(),),
    (Shift(),),
    (LowRank(rank=2, iterations=1),),
    (ResidualChannels(count=3),),
    (LowRank(rank=2, iterations=1), Rotate(block=16), Smooth(alpha=0.5), Rotate(block=16)),
    (ResidualChannels(count=2), Smooth(alpha=0.5), Shift(), LowRank(rank=2, iterations=1), Sort()),
]
chains = pytest.mark.parametrize(
    "chain", CHAINS, ids=lambda c: "+".join(type(t).__name__ for t in c)
)


@functools.cache
def fitted(weight, chain):
    recipe = LayerRecipe(weight=weight, transforms=chain)
    return quantize_layer("layer", LAYER.weight, BIAS, recipe, LAYER.seen)[0]


def layer(weight, activation, chain=(), bias=True):
    """A quantized linear; these transforms don't look at the format of the input."""
    bias = nnx.Param(BIAS) if bias else None
    made = fitted(weight, chain)
    return QuantizedLinear(made.weight, bias, activation, made.ops)


def ops_of(module):
    return module.ops.get_value() if module.ops else ()


def definition(module, x):
    """The input through the ops, in its format; times the stored weight; plus what ops add.

    A last branch beside an int8 input reads that, by factors in int8.
    """
    ops = ops_of(module)
    reads_int8 = bool(ops) and isinstance(ops[-1], Product) and module.activation == INT8
    given, added = run_ops(ops[:-1] if reads_int8 else ops, x)
    given = given if module.activation is None else module.activation(given)
    y = simulated_dot(given, dequantize(module.weight.get_value()))
    if reads_int8:
        inner = simulated_dot(given, INT8(ops[-1].down.T))
        y = y + simulated_dot(inner, ops[-1].up.astype(jnp.float32))
    y = y if module.bias is None else y + module.bias.get_value()
    return y if added is None else y + added


def relative_error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


PAIRS = [(weight, activation) for weight in WEIGHTS for activation in (None, INT8, NVFP4())]
PAIRS += [(weight, activation) for weight in (QUARTZ, BLOCKS) for activation in ACTIVATIONS]


@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=str)
def test_the_output_is_the_product_of_the_dequantized_operands(weight, activation):
    module = layer(weight, activation)
    # float32 rounding; a weight-only layer rounds few rows to 16 bits of their largest magnitude
    bound = 2**-13 if activation is None else 1e-5
    assert relative_error(module(X), definition(module, X)) < bound


@chains
@pytest.mark.parametrize("activation", [None, INT8, NVFP4()], ids=str)
def test_ops_run_as_the_layer_defines_them(chain, activation):
    module = layer(QUARTZ, activation, chain)
    # As above: each op computes the same float32 numbers, so that no code differs.
    bound = 2**-13 if activation is None else 1e-5
    assert relative_error(module(X), definition(module, X)) < bound


def presets():
    """Every layer that the presets know, once, with searches in their quick forms."""
    found = {}
    for name in RECIPES:
        for rule in get_recipe(name).rules:
            found.setdefault(str(rule.layer), (f"{name} {rule.match}", rule.layer))
    return [pytest.param(layer, id=name) for name, layer in found.values() if layer.weight]


@pytest.mark.parametrize("recipe", presets())
def test_the_layers_of_every_preset_are_their_definition(recipe):
    quick = tuple(FORMS.get(type(t).__name__, t) for t in recipe.transforms)
    recipe = LayerRecipe(**vars(recipe) | {"transforms": quick})
    fitted, report = quantize_layer("layer", LAYER.weight, BIAS, recipe, LAYER.seen)
    module = QuantizedLinear(fitted.weight, nnx.Param(BIAS), recipe.activation, fitted.ops)
    bound = 2**-13 if recipe.activation is None else 1e-5
    assert relative_error(module(X), definition(module, X)) < bound
    assert report.execution == ("weight-only" if recipe.activation is None else "int8")
    assert relative_error(module(X), LAYER(X)) < 0.4  # truncated inputs and weights are the worst


def around(batch):
    shift, scale = (jnp.asarray(RNG.normal(size=(batch, 1, K)), jnp.float32) for _ in range(2))
    gate = jnp.asarray(RNG.normal(size=(batch, 1, N)), jnp.float32)
    residual = jnp.asarray(RNG.normal(size=(batch, 3, N)), jnp.float32)
    return {
        "norm": modulation(shift, scale),
        "gate": gate,
        "residual": residual,
        "activation": "gelu",
    }


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("activation", [None, INT8, Quartz(range="minmax"), NVFP4()], ids=str)
def test_what_surrounds_the_product_is_as_if_done_apart(activation, batch):
    given = around(batch)
    module = layer(QUARTZ, activation)
    plain = module(normalize(X[:batch], given["norm"]))
    expected = given["residual"] + given["gate"] * nnx.gelu(plain, approximate=True)
    assert relative_error(module(X[:batch], **given), expected) < 1e-4


@pytest.mark.parametrize("batch", [1, 2])
@chains
def test_ops_run_behind_the_modulation_and_what_they_add_before_gelu_and_gate(chain, batch):
    given = around(batch)
    module = layer(INT8, INT8, chain)
    plain = definition(module, normalize(X[:batch], given["norm"]))
    expected = given["residual"] + given["gate"] * nnx.gelu(plain, approximate=True)
    # A factor goes into the norm's, so that float32 rounds elsewhere: an 8-bit input may fall to
    # the other side of a half, by a 127th of its row's maximum.
    assert relative_error(module(X[:batch], **given), expected) < 3e-3


@pytest.mark.parametrize(
    ("activation", "chain"),
    [*((INT8, chain) for chain in CHAINS), (None, ()), (Quartz(range="minmax"), ())],
    ids=str,
)
def test_parts_of_the_input_are_as_if_joined(activation, chain):
    wide = jnp.asarray(RNG.normal(size=(2, 3, 50)), jnp.float32)
    parts = (Part(array=X, size=24), Part(array=wide, start=7, size=24, activation="gelu"))
    module = layer(QUARTZ, activation, chain)
    joined = jnp.concatenate([part.value() for part in parts], axis=-1)
    assert relative_error(module(parts), module(joined)) < 1e-4


@chains
def test_the_output_has_the_dtype_of_the_input(chain):
    for activation in (None, INT8):
        y = layer(QUARTZ, activation, chain)(X.astype(jnp.bfloat16))
        assert (y.dtype, y.shape) == (jnp.bfloat16, (2, 3, N))
        assert relative_error(y.astype(jnp.float32), LAYER(X)) < 0.25


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 2, 3, K)])
def test_any_leading_axes(shape):
    x = jnp.resize(X, shape)
    for activation in (None, INT8, NVFP4()):
        module = layer(QUARTZ, activation)
        assert relative_error(module(x), definition(module, x)) < 2**-13


@pytest.mark.parametrize("format_", [NVFP4(), NVFP4(block_max="4or6"), IF4()], ids=str)
@pytest.mark.parametrize("chain", [(), (Sort(),), (Smooth(alpha=0.5),), (Shift(),)])
def test_an_image_s_result_does_not_depend_on_others_in_the_batch(format_, chain):
    """Formats with a scale for the tensor have one for each image."""
    module = layer(format_, format_, chain)
    x = X * jnp.float32([1, 50])[:, None, None]
    np.testing.assert_allclose(module(x)[0], module(x[:1])[0], rtol=1e-5, atol=1e-5)


EXECUTION = {
    "int8": [
        (QUARTZ, INT8),
        (QUARTZ, QUARTZ),
        (Int(width=4), Int(width=4)),
        (SDR(), INT8),
        (Table(), INT8),
        (FittedTable(), Quartz(range="minmax")),
        (Quartz(group_size=128), INT8),
    ],
    "int8 blocks": [(BLOCKS, INT8), (INT8, BLOCKS), (Int(width=4), BLOCKS)],
    "bf16": [(NVFP4(), NVFP4()), (MXFP4(), HiF4()), (SDR(), SDR(base=16))],
    "simulated": [(NVFP4(), INT8), (INT8, NVFP4()), (IF4(), IF4()), (Int(block=16), INT8)],
    "weight-only": [(QUARTZ, None), (NVFP4(), None)],
}


@pytest.mark.parametrize("how", EXECUTION)
def test_how_pairs_of_formats_run(how):
    for weight, activation in EXECUTION[how]:
        stored = jax.eval_shape(weight.store, jax.ShapeDtypeStruct((N, K), jnp.float32))
        assert how_it_runs(stored, activation) == how, (weight, activation)


@pytest.mark.parametrize("pair", [(w, x) for w, x in EXECUTION["bf16"]], ids=str)
def test_products_in_bf16_are_exact_but_for_the_order_of_sums(pair):
    weight, x = pair[0].store(LAYER.weight), pair[1].store(X[0])
    assert isinstance(weight, BlockRows)
    found = multiply(x, weight, Epilogue(out_dtype=jnp.float32))
    a, b = (np.asarray(dequantize(t), np.float64) for t in (x, weight))
    assert (np.abs(found - a @ b.T) <= 2.0**-20 * (np.abs(a) @ np.abs(b).T)).all()


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_weight_only_layer_gives_few_rows_what_it_gives_many(weight):
    rows = jnp.asarray(RNG.normal(size=(2 * FEW_ROWS, K)), jnp.float32)
    module = layer(weight, None)
    many = module(rows)
    few = jnp.concatenate([module(rows[:1]), module(rows[1 : FEW_ROWS - 1])])
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    sums = jnp.abs(dequantize(module.weight.get_value())).sum(axis=1)
    # Half a step of 16 bits for each element, and float32's rounding.
    off = jnp.abs(few - many[: len(few)])
    assert (off <= (largest * sums)[: len(few)] * 2**-16 + 1e-5).all()


@pytest.mark.parametrize("activation", [None, QUARTZ], ids=str)
def test_a_layer_without_bias(activation):
    found = layer(QUARTZ, activation)(X) - layer(QUARTZ, activation, bias=False)(X)
    np.testing.assert_allclose(found, jnp.broadcast_to(BIAS, found.shape), atol=1e-4)


@pytest.mark.parametrize("activation", [None, Int(width=4), Quartz(range="minmax")], ids=str)
def test_jit_with_the_state_as_an_argument_changes_nothing(activation):
    module = layer(QUARTZ, activation, CHAINS[-1])
    graphdef, state = nnx.split(module)
    jitted = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_allclose(jitted(state, X), module(X), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a.rows_apart], ids=str)
def test_nan_in_a_token_makes_that_token_nan_and_no_other(activation):
    if isinstance(activation, SDR) or activation == Int(width=4):
        pytest.skip("these formats don't say what a NaN becomes")
    y = layer(QUARTZ, activation)(X.at[1, 2, 5].set(jnp.nan))
    assert not jnp.isnan(y[0]).any() and not jnp.isnan(y[1, :2]).any()
    assert jnp.isnan(y[1, 2]).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 3.4e38])
def test_a_weight_that_is_not_finite_in_bfloat16_is_refused_by_name(bad):
    weight = LAYER.weight.at[0, 0].set(bad)
    for format_ in (QUARTZ, NVFP4()):
        with pytest.raises(ValueError, match=r"blocks\.0\.lin holds NaN"):
            quantize_layer("blocks.0.lin", weight, None, LayerRecipe(weight=format_))


def test_a_weight_is_quantized_from_its_bfloat16_values():
    weight = LAYER.weight * 1.001
    made = [
        quantize_layer("x", w, None, LayerRecipe(weight=QUARTZ))[0].weight
        for w in (weight, weight.astype(jnp.bfloat16))
    ]
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_optimizers_see_neither_weights_nor_ops():
    module = layer(QUARTZ, QUARTZ, CHAINS[-1])
    assert list(nnx.to_pure_dict(nnx.state(module, nnx.Param))) == ["bias"]


def test_every_op_is_run_here():
    run = {type(op) for chain in CHAINS for op in ops_of(layer(QUARTZ, INT8, chain))}
    assert run == {BlockRotation, Offset, Permute, Product, Scale, TakeOut}
    assert run <= set(Op.__subclasses__())


NORMS = {
    "layer": {"epsilon": 1e-2},
    "rms": {"kind": "rms", "epsilon": 1e-2},
    "rms, scale only": {"kind": "rms", "shift": None},
    "rms, weights only": {"kind": "rms", "shift": None, "scale": jnp.linspace(0.5, 2, K)},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", NORMS)
def test_norms_of_every_form_keep_their_epsilon(form, batch):
    """Kernels fixed it at 1e-6: of small inputs with another, the output was wrong."""
    linear = Linear(K, N, rngs=nnx.Rngs(0))
    recipe = LayerRecipe(weight=INT8, activation=INT8)
    fitted, _ = quantize_layer("x", linear.kernel.get_value().T, linear.bias, recipe)
    norm = dataclasses.replace(around(batch)["norm"], **NORMS[form])
    x = 0.01 * X[:batch]
    expected = linear(x, norm=norm)
    assert relative_error(fitted.module(linear, recipe)(x, norm=norm), expected) < 0.03
    other = dataclasses.replace(norm, epsilon=1e-3)
    assert relative_error(linear(x, norm=other), expected) > 0.2
    found = whole_input(x, norm)
    np.testing.assert_allclose(found, normalize(x, norm), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(linear(found), expected, rtol=1e-4, atol=1e-5)


@chains
@pytest.mark.parametrize("batch", [1, 2])
def test_ops_run_behind_an_rms_norm(chain, batch):
    norm = dataclasses.replace(around(batch)["norm"], kind="rms", shift=None)
    module = layer(INT8, INT8, chain)
    expected = definition(module, normalize(X[:batch], norm))
    assert relative_error(module(X[:batch], norm=norm), expected) < 3e-3  # as above


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", [None, INT8, Quartz(range="minmax")], ids=str)
def test_gated_parts_are_as_if_multiplied_before(activation, gate_first):
    wide = jnp.asarray(RNG.normal(size=(2, 3, 60)), jnp.float32)
    gated = {"activation": "silu", "times": 28} if gate_first else {"activation": "gelu"}
    start = {"start": 4} if gate_first else {"start": 28, "times": 4}
    parts = (Part(array=X, size=24), Part(array=wide, size=24, **gated, **start))
    module = layer(QUARTZ, activation)
    act = nnx.silu if gate_first else functools.partial(nnx.gelu, approximate=True)
    first, second = wide[..., 4:28], wide[..., 28:52]
    product = act(first) * second if gate_first else first * act(second)
    joined = jnp.concatenate([X[..., :24], product], axis=-1)
    assert relative_error(module(parts), module(joined)) < 1e-4


@pytest.mark.parametrize("activation", [QUARTZ, Quartz(range="minmax"), STRETCHED], ids=str)
@pytest.mark.parametrize("chain", [(), (Rotate(block=16),), (Smooth(alpha=0.5), Sort())], ids=str)
def test_dear_groups_of_the_input_keep_eight_bits(chain, activation):
    recipe = LayerRecipe(weight=INT8, activation=activation, transforms=chain, wide=0.4)
    assert "absmax" in recipe.needs
    made, report = quantize_layer("layer", LAYER.weight, BIAS, recipe, LAYER.seen)
    module = QuantizedLinear(made.weight, nnx.Param(BIAS), activation, made.ops)
    groups = np.asarray(made.ops[-1].groups)
    assert groups.sum() == round(0.4 * -(-K // activation.group_size)) == 1

    given, _ = run_ops(made.ops, X)
    wide = np.repeat(groups, activation.group_size)[:K]
    given = jnp.where(wide, Int(width=8, range=activation.range)(given), activation(given))
    expected = simulated_dot(given, dequantize(made.weight)) + BIAS
    assert relative_error(module(X), expected) < 1e-5
    module.simulated = True
    assert relative_error(module(X), expected) < 1e-5
    assert report.execution == "int8"
    assert report.activation == f"{activation} 40% wide"
    assert report.input_bits == activation.bits(K) + 4 * 0.4


def test_the_groups_that_keep_eight_bits_are_those_that_lose_most():
    """Of inputs in two groups the one with large channels that large weights read."""
    rows = np.random.default_rng(0).normal(size=(2, 64, 48)).astype(np.float32)
    rows[..., 16:32] *= 8
    rows[..., 32:] *= 9
    weight = np.random.default_rng(1).normal(size=(8, 48)).astype(np.float32)
    weight[:, 32:] /= 9
    seen = Seen(absmax=jnp.asarray(np.abs(rows).max(axis=(0, 1))))
    recipe = LayerRecipe(weight=INT8, activation=QUARTZ, wide=0.34)
    made, _ = quantize_layer("layer", weight, None, recipe, seen)
    np.testing.assert_array_equal(made.ops[-1].groups, [False, True, False])


def test_a_batch_is_as_its_images_one_by_one():
    shift, scale = (jnp.asarray(RNG.normal(size=(2, 1, K)), jnp.float32) for _ in range(2))
    gate = jnp.asarray(RNG.normal(size=(2, 1, N)), jnp.float32)
    residual = jnp.asarray(RNG.normal(size=(*X.shape[:-1], N)), jnp.float32)
    module = layer(QUARTZ, QUARTZ, (Rotate(block=16),))
    call = jax.jit(
        lambda x, norm, gate, residual: module(x, norm=norm, gate=gate, residual=residual)
    )
    together = call(X, Norm(scale=scale, shift=shift), gate, residual)
    for i in range(2):
        at = slice(i, i + 1)
        alone = call(X[at], Norm(scale=scale[at], shift=shift[at]), gate[at], residual[at])
        np.testing.assert_allclose(together[at], alone, rtol=1e-6, atol=1e-5)
