"""The XLA matmul and its exact dots against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import codec, matmul
from pallas_kernels.matmul import xla
from pallas_kernels.operands import Epilogue, Int8Rows


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


def test_the_asymmetric_terms_undo_the_offset():
    u, w = np.array([[200, 3]], np.uint8), np.array([[5, -7]], np.int8)
    x = Int8Rows(
        values=codec.to_operand(u),
        scale=np.full((1, 1), 0.5, np.float32),
        lo=np.full((1, 1), -3, np.float32),
    )
    rows = Int8Rows(values=w, scale=np.full((1, 1), 0.25, np.float32))
    y = matmul.matmul(x, rows, Epilogue(out_dtype=jnp.float32))
    assert y[0, 0] == (200 * 0.5 - 3) * 5 * 0.25 + (3 * 0.5 - 3) * -7 * 0.25
