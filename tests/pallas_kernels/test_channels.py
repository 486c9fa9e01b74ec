"""The rotation and the factors of channels, against matrices and float32 sums one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize.channels import SIZES, hadamard, rotate, rotate_from, scale_channels

sizes = pytest.mark.parametrize("size", SIZES)


@sizes
def test_the_matrix_is_orthonormal_symmetric_and_regular(size):
    matrix = hadamard(size)
    np.testing.assert_array_equal(matrix @ matrix, np.eye(size))
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(matrix.sum(axis=1), 1)
    np.testing.assert_array_equal(np.abs(matrix), 1 / np.sqrt(size))


@sizes
def test_rotating_unit_vectors_gives_the_matrix(size):
    rotated = rotate(jnp.eye(2 * size, dtype=jnp.float32), size)
    np.testing.assert_array_equal(rotated, np.kron(np.eye(2), hadamard(size)))


@pytest.mark.parametrize("first", [0, 16, 48])
def test_rotating_from_a_channel_on_is_the_matrix_beside_ones(first):
    wanted = np.eye(64)
    wanted[first:, first:] = np.kron(np.eye(4 - first // 16), hadamard(16))
    found = rotate_from(jnp.eye(64, dtype=jnp.float32), 16, first)
    np.testing.assert_array_equal(found, wanted)


@sizes
def test_float32_sums_have_the_order_of_the_definition(size):
    rng = np.random.default_rng(size)
    x = (rng.standard_normal(2 * size) * np.exp(4 * rng.standard_normal(2 * size))).astype("f4")
    wanted, distance = list(x), 1
    while distance < size:
        for i in range(len(x)):
            if i // distance % 4 == 0:
                at = [i + j * distance for j in range(4)]
                a, b, c, d = (wanted[j] for j in at)
                sums = (a + b) + (c - d), (a + b) - (c - d), (c + d) + (a - b), (c + d) - (a - b)
                for j, value in zip(at, sums, strict=True):
                    wanted[j] = value
        distance *= 4
    found = jax.jit(rotate, static_argnums=1)(x, size)
    np.testing.assert_array_equal(found, np.array(wanted, "f4") / np.float32(np.sqrt(size)))
    exact = np.kron(np.eye(2), hadamard(size)) @ x.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 * np.abs(x).max() * np.sqrt(size))


def test_products_are_rounded_before_the_sums_of_a_rotation():
    """A fused multiply-add would leave 4097**2 less its own rounding to float32."""
    x = np.zeros((1, 16), np.float32)
    x[0, :2] = 4097, 4097
    multiplier = np.zeros(16, np.float32)
    multiplier[:2] = 4097, -4097
    found = jax.jit(lambda x, m: rotate(scale_channels(x, m), 16))(x, multiplier)
    np.testing.assert_array_equal(found[0, 0], 0)
    rng = np.random.default_rng(0)
    x, multiplier = rng.standard_normal((2, 50, 64)).astype(np.float32)
    found = jax.jit(lambda x, m: rotate(scale_channels(x, m), 64))(x, multiplier[0])
    np.testing.assert_array_equal(found, rotate(jnp.asarray(x * multiplier[0]), 64))


def test_subnormal_factors_and_products_count_as_zero():
    tiny = np.float32(2.0**-127)
    x = np.array([tiny, 1, 2.0**-100, -(2.0**-126), 3], np.float32)
    multiplier = np.array([2.0**100, tiny, 2.0**-50, 1, -2], np.float32)
    np.testing.assert_array_equal(scale_channels(x, multiplier), [0, 0, 0, -(2.0**-126), -6])
