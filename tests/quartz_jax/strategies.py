"""Random inputs for property tests: plain, tied, tiny, huge, subnormal and constant data."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)


def floats(*shapes, dtypes=(np.float32,)):
    """Finite arrays of one of the shapes and dtypes, drawn to reach every branch of the format."""

    def one(shape):
        return st.one_of(_any(shape), _ties(shape), _gaussian(shape), _ranges(shape))

    arrays = st.sampled_from(shapes).flatmap(one)
    return st.tuples(arrays, st.sampled_from(dtypes)).map(_cast)


def int8s(*shape):
    """Arrays of -127..127 whose eights differ in magnitude."""
    values = hnp.arrays(np.int32, shape, elements=st.integers(-127, 127))
    return st.tuples(values, _shifts(shape)).map(
        lambda pair: (np.sign(pair[0]) * (np.abs(pair[0]) >> pair[1])).astype(np.int8)
    )


def uint8s(*shape):
    """Arrays of 0..255 whose eights differ in magnitude."""
    values = hnp.arrays(np.int32, shape, elements=st.integers(0, 255))
    return st.tuples(values, _shifts(shape)).map(lambda pair: (pair[0] >> pair[1]).astype(np.uint8))


def _shifts(shape):
    eights = (*shape[:-1], shape[-1] // 8)
    return hnp.arrays(np.int32, eights, elements=st.integers(0, 7)).map(
        lambda shifts: np.repeat(shifts, 8, axis=-1)
    )


def _any(shape):
    elements = st.floats(width=32, allow_nan=False, allow_infinity=False)
    return hnp.arrays(np.float32, shape, elements=elements)


def _ties(shape):
    """Multiples of 1/2 with 127 among them: products that lie halfway between integers."""
    halves = st.integers(-254, 254).map(lambda n: n / 2)
    return hnp.arrays(np.float32, shape, elements=halves).map(_with_first(127))


def _ranges(shape):
    """Multiples of 1/2 from 0 to 255, shifted: ties of the asymmetric range."""
    halves = st.integers(0, 510).map(lambda n: n / 2)
    return hnp.arrays(np.float32, shape, elements=halves).map(_with_first(255))


def _with_first(value):
    def put(array):
        array[..., 0] = value
        return array

    return put


def _gaussian(shape):
    """Normal data at a scale from 2**-140 to 2**120, with a heavy-tailed row or two."""

    def draw(pair):
        seed, exponent = pair
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape) * np.exp2(rng.integers(0, 6, shape)) * 2.0**exponent
        return x.astype(np.float32)

    return st.tuples(st.integers(0, 2**32 - 1), st.integers(-140, 116) | st.just(0)).map(draw)


def _cast(pair):
    array, dtype = pair
    limit = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(array, -limit, limit).astype(dtype)
