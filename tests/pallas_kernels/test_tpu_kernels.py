"""TPU kernels in interpret mode: the same integers as the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import codec
from pallas_kernels.matmul import mosaic_tpu as tpu
from pallas_kernels.matmul import reference
from pallas_kernels.quantize import mosaic_tpu as tpu_quantize
from pallas_kernels.quantize import reference as reference_quantize

# Every shape compiles anew, so the examples are few and aren't shrunk.
few_examples = settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate])
seeds = st.integers(0, 2**31)


def packed_weights(rng, n, k, group_size, step):
    """Return any codes but -8, which the format lacks, and any shifts."""
    padded = -(-k // group_size) * group_size
    low, high = (rng.integers(-7, 8, (n, padded // 2)) & 15 for _ in range(2))
    limit = 5 if step == "power" else 16
    first, second = (rng.integers(0, limit, (n, -(-padded // group_size // 2))) for _ in range(2))
    return jnp.asarray(low | high << 4, jnp.uint8), jnp.asarray(first | second << 4, jnp.uint8)


def decoded_activations(rng, m, k, asymmetric):
    """Return 4-bit values times powers of two, the asymmetric ones less 128."""
    values = rng.integers(0 if asymmetric else -7, 16 if asymmetric else 8, (m, k))
    return jnp.asarray((values << rng.integers(0, 5, (m, k))) - 128 * asymmetric, jnp.int8)


def operands(rng, m, n, k, group_size, step, asymmetric):
    """Return arguments whose result is an integer below 2**24, so that float32 shows it whole."""
    codes, shifts = packed_weights(rng, n, k, group_size, step)
    x = decoded_activations(rng, m, k, asymmetric)
    ones = jnp.ones((m, 1)), jnp.ones((n, 1))
    lo = jnp.asarray(rng.integers(-9, 9, (m, 1)), jnp.float32) if asymmetric else None
    return (x, codes, shifts, *ones), {"x_lo": lo}


def assert_equals_reference(run, expected, arguments, options, **static):
    """Compare two functions with ==, compiled together."""

    @jax.jit
    def both(arguments, options):
        return run(*arguments, **options, **static), expected(*arguments, **options, **static)

    for ours, theirs in zip(*map(jax.tree.leaves, both(arguments, options)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def run_with(operand):
    """Return `tpu.matmul` with a type of operand that the device wouldn't choose."""

    def run(x, codes, shifts, x_scale, w_scale, *, x_lo, group_size, step, out_dtype):
        layout = {"k": x.shape[1], "group_size": group_size, "step": step}
        weights = tpu.prepare_weights(codes, shifts, w_scale, **layout)
        return tpu.matmul_prepared(
            x, weights, x_scale, x_lo=x_lo, out_dtype=out_dtype, operand=operand
        )

    return run


def check_matmul(run, rng, m, n, k, *, group_size, step, asymmetric):
    arguments, options = operands(rng, m, n, k, group_size, step, asymmetric)
    static = {"group_size": group_size, "step": step, "out_dtype": jnp.float32}
    assert_equals_reference(run, reference.matmul, arguments, options, **static)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("step", ["power", "integer"])
@pytest.mark.parametrize("group_size", [16, 32])
@few_examples
@given(seed=seeds, m=st.integers(1, 70), n=st.integers(1, 200), k=st.integers(1, 300))
def test_packed_integers_equal_the_reference(group_size, step, asymmetric, seed, m, n, k):
    rng = np.random.default_rng(seed)
    options = {"group_size": group_size, "step": step, "asymmetric": asymmetric}
    check_matmul(tpu.matmul, rng, m, n, k, **options)


@few_examples
@given(seed=seeds, m=st.integers(1, 70), n=st.integers(1, 200), k=st.integers(1, 300))
def test_plain_integers_equal_the_reference(seed, m, n, k):
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.integers(-127, 128, (rows, k)), jnp.int8) for rows in (m, n))
    arguments = x, w, jnp.ones((m, 1)), jnp.ones((n, 1))
    assert_equals_reference(
        tpu.matmul_int8, reference.matmul_int8, arguments, {}, out_dtype=jnp.float32
    )


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
@pytest.mark.parametrize("group_size", [8, 16, 64])
def test_many_tiles_make_up_the_whole_product(monkeypatch, kept_bytes, group_size):
    for name, value in {"_TILE_M": 32, "_TILE_K": 512, "_TILE_N": 128}.items():
        monkeypatch.setattr(tpu, name, value)
    monkeypatch.setattr(tpu, "_KEPT_BYTES", kept_bytes)
    options = {"group_size": group_size, "step": "power", "asymmetric": False}
    check_matmul(tpu.matmul, np.random.default_rng(0), 70, 300, 1100, **options)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("operand", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_other_operand_types_give_the_same_integers(operand, asymmetric):
    options = {"group_size": 16, "step": "power", "asymmetric": asymmetric}
    check_matmul(run_with(operand), np.random.default_rng(0), 40, 130, 300, **options)


def test_integer_steps_are_exact_in_bfloat16():
    options = {"group_size": 16, "step": "integer", "asymmetric": False}
    check_matmul(run_with(jnp.bfloat16), np.random.default_rng(0), 40, 130, 300, **options)


@pytest.mark.parametrize("operand", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_sums_beyond_float32_integers_stay_exact(operand):
    k = 1500
    codes, shifts = codec.encode(jnp.full((1, k), 127, jnp.int8), group_size=16)
    codes, shifts = codec.pack(codes), codec.pack(shifts)
    x = jnp.full((1, k), 112, jnp.int8).at[0, 0].set(1)
    weights = tpu.prepare_weights(codes, shifts, jnp.ones((1, 1)), k=k, group_size=16, step="power")
    # The sum is even and below 2**25, so float32 holds it though it doesn't hold its neighbours.
    y = tpu.matmul_prepared(x, weights, jnp.ones((1, 1)), out_dtype=jnp.float32, operand=operand)
    assert y[0, 0] == (k - 1) * 112**2 + 112


def test_float8_refuses_weights_that_it_cannot_hold():
    options = {"group_size": 16, "step": "integer", "asymmetric": False}
    with pytest.raises(ValueError, match="operand=float8_e4m3fn holds only"):
        check_matmul(run_with(jnp.float8_e4m3fn), np.random.default_rng(0), 1, 1, 16, **options)


def test_x_of_another_k_is_refused():
    weights = tpu.prepare_int8(jnp.zeros((4, 32), jnp.int8), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="x has k=16 and weights have k=32"):
        tpu.matmul_prepared(jnp.zeros((2, 16), jnp.int8), weights, jnp.ones((2, 1)))


def test_epilogue_is_residual_plus_gate_times_gelu():
    rng = np.random.default_rng(0)
    codes, shifts = packed_weights(rng, 140, 64, 16, "power")
    x = decoded_activations(rng, 33, 64, asymmetric=True)
    column, row = (lambda: rng.standard_normal(140), lambda: rng.random((33, 1)) / 100)
    x_scale, lo, w_scale = row(), row(), rng.random((140, 1)) / 100
    bias, gate, residual = column(), column(), rng.standard_normal((33, 140))
    weights = tpu.prepare_weights(
        codes, shifts, jnp.asarray(w_scale, jnp.float32), k=64, group_size=16, step="power"
    )
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    result = tpu.matmul_prepared(
        x,
        weights,
        as_float(x_scale),
        x_lo=as_float(lo),
        bias=as_float(bias),
        gelu=True,
        gate=as_float(gate),
        residual=as_float(residual),
        out_dtype=jnp.float32,
    )
    w = np.asarray(codec.decode_packed(codes, shifts, group_size=16), np.float64)
    y = ((np.asarray(x, np.float64) + 128) * x_scale + lo) @ (w * w_scale).T + bias
    expected = residual + gate * np.asarray(jax.nn.gelu(as_float(y), approximate=True))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_a_row_whose_scale_is_nan_is_nan():
    weights = tpu.prepare_int8(jnp.zeros((5, 16), jnp.int8), jnp.ones((5, 1)))
    x_scale = jnp.asarray([[1], [jnp.nan], [1]])
    y = tpu.matmul_prepared(jnp.zeros((3, 16), jnp.int8), weights, x_scale)
    np.testing.assert_array_equal(jnp.isnan(y).all(axis=1), [False, True, False])


def test_words_hold_the_codes_where_the_docstring_says():
    rng = np.random.default_rng(0)
    codes, shifts = packed_weights(rng, 3, 256, 16, "power")
    weights = tpu.prepare_weights(
        codes, shifts, jnp.ones((3, 1)), k=256, group_size=16, step="power"
    )
    words = np.asarray(weights.values).view(np.uint32)
    shift_words = np.asarray(weights.shifts).view(np.uint32)
    i, s, b, n = 2, 5, 3, 1
    code = codec.unpack(codes, signed=True)[n, 64 * i + 32 + 4 * s + b]
    assert (words[8 * i + s, n] >> 4 * (2 * b + 1)) & 15 == code + 8
    assert (shift_words[1, n] >> 4 * 6) & 15 == codec.unpack(shifts, signed=False)[n, 8 + 6]


CONFIGS = [
    {"bits": 8, "range": "absmax", "step": "power", "rounding": "nearest"},
    {"bits": 8, "range": "minmax", "step": "power", "rounding": "nearest"},
    {"bits": 4, "range": "absmax", "step": "power", "rounding": "nearest"},
    {"bits": 4, "range": "absmax", "step": "power", "rounding": "truncate"},
    {"bits": 4, "range": "minmax", "step": "power", "rounding": "nearest"},
    {"bits": 4, "range": "minmax", "step": "power", "rounding": "truncate"},
    {"bits": 4, "range": "absmax", "step": "integer", "rounding": "nearest"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
@few_examples
@given(
    seed=seeds,
    m=st.integers(1, 300),
    k=st.integers(1, 400),
    group_size=st.sampled_from([8, 16, 32, 64]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_quantized_values_and_scales_equal_the_reference(config, seed, m, k, group_size, dtype):
    rng = np.random.default_rng(seed)
    # Rows from zero and 2**-116 to 2**116, one-sided ones, and outliers within a row.
    x = rng.standard_normal((m, k)) * np.exp(rng.uniform(-80, 80, (m, 1)))
    x *= np.exp(rng.standard_normal((m, k))) * rng.integers(0, 5, (m, 1))
    x = jnp.asarray(np.where(rng.random((m, 1)) < 0.3, np.abs(x), x), dtype)
    static = config | {"group_size": group_size}
    assert_equals_reference(tpu_quantize.quantize, reference_quantize.quantize, (x,), {}, **static)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("range_", ["absmax", "minmax"])
def test_a_row_that_is_not_finite_has_scale_nan(range_, value):
    x = jnp.ones((40, 1152), jnp.bfloat16).at[3, 700].set(value)
    _, scale, _ = tpu_quantize.quantize(
        x, bits=4, group_size=16, range=range_, step="power", rounding="nearest"
    )
    np.testing.assert_array_equal(jnp.flatnonzero(jnp.isnan(scale)), [3])


@pytest.mark.parametrize("levels", [127, 255])
def test_division_is_correctly_rounded(levels):
    rng = np.random.default_rng(0)
    extent = np.ldexp(rng.uniform(1, 2, 100_000), rng.integers(-100, 128, 100_000))
    extent = np.concatenate([extent, [127, 255, 254, 2.0**-100, 3.4e38]]).astype(np.float32)
    result = jax.jit(functools.partial(tpu_quantize._divide, levels))(extent)
    np.testing.assert_array_equal(result, np.float32(levels) / extent)
