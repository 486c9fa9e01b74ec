"""One-pass activation quantization against stage 1 and stage 2 done apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import codec, functions, quantize
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


def test_a_traced_mask_is_as_a_static_one():
    mask = np.array([False, True, False])
    found = jax.jit(lambda mask: quantize.quantize(X, wide=mask))(mask)
    jax.tree.map(np.testing.assert_array_equal, found, quantize.quantize(X, wide=mask))


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


ACTIVATIONS = {  # in float64
    None: lambda y: y,
    "gelu": lambda y: y / (1 + np.exp(-np.sqrt(8 / np.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y / (1 + np.exp(-y)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("times", [None, 0, 17], ids=["alone", "gate last", "gate first"])
def test_a_part_is_columns_through_an_activation_times_others(activation, times):
    start = 17 if times == 0 else 3
    part = quantize.Part(array=X, start=start, size=14, activation=activation, times=times)
    wanted = ACTIVATIONS[activation](X[:, start : start + 14].astype(np.float64))
    if times is not None:
        wanted *= X[:, times : times + 14]
    np.testing.assert_allclose(functions.join((part,)), wanted, rtol=1e-5, atol=1e-6)


def test_a_gated_part_is_rounded_once():
    x = jnp.asarray(X, jnp.bfloat16)
    part = quantize.Part(array=x, start=0, size=16, activation="silu", times=16)
    wide = quantize.Part(**vars(part) | {"array": x.astype(jnp.float32)})
    wanted = functions.join((wide,)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(functions.join((part,)), wanted)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shifted", [False, True])
def test_norms_of_both_kinds_with_and_without_a_shift(kind, shifted):
    scale, shift = np.random.default_rng(1).standard_normal((2, 37)).astype(np.float32)
    norm = functions.Norm(scale=scale, shift=shift if shifted else None, epsilon=0.3, kind=kind)
    wide = X.astype(np.float64) + 1
    found = functions.modulate(jnp.asarray(wide, jnp.float32), norm)
    centred = wide - (wide.mean(axis=1, keepdims=True) if kind == "layer" else 0)
    wanted = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 0.3) * scale
    np.testing.assert_allclose(found, wanted + shift * shifted, rtol=1e-5, atol=1e-6)
    rows = quantize.quantize(jnp.asarray(wide, jnp.float32), bits=8, norm=norm)
    again = quantize.quantize(found, bits=8)
    np.testing.assert_array_equal(rows.values, again.values)
