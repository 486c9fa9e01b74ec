"""The XLA matmul and its exact dots against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import codec, matmul
from pallas_kernels.matmul import xla

M, N, K = 5, 7, 70


def int8(seed, *shape, low=-127):
    return np.random.default_rng(seed).integers(low, 128, shape, np.int8)


@pytest.mark.parametrize("dot", [xla.int8_dot, xla.chunked_dot])
@pytest.mark.parametrize("k", [1, 1023, 1024, 1025, 5000])
def test_dots_are_exact_integers(dot, k):
    x, w = int8(0, 3, k, low=-128), int8(1, 4, k)
    np.testing.assert_array_equal(jax.jit(dot)(x, w), x.astype(np.int64) @ w.T.astype(np.int64))


@pytest.mark.parametrize("dot", [xla.int8_dot, xla.chunked_dot])
@pytest.mark.parametrize(("x", "w"), [(-128, -127), (-128, 127), (127, 127)])
def test_dots_are_exact_at_the_largest_products(dot, x, w):
    got = jax.jit(dot)(np.full((2, 4096), x, np.int8), np.full((3, 4096), w, np.int8))
    np.testing.assert_array_equal(got, np.full((2, 3), 4096 * x * w))


@settings(max_examples=50)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("step", ["power", "integer"])
@given(seed=st.integers(0, 2**32 - 1))
def test_packed_weights_multiply_as_in_the_reference(step, asymmetric, seed):
    rng = np.random.default_rng(seed)
    codes, shifts = codec.encode(int8(seed, N, K), group_size=16, step=step)
    x_scale, x_lo, w_scale, bias = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((M, 1), (M, 1), (N, 1), (N,))
    )
    y, wanted = (
        matmul.matmul(
            int8(seed + 1, M, K),
            codec.pack(codes),
            codec.pack(shifts),
            x_scale,
            w_scale,
            bias=bias,
            x_lo=x_lo if asymmetric else None,
            group_size=16,
            step=step,
            out_dtype=jnp.float32,
            implementation=name,
        )
        for name in ("xla", "reference")
    )
    np.testing.assert_array_equal(y, wanted)


def test_the_asymmetric_terms_undo_the_offset():
    u, w = np.array([[200, 3]], np.uint8), np.array([[5, -7]], np.int8)
    y = matmul.matmul_int8(
        codec.to_operand(u),
        w,
        np.full((1, 1), 0.5, np.float32),
        np.full((1, 1), 0.25, np.float32),
        x_lo=np.full((1, 1), -3, np.float32),
        out_dtype=jnp.float32,
    )
    assert y[0, 0] == (200 * 0.5 - 3) * 5 * 0.25 + (3 * 0.5 - 3) * -7 * 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_codes": np.zeros((N, 32), np.uint8)}, "w_codes holds 64 elements a row"),
        ({"x_scale": np.ones((M,), np.float32)}, "x_scale has shape"),
        ({"w_scale": np.ones((1, N), np.float32)}, "w_scale has shape"),
        ({"x_lo": np.ones((1, M), np.float32)}, "x_lo has shape"),
        ({"bias": np.ones((N, 1), np.float32)}, "bias has shape"),
    ],
)
def test_misshapen_arguments_are_refused_by_name(change, message):
    call = {
        "x": int8(0, M, K),
        "w_codes": np.zeros((N, 40), np.uint8),
        "w_shifts": np.zeros((N, 3), np.uint8),
        "x_scale": np.ones((M, 1), np.float32),
        "w_scale": np.ones((N, 1), np.float32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        matmul.matmul(**call, group_size=16, step="power")


def test_int8_operands_of_different_k_are_refused():
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="x has k=4 and w has k=5"):
        matmul.matmul_int8(int8(0, 1, 4), int8(0, 1, 5), one, one)
