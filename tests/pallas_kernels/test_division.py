"""Division that is correctly rounded on every device."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import codec

EXTENTS = hnp.arrays(np.float32, 64, elements=st.floats(2.0**-100, 2.0**127, width=32))
correct = jax.jit(codec.correct_quotient, static_argnums=1)


@pytest.mark.parametrize("levels", [7, 127, 255])
@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
@given(extent=EXTENTS)
def test_a_quotient_two_units_off_is_put_right(levels, off, extent):
    exact = np.float32(levels) / extent
    guess = (exact.view(np.int32) + off).view(np.float32)
    np.testing.assert_array_equal(correct(guess, levels, extent), exact)


@pytest.mark.parametrize("levels", [7, 127, 255])
@pytest.mark.parametrize("off", [-2, 0, 2])
def test_quotients_beside_powers_of_two_are_put_right(levels, off):
    around = np.float32(levels).view(np.int32) + np.arange(-40, 41, dtype=np.int32)
    extent = np.ldexp(around.view(np.float32)[:, None], np.arange(-90, 90, 7)).astype(np.float32)
    exact = np.float32(levels) / extent
    guess = (exact.view(np.int32) + off).view(np.float32)
    np.testing.assert_array_equal(correct(guess, levels, extent), exact)
