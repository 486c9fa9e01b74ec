"""Weights decoded to 16 bits: every backend against the formula, with ==."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from backends import subjects
from test_matmul import random_weights

from pallas_kernels.matmul.dequantize import DEQUANTIZE, dequantize
from pallas_kernels.operands import Int8Rows


@pytest.mark.parametrize("subject", subjects(DEQUANTIZE))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "step"),
    [(5, 640, 16, "power"), (8, 1000, 32, "integer"), (1, 24, 8, "stretched")],
)
def test_values_times_scales(subject, dtype, n, k, group_size, step):
    rng = np.random.default_rng(n)
    rows, values = random_weights(rng, n, k, group_size, step)
    rows = dataclasses.replace(rows, scale=rng.random((n, 1)).astype(np.float32) / 100)
    right = (values.astype(np.float32) * np.asarray(rows.scale)).astype(dtype)
    for w in (rows, Int8Rows(values=values, scale=rows.scale)):
        if not subject.refuses(w, jnp.dtype(dtype)):
            found = subject(w, jnp.dtype(dtype))
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, right)


def test_another_dtype_is_refused():
    rows, _ = random_weights(np.random.default_rng(0), 5, 32, 16, "power")
    with pytest.raises(ValueError, match="dtype is int8; it must be floating"):
        dequantize(rows, "int8")
