import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from models.linear import Part, modulate
from quartz_jax import Format, QuartzConfig, QuartzLinear, dequantize, place
from quartz_jax.engine.linear import (
    FEW_ROWS,
    abstract_weight,
    encode_activation,
    encode_weight,
    round_to_bf16,
)
from quartz_jax.engine.place import place_weight

BF16 = Format(kind="bf16")
INT8 = Format(kind="int8")
INT4 = Format(kind="int4")
POWER = Format(kind="quartz", config=QuartzConfig())
MINMAX = Format(kind="quartz", config=QuartzConfig(range="minmax"))
INTEGER = Format(kind="quartz", config=QuartzConfig(step="integer"))
SEARCHED = Format(kind="quartz", config=QuartzConfig(step="integer"), search=True)
BLOCKS = Format(kind="quartz", config=QuartzConfig(scale_block=16))
WEIGHTS = [INT8, INT4, POWER, SEARCHED, BLOCKS]
ACTIVATIONS = [INT8, Format(kind="int8", range="minmax"), INT4, POWER, MINMAX, INTEGER, BLOCKS]

K, N = 40, 6  # K is no multiple of the group
RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(K, N)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=N), jnp.float32)
X = jnp.asarray(RNG.normal(size=(2, 3, K)), jnp.float32)


def layer(weight, activation, bias=BIAS):
    bias = None if bias is None else nnx.Param(bias)
    return QuartzLinear(encode_weight("layer", KERNEL, weight), bias, activation)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("activation", [BF16, *ACTIVATIONS], ids=str)
def test_the_output_is_the_product_of_the_dequantized_operands(weight, activation):
    x = X.reshape(-1, K)
    x = x if activation == BF16 else dequantize(encode_activation(x, activation))
    expected = x @ dequantize(encode_weight("layer", KERNEL, weight)).T + BIAS
    found = layer(weight, activation)(X)
    # float32 rounding; a weight-only layer rounds few rows to 16 bits of their largest magnitude
    bound = 2**-14 if activation == BF16 else 1e-5
    assert relative_error(found.reshape(-1, N), expected) < bound


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_weight_only_layer_gives_few_rows_what_it_gives_many(weight):
    rows = jnp.asarray(RNG.normal(size=(2 * FEW_ROWS, K)), jnp.float32)
    many = layer(weight, BF16)(rows)
    few = jnp.concatenate([layer(weight, BF16)(rows[i : i + 1]) for i in range(2 * FEW_ROWS)])
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    sums = jnp.abs(dequantize(encode_weight("layer", KERNEL, weight))).sum(axis=1)
    # Half a step of 16 bits for each element, and float32's rounding.
    assert (jnp.abs(few - many) <= largest * sums * 2**-16 + 1e-5).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("activation", [BF16, *ACTIVATIONS], ids=str)
def test_what_surrounds_the_matmul_is_as_if_done_apart(activation, batch):
    shift, scale = (jnp.asarray(RNG.normal(size=(batch, 1, K)), jnp.float32) for _ in range(2))
    gate = jnp.asarray(RNG.normal(size=(batch, 1, N)), jnp.float32)
    residual = jnp.asarray(RNG.normal(size=(batch, 3, N)), jnp.float32)
    module = layer(POWER, activation)
    around = {"modulation": (shift, scale), "activation": "gelu"}
    found = module(X[:batch], gate=gate, residual=residual, **around)
    plain = module(modulate(X[:batch], shift, scale))
    expected = residual + gate * nnx.gelu(plain, approximate=True)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("activation", [BF16, *ACTIVATIONS], ids=str)
def test_parts_of_the_input_are_as_if_joined(activation):
    wide = jnp.asarray(RNG.normal(size=(2, 3, 50)), jnp.float32)
    parts = (Part(array=X, size=16), Part(array=wide, start=7, size=24, activation="gelu"))
    module = layer(POWER, activation)
    joined = jnp.concatenate([part.value() for part in parts], axis=-1)
    assert relative_error(module(parts), module(joined)) < 1e-4


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_placed_weights_give_the_same_output(weight):
    module = layer(weight, POWER)
    expected = module(X)
    place(module)
    np.testing.assert_array_equal(module(X), expected)


@pytest.mark.parametrize("weight", [POWER, SEARCHED, INT4], ids=str)
def test_expanded_weights_are_int8_and_give_the_same_output(weight):
    module = layer(weight, POWER)
    expected = module(X)
    place(module, expand=True)
    assert module.weight.get_value().values.dtype == jnp.int8
    np.testing.assert_array_equal(module(X), expected)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "TPU v6 lite"])
def test_weights_are_placed_in_the_order_of_the_devices_kernel(kind):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    chip = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    weight = encode_weight("layer", KERNEL, POWER)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        placed = jax.eval_shape(lambda w: place_weight(w, False), weight)
    assert (placed.implementation, placed.shape) == (f"mosaic_{platform}", (N, K))


def test_a_weight_only_layer_keeps_the_packed_order():
    module = layer(POWER, BF16)
    place(module, expand=True)
    assert module.weight.get_value().codes.dtype == jnp.uint8


@pytest.mark.parametrize("activation", [BF16, INT8, POWER], ids=str)
def test_the_output_is_near_that_of_the_original_linear(activation):
    assert relative_error(layer(POWER, activation)(X), X @ KERNEL + BIAS) < 0.2


@pytest.mark.parametrize("activation", [BF16, POWER], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_output_has_the_dtype_of_the_input(activation, dtype):
    y = layer(POWER, activation)(X.astype(dtype))
    assert (y.dtype, y.shape) == (dtype, (2, 3, N))


@pytest.mark.parametrize("activation", [BF16, POWER], ids=str)
def test_a_layer_without_bias(activation):
    difference = layer(POWER, activation)(X) - layer(POWER, activation, bias=None)(X)
    np.testing.assert_allclose(difference, jnp.broadcast_to(BIAS, difference.shape), atol=1e-5)


@pytest.mark.parametrize("activation", [BF16, INT4, MINMAX], ids=str)
def test_jit_with_the_state_as_an_argument_changes_nothing(activation):
    module = layer(POWER, activation)
    graphdef, state = nnx.split(module)
    jitted = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_allclose(jitted(state, X), module(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_in_a_token_makes_that_token_nan_and_no_other(activation):
    y = layer(POWER, activation)(X.at[1, 2, 5].set(jnp.nan))
    np.testing.assert_array_equal(jnp.isnan(y).all(-1), [[False] * 3, [False, False, True]])
    assert jnp.isnan(y).sum() == N


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_or_infinity_in_a_weight_is_refused_by_name(weight, bad):
    with pytest.raises(ValueError, match=r"blocks\.0\.lin holds NaN"):
        encode_weight("blocks.0.lin", KERNEL.at[0, 0].set(bad), weight)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_an_abstract_weight_has_the_shapes_of_the_real_one(weight):
    real = encode_weight("layer", KERNEL, weight)
    abstract = abstract_weight(jax.ShapeDtypeStruct(KERNEL.shape, KERNEL.dtype), weight)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )


def test_a_weight_is_quantized_from_its_bfloat16_values():
    exact, rounded = (encode_weight("layer", x, POWER) for x in (KERNEL, round_to_bf16(KERNEL)))
    jax.tree.map(np.testing.assert_array_equal, exact, rounded)


def test_optimizers_see_no_quantized_weight():
    assert list(nnx.to_pure_dict(nnx.state(layer(POWER, POWER), nnx.Param))) == ["bias"]
