"""What only the TPU kernels have: tiles, types of operand, an order of weights, long division."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import quickly

from pallas_kernels import codec, device, quantize
from pallas_kernels.matmul import mosaic_tpu as tpu
from pallas_kernels.matmul import reference
from pallas_kernels.operands import Epilogue, Int8Rows, PackedRows
from pallas_kernels.quantize import mosaic_tpu as tpu_quantize

pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="TPU kernels are interpreted on the CPU only"
)


def packed_weights(rng, n, k, group_size, kind):
    """Return any codes but -8, which the format lacks, and any shifts, under scales of one."""
    padded = -(-k // group_size) * group_size
    low, high = (rng.integers(-7, 8, (n, padded // 2)) & 15 for _ in range(2))
    stretched = kind.get("levels") == "stretched"
    limit = 5 if kind["step"] == "power" else 14 if stretched else 16
    first, second = (rng.integers(0, limit, (n, -(-padded // group_size // 2))) for _ in range(2))
    return PackedRows(
        codes=jnp.asarray(low | high << 4, jnp.uint8),
        shifts=jnp.asarray(first | second << 4, jnp.uint8),
        scale=jnp.ones((n, 1)),
        group_size=group_size,
        padding=padded - k,
        **kind,
    )


def decoded_activations(rng, m, k, asymmetric):
    """Return 4-bit values times powers of two, the asymmetric ones less 128."""
    values = rng.integers(0 if asymmetric else -7, 16 if asymmetric else 8, (m, k))
    return jnp.asarray((values << rng.integers(0, 5, (m, k))) - 128 * asymmetric, jnp.int8)


def operands(rng, m, n, k, group_size, kind, asymmetric):
    """Return x and weights whose result is an integer below 2**24, which float32 shows whole."""
    values = decoded_activations(rng, m, k, asymmetric)
    lo = jnp.asarray(rng.integers(-9, 9, (m, 1)), jnp.float32) if asymmetric else None
    x = Int8Rows(values=values, scale=jnp.ones((m, 1)), lo=lo)
    return x, packed_weights(rng, n, k, group_size, kind)


def assert_equals_reference(run, x, w):
    """Compare a matmul with the reference's with ==."""
    epilogue = Epilogue(out_dtype=jnp.float32)
    ours = jax.jit(lambda x, w: run(x, w, epilogue), compiler_options=quickly())(x, w)
    theirs = jax.jit(lambda x, w: reference.matmul(x, w, epilogue))(x, w)
    np.testing.assert_array_equal(ours, theirs)


def run_with(operand):
    """Return `tpu.matmul` with a type of operand that the device wouldn't choose."""
    return lambda x, w, epilogue: tpu.matmul_prepared(x, tpu.prepare(w), epilogue, operand=operand)


def check_matmul(run, rng, m, n, k, *, group_size, asymmetric, **kind):
    assert_equals_reference(run, *operands(rng, m, n, k, group_size, kind, asymmetric))


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


V6E, V7X = device.describe("tpu", "TPU v6 lite"), device.describe("tpu", "TPU7x")


@pytest.mark.parametrize(
    ("target", "step", "value_bits", "operand"),
    [
        (V7X, "power", 4, jnp.float8_e4m3fn),
        (V7X, "power", 8, jnp.bfloat16),
        (V7X, "integer", 4, jnp.bfloat16),
        (V7X, None, 4, jnp.bfloat16),
        (V6E, "power", 4, jnp.int8),
    ],
    ids=str,
)
def test_the_operand_is_the_fastest_type_that_is_exact(target, step, value_bits, operand):
    assert tpu._best_operand(target, step, value_bits) == operand


@pytest.mark.parametrize("asymmetric", [False, True])
def test_float8_holds_every_code_at_every_shift(asymmetric):
    codes = jnp.arange(0, 16, dtype=jnp.uint8) if asymmetric else jnp.arange(-7, 8, dtype=jnp.int8)
    shifts = jnp.arange(5, dtype=jnp.uint8)[:, None]
    values = codec.decode(jnp.broadcast_to(codes, (5, codes.size)), shifts)
    np.testing.assert_array_equal(values, np.asarray(codes, int) << np.arange(5)[:, None])
    x, offset = tpu._as_operand(codec.to_operand(values), asymmetric, jnp.dtype("float8_e4m3fn"))
    assert (x.dtype, offset) == (jnp.float8_e4m3fn, 0)
    np.testing.assert_array_equal(x.astype(jnp.float32), values)


@pytest.mark.parametrize("range_", ["absmax", "minmax"])
def test_quantized_activations_give_the_same_integers_in_the_operand_of_v7x(range_):
    rng = np.random.default_rng(0)
    rows = quantize.quantize(rng.standard_normal((8, 100)).astype(np.float32), range=range_)
    lo = None if rows.lo is None else jnp.zeros_like(rows.lo)
    x = Int8Rows(values=rows.values, scale=jnp.ones((8, 1)), lo=lo)
    _, w = operands(rng, 8, 20, 100, 16, {"step": "power"}, False)
    assert_equals_reference(run_with(tpu._best_operand(V7X, "power", 4)), x, w)


@pytest.mark.parametrize("levels", ["uniform", "stretched"])
def test_integer_steps_are_exact_in_bfloat16(levels):
    options = {"group_size": 16, "step": "integer", "levels": levels, "asymmetric": False}
    check_matmul(run_with(jnp.bfloat16), np.random.default_rng(0), 40, 130, 300, **options)


@pytest.mark.parametrize("operand", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_sums_beyond_float32_integers_stay_exact(operand):
    k = 1500
    codes, shifts = codec.encode(jnp.full((1, k), 127, jnp.int8), group_size=16)
    w = PackedRows(
        codes=codec.pack(codes),
        shifts=codec.pack(shifts),
        scale=jnp.ones((1, 1)),
        padding=-k % 16,
    )
    x = Int8Rows(values=jnp.full((1, k), 112, jnp.int8).at[0, 0].set(1), scale=jnp.ones((1, 1)))
    # The sum is even and below 2**25, so float32 holds it though it doesn't hold its neighbours.
    y = run_with(operand)(x, w, Epilogue(out_dtype=jnp.float32))
    assert y[0, 0] == (k - 1) * 112**2 + 112


def test_float8_refuses_weights_that_it_cannot_hold():
    options = {"group_size": 16, "step": "integer", "asymmetric": False}
    with pytest.raises(ValueError, match="operand=float8_e4m3fn holds only"):
        check_matmul(run_with(jnp.float8_e4m3fn), np.random.default_rng(0), 1, 1, 16, **options)


def test_x_of_another_k_is_refused():
    weights = tpu.prepare(Int8Rows(values=jnp.zeros((4, 32), jnp.int8), scale=jnp.ones((4, 1))))
    x = Int8Rows(values=jnp.zeros((2, 16), jnp.int8), scale=jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="x has k=16 and weights have k=32"):
        tpu.matmul_prepared(x, weights, Epilogue())


def test_words_hold_the_codes_where_the_docstring_says():
    rng = np.random.default_rng(0)
    w = packed_weights(rng, 3, 256, 16, {"step": "power"})
    weights = tpu.prepare(w)
    words = np.asarray(weights.values).view(np.uint32)
    shift_words = np.asarray(weights.shifts).view(np.uint32)
    i, s, b, n = 2, 5, 3, 1
    code = codec.unpack(w.codes, signed=True)[n, 64 * i + 32 + 4 * s + b]
    assert (words[8 * i + s, n] >> 4 * (2 * b + 1)) & 15 == code + 8
    assert (shift_words[1, n] >> 4 * 6) & 15 == codec.unpack(w.shifts, signed=False)[n, 8 + 6]


@pytest.mark.parametrize("levels", [127, 255])
def test_division_is_correctly_rounded(levels):
    rng = np.random.default_rng(0)
    extent = np.ldexp(rng.uniform(1, 2, 100_000), rng.integers(-100, 128, 100_000))
    extent = np.concatenate([extent, [127, 255, 254, 2.0**-100, 3.4e38]]).astype(np.float32)
    result = jax.jit(functools.partial(tpu_quantize._divide, levels))(extent)
    np.testing.assert_array_equal(result, np.float32(levels) / extent)
