"""Every backend of the matmul against integer sums and a float64 epilogue in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import ON_HARDWARE, Subject, subjects
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import matmul
from pallas_kernels.matmul import MATMUL, MATMUL_INT8
from pallas_kernels.matmul.shapes import SHAPES

# Every shape compiles anew, so the examples are few and aren't shrunk.
few_examples = settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
extents = {"m": st.integers(1, 70), "n": st.integers(1, 200), "k": st.integers(1, 300)}
random_calls = given(seed=st.integers(0, 2**31), asymmetric=st.booleans(), **extents)

FLUX = [shape for name, shape in SHAPES.items() if name.startswith("flux")]
# Few rows and many, and on hardware several tiles of everything, nothing a multiple of them.
FIXED = [(1, 33, 48), (3, 5, 20), (64, 130, 500), (70, 72, 1056)]
FIXED += [(513, 3080, 1040), *((shape.m, shape.n, shape.k) for shape in FLUX)] * ON_HARDWARE


def random_weights(rng, n, k, group_size, step):
    """Return any weights of the format: packed codes, packed shifts, and what they decode to."""
    groups = -(-k // group_size)
    codes = rng.integers(-7, 8, (n, groups * group_size))
    codes[:, k:] = 0  # as the format pads
    shifts = rng.integers(0, 5 if step == "power" else 16, (n, groups + groups % 2))
    steps = np.repeat(1 << shifts if step == "power" else shifts + 1, group_size, axis=1)
    w = codes * steps[:, : codes.shape[1]]
    return (_pack(codes), _pack(shifts)), w[:, :k].astype(np.int8)


def _pack(nibbles):
    return ((nibbles[:, ::2] & 15) | (nibbles[:, 1::2] & 15) << 4).astype(np.uint8)


def activations(rng, m, k, asymmetric):
    """Return 4-bit values times powers of two, the asymmetric ones less 128: int8 [m, k]."""
    values = rng.integers(0 if asymmetric else -7, 16 if asymmetric else 8, (m, k))
    return ((values << rng.integers(0, 5, (m, k))) - 128 * asymmetric).astype(np.int8)


def sparse_rows(rng, m, k):
    """Return rows of at most two +-1: sums of two weights are exact in bfloat16."""
    x = np.zeros((m, k), np.int8)
    for _ in range(2):
        x[np.arange(m), rng.integers(k, size=m)] = rng.choice([-1, 1], size=m)
    return x


def ones(rows):
    return np.ones((rows, 1), np.float32)


def int_dot(x, w):
    """Return the exact sums over k, float64 [m, n]: below 2**53, so BLAS may add in any order."""
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


def finish(y, *, bias=0, activation=None, gate=1, residual=0):
    """Return the epilogue of float64 [m, n], and the sum of its terms' magnitudes."""
    terms = np.abs(y) + np.abs(bias)
    y = y + np.float64(bias)
    if activation == "gelu":
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    residual = np.asarray(residual, np.float64)
    return residual + gate * y, np.abs(residual) + np.abs(gate) * terms


@functools.cache
def compiled(subject: Subject, static):
    """Jit a backend once for all tests, static options as pairs."""
    return jax.jit(functools.partial(subject, **dict(static)))


def run(subject: Subject, operands, **options):
    """Call a backend under jit, arrays as arguments and the rest as constants."""
    arrays = {key: value for key, value in options.items() if hasattr(value, "shape")}
    static = {key: value for key, value in options.items() if key not in arrays}
    return np.asarray(compiled(subject, tuple(sorted(static.items())))(*operands, **arrays))


def check_integers(subject: Subject, rng, x, weights, w, *, asymmetric, **options):
    """Compare a call whose scales are one, so that all of it is integers below 2**24, with ==."""
    (m, k), n = x.shape, w.shape[0]
    scales = ones(m), ones(n)
    sums = int_dot(x, w)
    extra = {}
    if asymmetric:
        extra["x_lo"] = rng.integers(-9, 9, (m, 1)).astype(np.float32)
        sums = sums + (128 + extra["x_lo"]) * w.sum(axis=1, dtype=np.float64)
    assert np.abs(sums).max() < 2**24
    if not subject.refuses(x, *weights, *scales, **options, out_dtype=jnp.float32):
        y = run(subject, (x, *weights, *scales), **options, **extra, out_dtype=jnp.float32)
        np.testing.assert_array_equal(y, sums)
    elif not subject.refuses(x, *weights, *scales, **options, out_dtype=jnp.bfloat16):
        options["out_dtype"] = jnp.bfloat16
        y = run(subject, (x, *weights, *scales), **options, **extra)
        np.testing.assert_array_equal(y, sums.astype(y.dtype))
        # Those sums have lost their last bits; what one or two weights decode to has not.
        x = sparse_rows(rng, m, k)
        y = run(subject, (x, *weights, *scales), **options)
        np.testing.assert_array_equal(y, int_dot(x, w))


def check_packed(subject, seed, m, n, k, *, asymmetric, group_size, step):
    rng = np.random.default_rng(seed)
    weights, w = random_weights(rng, n, k, group_size, step)
    x = activations(rng, m, k, asymmetric)
    options = {"asymmetric": asymmetric, "group_size": group_size, "step": step}
    check_integers(subject, rng, x, weights, w, **options)


@pytest.mark.parametrize("subject", subjects(MATMUL))
class TestMatmul:
    """What every backend does with 4-bit weights."""

    @pytest.mark.parametrize("step", ["power", "integer"])
    @pytest.mark.parametrize("group_size", [16, 32])
    @few_examples
    @random_calls
    def test_integers_of_any_shape(self, subject, group_size, step, seed, m, n, k, asymmetric):
        options = {"asymmetric": asymmetric, "group_size": group_size, "step": step}
        check_packed(subject, seed, m, n, k, **options)

    @pytest.mark.parametrize("shape", FIXED, ids=str)
    def test_integers_of_few_and_many_rows(self, subject, shape):
        check_packed(subject, 0, *shape, asymmetric=False, group_size=16, step="power")

    @pytest.mark.parametrize("group_size", [8, 64])
    def test_other_groups_give_the_integers_or_are_refused(self, subject, group_size):
        options = {"asymmetric": True, "group_size": group_size, "step": "power"}
        check_packed(subject, 0, 20, 40, 100, **options)

    def test_only_mosaic_gpu_refuses_groups_of_eight(self, subject):
        x, weights = np.zeros((2, 16), np.int8), (np.zeros((3, 8), np.uint8),) * 2
        refused = subject.refuses(x, *weights, group_size=8, step="power")
        assert refused == (subject.backend.name == "mosaic_gpu")

    @pytest.mark.parametrize("m", [5, 70])
    @pytest.mark.parametrize("x", [-128, 127])
    def test_largest_products_of_a_long_row(self, subject, m, x):
        k = 2032  # the sum has 25 bits
        codes, shifts = np.full((8, k // 2), 0x77, np.uint8), np.full((8, 64), 0x44, np.uint8)
        operands = np.full((m, k), x, np.int8), codes, shifts, ones(m), ones(8)
        options = {"group_size": 16, "step": "power", "out_dtype": jnp.bfloat16}
        if subject.refuses(*operands, **options):
            return
        y = run(subject, operands, **options)
        np.testing.assert_array_equal(y, np.full((m, 8), np.float32(x * 112 * k)).astype(y.dtype))

    def test_a_row_whose_scale_is_nan_is_nan(self, subject):
        weights, _ = random_weights(np.random.default_rng(0), 5, 32, 16, "power")
        x_scale = np.array([[1], [np.nan], [1]], np.float32)
        operands = (np.zeros((3, 32), np.int8), *weights, x_scale, ones(5))
        y = run(subject, operands, group_size=16, step="power", out_dtype=jnp.bfloat16)
        np.testing.assert_array_equal(np.isnan(y), [[False] * 5, [True] * 5, [False] * 5])

    @pytest.mark.parametrize(
        ("m", "names"),
        [
            (7, "bias activation"),
            (7, "gate"),
            (7, "residual"),
            (70, "bias gate residual"),
            (7, "x_lo bias activation gate residual"),
            (70, "x_lo bias activation gate residual"),
        ],
    )
    def test_epilogue(self, subject, m, names):
        check_epilogue(subject, m, names.split(), packed=True)


@pytest.mark.parametrize("subject", subjects(MATMUL_INT8))
class TestMatmulInt8:
    """What every backend does with int8 weights."""

    @few_examples
    @random_calls
    def test_integers_of_any_shape(self, subject, seed, m, n, k, asymmetric):
        rng = np.random.default_rng(seed)
        x = rng.integers(-128 if asymmetric else -127, 128, (m, k), np.int8)
        w = rng.integers(-127, 128, (n, k), np.int8)
        check_integers(subject, rng, x, (w,), w, asymmetric=asymmetric)

    @pytest.mark.parametrize("names", ["bias", "x_lo activation gate residual"])
    def test_epilogue(self, subject, names):
        check_epilogue(subject, 37, names.split(), packed=False)


def check_epilogue(subject, m, names, *, packed):
    """Compare with float64, within the rounding of the result and of the float32 steps."""
    n, k = 140, 200
    rng = np.random.default_rng(m)
    bias, gate = rng.standard_normal((2, n)).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(jnp.bfloat16)
    x_lo = rng.standard_normal((m, 1)).astype(np.float32)
    values = {"bias": bias, "gate": gate, "residual": residual, "activation": "gelu", "x_lo": x_lo}
    options = {name: values[name] for name in names}
    x = activations(rng, m, k, "x_lo" in names)
    x_scale, w_scale = (rng.random((rows, 1)).astype(np.float32) / 100 for rows in (m, n))
    weights, w = random_weights(rng, n, k, 16, "power")
    layout = {"group_size": 16, "step": "power"} if packed else {}
    operands = (x, *(weights if packed else (w,)), x_scale, w_scale)
    call = options | layout | {"out_dtype": jnp.bfloat16}
    if subject.refuses(*operands, **call):
        return
    y = run(subject, operands, **call)

    sums, terms = int_dot(x, w) * x_scale, 0
    if "x_lo" in names:
        # Two terms that may cancel, and are rounded one by one.
        column = w.sum(axis=1, dtype=np.float64)
        sums, offset = sums + 128 * column * x_scale, options.pop("x_lo") * column
        sums, terms = sums + offset, np.abs(sums) + np.abs(offset)
    gate = np.abs(options.get("gate", np.float64(1)))
    wanted, rest = finish(sums * w_scale.T, **options)
    bound = 2.0**-8 * np.abs(wanted) + 4e-6 * (gate * terms * w_scale.T + rest)
    assert np.max(np.abs(y.astype(np.float64) - wanted) / bound) <= 1


M, N, K = 5, 7, 70


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[0] * K] * M}, "x is a list; it must be an array"),
        ({"x": np.zeros(K, np.int8)}, r"x has shape \[70\]; it must be \[m, k\]"),
        ({"x": np.zeros((1, M, K), np.int8)}, r"x has shape \[1, 5, 70\]"),
        ({"x": np.zeros((M, 0), np.int8)}, "k is 0; rows must have at least one element"),
        ({"x": np.zeros((M, K), np.float32)}, "x has dtype float32; it must be int8"),
        ({"w_codes": np.zeros((N, 32), np.uint8)}, "w_codes holds 64 elements a row"),
        ({"w_codes": np.zeros((N, 40), np.int8)}, "w_codes has dtype int8; it must be uint8"),
        ({"w_shifts": np.zeros((N, 5), np.uint8)}, r"w_shifts has shape \[7, 5\]; .* \[7, 3\]"),
        ({"w_shifts": np.zeros((N, 3), np.int8)}, "w_shifts has dtype int8; it must be uint8"),
        ({"group_size": 12}, "group_size is 12; it must be 8, 16, 32 or 64"),
        ({"group_size": -16}, "group_size is -16"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 16.0}, "group_size is 16.0"),
        ({"x_bits": 6}, "x_bits is 6; it must be 4 or 8"),
        ({"step": "foo"}, "step is 'foo'; it must be 'power' or 'integer'"),
        ({"x_scale": np.ones((M, 1), jnp.bfloat16)}, "x_scale has dtype bfloat16"),
        ({"x_scale": np.ones((M,), np.float32)}, "x_scale has shape"),
        ({"w_scale": np.ones((1, N), np.float32)}, "w_scale has shape"),
        ({"x_lo": np.ones((1, M), np.float32)}, "x_lo has shape"),
        ({"bias": np.ones((N, 1), np.float32)}, "bias has shape"),
        ({"gate": np.ones((M,), np.float32)}, "gate has shape"),
        ({"residual": np.ones((M, M), np.float32)}, "residual has shape"),
        ({"bias": np.ones(N, np.int32)}, "bias has dtype int32; it must be floating"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"out_dtype": jnp.int32}, "out_dtype is"),
        ({"out_dtype": jnp.float8_e4m3fn}, "out_dtype is .* 16 bits or more"),
        ({"implementation": 3}, "implementation is 3; it must be None, a name or a list of names"),
        ({"implementation": []}, r"implementation is \[\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    call = {
        "x": np.zeros((M, K), np.int8),
        "w_codes": np.zeros((N, 40), np.uint8),
        "w_shifts": np.zeros((N, 3), np.uint8),
        "x_scale": np.ones((M, 1), np.float32),
        "w_scale": np.ones((N, 1), np.float32),
        "group_size": 16,
        "step": "power",
        **change,
    }
    with pytest.raises(ValueError, match=message):
        matmul.matmul(**call)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.zeros((1, 5), np.int8), "x has k=4 and w has k=5"),
        (np.zeros((1, 4), np.uint8), "w has dtype uint8; it must be int8"),
        (np.zeros(4, np.int8), r"w has shape \[4\]; it must be \[n, k\]"),
    ],
)
def test_bad_int8_weights_are_refused(w, message):
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match=message):
        matmul.matmul_int8(np.zeros((1, 4), np.int8), w, one, one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"step": "foo"}, "step is 'foo'"),
        ({"w_scale": np.ones(N, np.float32)}, "w_scale has shape"),
    ],
)
def test_weights_that_cannot_be_prepared_are_refused(change, message):
    weights = np.zeros((N, 40), np.uint8), np.zeros((N, 3), np.uint8)
    call = {"w_scale": ones(N), "k": K, "group_size": 16, "step": "power", **change}
    with pytest.raises(ValueError, match=message):
        matmul.prepare(*weights, **call)
    with pytest.raises(ValueError, match="w_scale has shape"):
        matmul.prepare_int8(np.zeros((N, K), np.int8), ones(K))


PREPARED = matmul.PreparedWeights(arrays=None, implementation="mosaic_tpu", n=N, k=K, bits=4)


@pytest.mark.parametrize("names", ["xla", ["mosaic_gpu", "xla"]])
def test_prepared_weights_refuse_an_implementation_that_is_not_theirs(names):
    x = np.zeros((M, K), np.int8)
    with pytest.raises(ValueError, match="but w is prepared for 'mosaic_tpu'; pass None"):
        matmul.matmul_prepared(x, PREPARED, ones(M), implementation=names)


@pytest.mark.skipif(ON_HARDWARE, reason="needs a device without the backend")
def test_prepared_weights_explain_their_own_backend_alone():
    explained = PREPARED.explain(np.zeros((M, K), np.int8))
    assert explained == "matmul/mosaic_tpu: needs a TPU, not cpu"
