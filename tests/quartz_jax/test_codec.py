"""Quartz tensors against an independent oracle, and odd inputs."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import spec_oracle
import strategies
from hypothesis import given, settings

from pallas_kernels.operands import Int8Rows
from quartz_jax.formats import Int, Quartz
from quartz_jax.formats.storage import (
    WeightError,
    check_finite,
    decode,
    dequantize,
    quantize,
    row_operand,
)

VARIANTS = {
    "power": Quartz(),
    "truncate": Quartz(rounding="truncate"),
    "integer": Quartz(step="integer", group_size=8),
    "minmax": Quartz(range="minmax"),
    "minmax-truncate": Quartz(range="minmax", rounding="truncate", group_size=8),
    "block": Quartz(scale_block=32),
    "minmax-block": Quartz(range="minmax", scale_block=32),
    "stretched": Quartz(step="integer", levels="stretched"),
    "stretched-block": Quartz(step="integer", levels="stretched", group_size=8, scale_block=16),
    "searched": Quartz(step="integer", search=True),
    "stretched-searched": Quartz(step="integer", levels="stretched", search=True),
}
SHAPES = ((2, 37), (1, 2, 64), (3, 1))


def assert_stored(q, expected):
    """Compare every stored array, and the decoded integers, for equality."""
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_array_equal(q.shifts, expected.shifts)
    np.testing.assert_array_equal(q.scale, expected.scale)
    np.testing.assert_array_equal(decode(q), expected.decoded)
    if expected.lo is not None:
        np.testing.assert_array_equal(q.lo, expected.lo)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@given(x=strategies.floats(*SHAPES))
def test_quantize_equals_the_oracle_bit_for_bit(variant, x):
    expected = spec_oracle.quantize(x, variant, search=variant.search)
    assert_stored(quantize(x, variant), expected)


@pytest.mark.parametrize("range_", ["absmax", "minmax"])
def test_rows_about_the_smallest_extent_equal_the_oracle(range_):
    """Random rows hardly ever come near the extent below which all is zero."""
    extents = 2.0**-100 * np.array([[0.5], [1 - 2**-24], [1], [1 + 2**-23], [1.5], [2], [2.5]])
    x = (extents * np.linspace(0, 1, 17)).astype(np.float32)
    variant = Quartz(range=range_)
    assert_stored(quantize(x, variant), spec_oracle.quantize(x, variant))


def test_values_beside_ties_are_rounded_by_the_true_quotient():
    rng = np.random.default_rng(0)
    largest = np.exp2(rng.uniform(-60, 60, (256, 1))).astype(np.float32)
    multiplier = np.float32(127) / largest
    ties = (rng.integers(-126, 126, (256, 63)) + np.float32(0.5)) / multiplier
    x = np.concatenate([largest, ties], axis=1).astype(np.float32)
    q = quantize(x, Int(width=8))
    np.testing.assert_array_equal(q.values, np.rint(x * multiplier))


@pytest.mark.parametrize("range_", ["absmax", "minmax"])
@given(x=strategies.floats((2, 37), dtypes=strategies.FLOATS))
def test_input_dtype_changes_nothing_but_its_own_rounding(range_, x):
    variant = Quartz(range=range_)
    assert_stored(quantize(x, variant), spec_oracle.quantize(x, variant))


@settings(max_examples=30)
@given(x=strategies.floats((2, 37)))
def test_eager_and_jit_store_the_same(x):
    with jax.disable_jit():
        eager = quantize(jnp.asarray(x))
    chex.assert_trees_all_equal(quantize(x), eager)


@pytest.mark.parametrize("range_", ["absmax", "minmax"])
@given(x=strategies.floats((2, 37)))
def test_eight_bits_are_stage_one(range_, x):
    q = quantize(x, Int(width=8, range=range_))
    row = spec_oracle.int8_row if range_ == "absmax" else spec_oracle.uint8_row
    for i, data in enumerate(x):
        values, *scales = row(data)
        np.testing.assert_array_equal(q.values[i], np.array(values) - 128 * (range_ == "minmax"))
        np.testing.assert_array_equal([q.scale[i, 0]], scales[:1])
        np.testing.assert_array_equal([] if q.lo is None else [q.lo[i, 0]], scales[1:])


@given(x=strategies.floats((2, 37)))
def test_four_bit_integers_are_round_to_nearest_of_seven_steps(x):
    q = row_operand(quantize(x, Int(width=4)))
    assert isinstance(q, Int8Rows)
    for i, data in enumerate(x):
        values, scale = spec_oracle.int8_row(data, limit=7)
        np.testing.assert_array_equal(decode(q)[i], values)
        np.testing.assert_array_equal(q.scale[i, 0], scale)


@settings(max_examples=50)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@given(x=strategies.floats((2, 37)))
def test_dequantize_is_decoded_times_scale_plus_lo(variant, x):
    # Bounded so that the sum of product and lo can't overflow; a fused product-and-add is allowed.
    q = quantize(np.clip(x, -1e30, 1e30), variant)
    offset = 0 if q.lo is None else 128
    product = (np.asarray(decode(q), np.float64) + offset) * spread(q.scale)
    lo = np.float64(0) if q.lo is None else np.float64(spread(q.lo))
    bound = 2.0**-23 * (np.abs(product) + np.abs(lo)) + 2.0**-126
    assert (np.abs(dequantize(q) - (product + lo)) <= bound).all()


def spread(scale):
    """Repeat scales [rows, 1, 2 or 3] to the elements that they belong to, [rows, 37]."""
    size = {1: 37, 2: 32, 3: 16}[scale.shape[1]]
    return np.repeat(np.asarray(scale), size, axis=1)[:, :37]


@pytest.mark.parametrize("dtype", strategies.FLOATS)
def test_dequantize_returns_the_asked_dtype(dtype):
    q = quantize(jnp.ones((2, 16)))
    assert dequantize(q, dtype).dtype == dtype


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_zero_rows_come_back_as_zeros(variant):
    q = quantize(jnp.zeros((2, 40)), variant)
    np.testing.assert_array_equal(dequantize(q), np.zeros((2, 40)))
    np.testing.assert_array_equal(q.scale, np.zeros_like(q.scale))


def test_constant_rows_come_back_exactly_from_the_asymmetric_range():
    q = quantize(jnp.full((2, 40), 3.3), Quartz(range="minmax"))
    np.testing.assert_array_equal(dequantize(q), np.full((2, 40), np.float32(3.3)))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", [(1,), (5,), (16,), (0, 20), (2, 3, 4, 17), (2, 1)])
def test_any_shape_keeps_its_shape(shape, variant):
    def all_of_it(x):
        q = quantize(x, variant)
        assert q.shape == shape
        return decode(q), dequantize(q)

    for y in jax.eval_shape(all_of_it, jax.ShapeDtypeStruct(shape, jnp.float32)):
        assert y.shape == shape


@pytest.mark.parametrize("axis", [0, 1, 2, -3, -2, -1])
def test_any_axis_equals_moving_it_last_first(axis):
    x = np.random.default_rng(0).standard_normal((5, 18, 21)).astype(np.float32)
    q = quantize(x, axis=axis)
    last = quantize(np.moveaxis(x, axis, -1))
    assert q.shape == x.shape
    np.testing.assert_array_equal(q.codes, last.codes)
    np.testing.assert_array_equal(np.moveaxis(dequantize(q), axis, -1), dequantize(last))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("range_", ["absmax", "minmax"])
@pytest.mark.parametrize("kind", [Quartz, lambda range: Int(width=8, range=range)])
@pytest.mark.parametrize("k", [40, 320, 3072])  # XLA's maximum over long rows drops NaN on CPUs
def test_a_bad_activation_makes_its_row_nan_and_no_other(k, kind, range_, bad):
    x = np.random.default_rng(0).standard_normal((3, k)).astype(np.float32)
    x[1, 7] = bad
    q = quantize(x, kind(range=range_))
    y = np.asarray(dequantize(q))
    assert np.isnan(q.scale[1]).all() and np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_a_range_that_overflows_float32_is_nan():
    x = jnp.array([[-3e38, 3e38, 0.0]])
    assert jnp.isnan(dequantize(quantize(x, Int(width=8, range="minmax")))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_bad_weight_is_refused_by_name(dtype, bad):
    w = np.ones((3, 40), dtype)
    w[2, 3] = bad
    with pytest.raises(WeightError, match=r"weight of blocks\.3\.proj holds NaN or infinity"):
        check_finite("blocks.3.proj", w)


def test_a_good_weight_is_let_pass():
    check_finite("w", np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize(x.astype(jnp.int8)), "x has dtype int8"),
        (lambda x: quantize(x[0, 0]), "axis is -1"),
        (lambda x: quantize(x, axis=2), "axis is 2"),
        (lambda x: quantize(x[:, :0]), "must not be empty"),
        (lambda x: quantize(x, Int(), axis=0), "axis is -2 with int4"),
        (lambda x: quantize(x, Int(width=8, range="minmax"), axis=-2), "axis is -2 with int8"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 16)))
