"""One-pass activation quantization against stage 1 and stage 2 done apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import codec, quantize
from pallas_kernels.operands import Int8Rows, PackedRows, int8_values

X = np.random.default_rng(0).standard_normal((3, 37)).astype(np.float32)


@pytest.mark.parametrize("range_", ["absmax", "minmax"])
def test_eight_bits_are_stage_one(range_):
    rows = quantize.quantize(X, bits=8, range=range_)
    values, scale, lo = rows.values, rows.scale, rows.lo
    wanted, wanted_scale, wanted_lo = codec.quantize_8bit(X, range=range_)
    np.testing.assert_array_equal(values, codec.to_operand(wanted))
    np.testing.assert_array_equal(scale, wanted_scale)
    assert (lo is None) == (wanted_lo is None) == (range_ == "absmax")


@pytest.mark.parametrize(
    ("range_", "step", "rounding"),
    [
        ("absmax", "power", "nearest"),
        ("absmax", "power", "truncate"),
        ("absmax", "integer", "nearest"),
        ("minmax", "power", "nearest"),
    ],
)
def test_four_bits_are_both_stages_decoded(range_, step, rounding):
    options = {"group_size": 8, "step": step, "rounding": rounding}
    values = quantize.quantize(X, bits=4, range=range_, **options).values
    codes, shifts = codec.encode(codec.quantize_8bit(X, range=range_)[0], **options)
    wanted = codec.decode_packed(
        codec.pack(codes),
        codec.pack(shifts),
        group_size=8,
        step=step,
        signed=range_ == "absmax",
    )
    np.testing.assert_array_equal(values, wanted[:, :37])
    assert values.dtype == jnp.int8


@pytest.mark.parametrize("range_", ["absmax", "minmax"])
def test_packed_rows_hold_what_int8_rows_do(range_):
    x = X.astype(jnp.bfloat16)
    decoded, packed = (quantize.quantize(x, range=range_, packed=p) for p in (False, True))
    assert isinstance(decoded, Int8Rows)
    assert isinstance(packed, PackedRows)
    assert packed.shape == decoded.shape == X.shape
    np.testing.assert_array_equal(int8_values(packed), decoded.values)
    np.testing.assert_array_equal(packed.scale, decoded.scale)
    assert packed.range == range_


@pytest.mark.parametrize(
    ("options", "value_bits"),
    [
        ({}, 4),
        ({"bits": 8}, 8),
        ({"step": "integer"}, 8),
        ({"wide": (False, True, False)}, 8),
        ({"wide": (False, False, False)}, 4),
    ],
    ids=str,
)
def test_value_bits_say_what_float8_holds(options, value_bits):
    rows = quantize.quantize(X, **options)
    assert rows.value_bits == value_bits
    if value_bits == 4:
        values = rows.values.astype(jnp.float32)
        np.testing.assert_array_equal(values.astype(jnp.float8_e4m3fn).astype(jnp.float32), values)


def test_a_traced_mask_is_refused():
    with pytest.raises(ValueError, match="wide is traced; it must be static"):
        jax.jit(lambda mask: quantize.quantize(X, wide=mask))(np.ones(3, bool))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("range_", ["absmax", "minmax"])
def test_a_row_with_nan_has_scale_nan(bits, range_):
    x = X.copy()
    x[1, 3] = np.nan
    scale = quantize.quantize(x, bits=bits, range=range_).scale
    np.testing.assert_array_equal(np.isnan(scale[:, 0]), [False, True, False])


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits is 6; it must be 4 or 8"):
        quantize.quantize(X, bits=6)
