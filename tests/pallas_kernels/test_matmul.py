"""Every backend of the matmul against integer sums and a float64 epilogue in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import ON_HARDWARE, Subject, jit, subjects
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import device, matmul
from pallas_kernels.matmul import MATMUL, MATMUL_INT8, triton_few_rows
from pallas_kernels.matmul.shapes import SHAPES
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows

# Every shape compiles anew, so the examples are few and aren't shrunk.
few_examples = settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
extents = {"m": st.integers(1, 70), "n": st.integers(1, 200), "k": st.integers(1, 300)}
random_calls = given(seed=st.integers(0, 2**31), asymmetric=st.booleans(), **extents)

FLUX = [shape for name, shape in SHAPES.items() if name.startswith("flux")]
# Few rows and many, and on hardware several tiles of everything, nothing a multiple of them.
FIXED = [(1, 33, 48), (3, 5, 20), (64, 130, 500), (70, 72, 1056)]
FIXED += [(513, 3080, 1040), *((shape.m, shape.n, shape.k) for shape in FLUX)] * ON_HARDWARE


STEPS = {"power": 5, "integer": 16, "stretched": 14}  # what is stored of a step lies below
STRETCHED = np.array([0, 1, 2, 3, 4, 5, 7, 9])


def kind_of(step):
    """Return fields of packed rows; "stretched" is an integer step with stretched levels."""
    return {"step": "integer", "levels": "stretched"} if step == "stretched" else {"step": step}


def random_weights(rng, n, k, group_size, step):
    """Return any weights of the format, packed under scales of one, and what they decode to."""
    groups = -(-k // group_size)
    codes = rng.integers(-7, 8, (n, groups * group_size))
    codes[:, k:] = 0  # as the format pads
    shifts = rng.integers(0, STEPS[step], (n, groups + groups % 2))
    steps = np.repeat(1 << shifts if step == "power" else shifts + 1, group_size, axis=1)
    levels = np.sign(codes) * STRETCHED[np.abs(codes)] if step == "stretched" else codes
    w = levels * steps[:, : codes.shape[1]]
    packed = PackedRows(
        codes=_pack(codes),
        shifts=_pack(shifts),
        scale=ones(n),
        group_size=group_size,
        padding=groups * group_size - k,
        **kind_of(step),
    )
    return packed, w[:, :k].astype(np.int8)


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
def compiled(subject: Subject):
    """Jit a backend once for all tests."""
    return jit(subject)


def run(subject: Subject, *operands):
    """Call a backend under jit."""
    return np.asarray(compiled(subject)(*operands))


def check_integers(subject: Subject, rng, values, rows, w, *, asymmetric):
    """Compare a call whose scales are one, so that all of it is integers below 2**24, with ==."""
    m, k = values.shape
    sums, lo = int_dot(values, w), None
    if asymmetric:
        lo = rng.integers(-9, 9, (m, 1)).astype(np.float32)
        sums = sums + (128 + lo) * w.sum(axis=1, dtype=np.float64)
    assert np.abs(sums).max() < 2**24
    x = Int8Rows(values=values, scale=ones(m), lo=lo)
    wide, narrow = Epilogue(out_dtype=jnp.float32), Epilogue(out_dtype=jnp.bfloat16)
    if not subject.refuses(x, rows, wide):
        np.testing.assert_array_equal(run(subject, x, rows, wide), sums)
    elif not subject.refuses(x, rows, narrow):
        y = run(subject, x, rows, narrow)
        np.testing.assert_array_equal(y, sums.astype(y.dtype))
        # Those sums have lost their last bits; what one or two weights decode to has not.
        values = sparse_rows(rng, m, k)
        y = run(subject, Int8Rows(values=values, scale=ones(m)), rows, narrow)
        np.testing.assert_array_equal(y, int_dot(values, w))


def check_packed(subject, seed, m, n, k, *, asymmetric, group_size, step):
    rng = np.random.default_rng(seed)
    packed, w = random_weights(rng, n, k, group_size, step)
    x = activations(rng, m, k, asymmetric)
    check_integers(subject, rng, x, packed, w, asymmetric=asymmetric)


@pytest.mark.parametrize("subject", subjects(MATMUL))
class TestMatmul:
    """What every backend does with 4-bit weights."""

    @pytest.mark.parametrize(
        ("step", "group_size"), [("power", 16), ("integer", 32), ("stretched", 16)]
    )
    @few_examples
    @random_calls
    def test_integers_of_any_shape(self, subject, step, group_size, seed, m, n, k, asymmetric):
        options = {"asymmetric": asymmetric, "group_size": group_size, "step": step}
        check_packed(subject, seed, m, n, k, **options)

    @pytest.mark.parametrize("shape", FIXED, ids=str)
    @pytest.mark.parametrize("step", ["stretched", *["power"] * ON_HARDWARE])
    def test_integers_of_few_and_many_rows(self, subject, step, shape):
        check_packed(subject, 0, *shape, asymmetric=False, group_size=16, step=step)

    @pytest.mark.parametrize("m", [3, 20])
    @pytest.mark.parametrize(
        ("step", "group_size"), [("power", 8), ("stretched", 8), ("integer", 64)]
    )
    def test_integers_of_other_groups(self, subject, step, group_size, m):
        options = {"asymmetric": True, "group_size": group_size, "step": step}
        check_packed(subject, 0, m, 40, 100, **options)

    @pytest.mark.parametrize("m", [3, 70])
    @pytest.mark.parametrize("step", STEPS)
    def test_every_code_with_every_step(self, subject, step, m):
        """Rows of w have one step each, and hold every code; one row of x shows one weight."""
        shifts = np.arange(STEPS[step]) * 0x11
        codes = np.tile(_pack(np.arange(-7, 9)[None] % 15 - 7), (len(shifts), 2))
        rows = PackedRows(
            codes=codes,
            shifts=shifts[:, None].astype(np.uint8),
            scale=ones(len(shifts)),
            **kind_of(step),
        )
        code = np.tile(np.arange(-7, 9) % 15 - 7, 2)
        level = np.sign(code) * STRETCHED[np.abs(code)] if step == "stretched" else code
        steps = np.arange(STEPS[step])
        w = (1 << steps if step == "power" else steps + 1)[:, None] * level
        epilogue = Epilogue()
        for start in range(0, 32, m):
            values = np.roll(np.eye(32, dtype=np.int8), -start, axis=0)[np.arange(m) % 32]
            x = Int8Rows(values=values, scale=ones(m))
            if subject.refuses(x, rows, epilogue):
                return
            np.testing.assert_array_equal(run(subject, x, rows, epilogue), values @ w.T)

    @pytest.mark.parametrize("m", [5, 70])
    @pytest.mark.parametrize("x", [-128, 127])
    def test_largest_products_of_a_long_row(self, subject, m, x):
        k = 2032  # the sum has 25 bits
        rows = PackedRows(
            codes=np.full((8, k // 2), 0x77, np.uint8),
            shifts=np.full((8, 64), 0x44, np.uint8),
            scale=ones(8),
        )
        operands = Int8Rows(values=np.full((m, k), x, np.int8), scale=ones(m)), rows, Epilogue()
        if subject.refuses(*operands):
            return
        y = run(subject, *operands)
        np.testing.assert_array_equal(y, np.full((m, 8), np.float32(x * 112 * k)).astype(y.dtype))

    def test_a_row_whose_scale_is_nan_is_nan(self, subject):
        packed, _ = random_weights(np.random.default_rng(0), 5, 32, 16, "power")
        x_scale = np.array([[1], [np.nan], [1]], np.float32)
        x = Int8Rows(values=np.zeros((3, 32), np.int8), scale=x_scale)
        y = run(subject, x, packed, Epilogue())
        np.testing.assert_array_equal(np.isnan(y), [[False] * 5, [True] * 5, [False] * 5])

    @pytest.mark.parametrize(
        ("m", "names"),
        [
            (7, "bias activation"),
            (7, "gate"),
            (7, "residual"),
            (70, "branch"),
            (70, "bias gate residual"),
            (1, "lo bias activation gate residual branch"),
            (7, "lo bias activation gate residual"),
            (70, "lo bias activation gate residual branch"),
        ],
    )
    def test_epilogue(self, subject, m, names):
        check_epilogue(subject, m, names.split(), packed=True)

    @pytest.mark.parametrize(("images", "rows"), [(2, 1), (3, 7), (2, 64)])
    def test_gates_of_images_together_are_as_each_by_itself(self, subject, images, rows):
        check_images(subject, images, rows, packed=True)


@pytest.mark.parametrize("subject", subjects(MATMUL_INT8))
class TestMatmulInt8:
    """What every backend does with int8 weights."""

    @few_examples
    @random_calls
    def test_integers_of_any_shape(self, subject, seed, m, n, k, asymmetric):
        rng = np.random.default_rng(seed)
        x = rng.integers(-128 if asymmetric else -127, 128, (m, k), np.int8)
        w = rng.integers(-127, 128, (n, k), np.int8)
        rows = Int8Rows(values=w, scale=ones(n))
        check_integers(subject, rng, x, rows, w, asymmetric=asymmetric)

    @pytest.mark.parametrize("names", ["bias", "lo activation gate residual branch"])
    def test_epilogue(self, subject, names):
        check_epilogue(subject, 37, names.split(), packed=False)

    def test_gates_of_images_together_are_as_each_by_itself(self, subject):
        check_images(subject, 2, 37, packed=False)


def check_images(subject, images, rows, *, packed):
    """Compare a batch with its images one by one, with ==."""
    n, k, rank, m = 140, 200, 20, images * rows
    rng = np.random.default_rng(rows)
    weights, values = random_weights(rng, n, k, 16, "power")
    weights = weights if packed else Int8Rows(values=values, scale=weights.scale)
    scale, lo = rng.random((2, m, 1)).astype(np.float32)
    x = Int8Rows(values=activations(rng, m, k, True), scale=scale, lo=lo)
    inner, up = (rng.standard_normal((size, rank)).astype(jnp.bfloat16) for size in (m, n))
    epilogue = Epilogue(
        bias=rng.standard_normal(n).astype(np.float32),
        gate=rng.standard_normal((images, n)).astype(jnp.bfloat16),
        residual=rng.standard_normal((m, n)).astype(jnp.bfloat16),
        branch=Branch(input=inner, up=up),
        activation="gelu",
    )
    if subject.refuses(x, weights, epilogue):
        return
    together = run(subject, x, weights, epilogue)
    for i in range(images):
        at = slice(i * rows, (i + 1) * rows)
        alone = dataclasses.replace(
            epilogue,
            gate=epilogue.gate[i],
            residual=epilogue.residual[at],
            branch=Branch(input=inner[at], up=up),
        )
        part = jax.tree.map(lambda rows: rows[at], x)  # noqa: B023
        np.testing.assert_array_equal(together[at], run(subject, part, weights, alone))


def check_epilogue(subject, m, names, *, packed):
    """Compare with float64, within the rounding of the result and of the float32 steps."""
    n, k, rank = 140, 200, 20
    rng = np.random.default_rng(m)
    bias, gate = rng.standard_normal((2, n)).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(jnp.bfloat16)
    down = rng.standard_normal((m, rank)).astype(jnp.bfloat16)
    up = rng.standard_normal((n, rank)).astype(jnp.bfloat16)
    lo = rng.standard_normal((m, 1)).astype(np.float32) if "lo" in names else None
    values = {"bias": bias, "gate": gate, "residual": residual, "activation": "gelu"}
    values["branch"] = Branch(input=down, up=up)
    options = {name: values[name] for name in names if name != "lo"}
    x_scale, w_scale = (rng.random((rows, 1)).astype(np.float32) / 100 for rows in (m, n))
    x = Int8Rows(values=activations(rng, m, k, lo is not None), scale=x_scale, lo=lo)
    rows, w = random_weights(rng, n, k, 16, "power")
    if not packed:
        rows = Int8Rows(values=w, scale=w_scale)
    operands = x, dataclasses.replace(rows, scale=w_scale), Epilogue(**options)
    if subject.refuses(*operands):
        return
    y = run(subject, *operands)

    sums, terms = int_dot(x.values, w) * x_scale, 0
    if lo is not None:
        # Two terms that may cancel, and are rounded one by one.
        column = w.sum(axis=1, dtype=np.float64)
        sums, offset = sums + 128 * column * x_scale, lo * column
        sums, terms = sums + offset, np.abs(sums) + np.abs(offset)
    sums, terms = sums * w_scale.T, terms * w_scale.T
    if options.pop("branch", None):
        # Sums of 20 exact products in float32, in any order.
        down, up = np.float64(down), np.float64(up)
        sums, terms = sums + down @ up.T, terms + np.abs(sums) + np.abs(down) @ np.abs(up).T
    gate = np.abs(options.get("gate", np.float64(1)))
    wanted, rest = finish(sums, **options)
    bound = 2.0**-8 * np.abs(wanted) + 4e-6 * (gate * terms + rest)
    assert np.max(np.abs(y.astype(np.float64) - wanted) / bound) <= 1


@pytest.mark.skipif(ON_HARDWARE and device.current().platform != "gpu", reason="for GPUs")
@pytest.mark.parametrize("k", [96, 96 * 33])  # a row at once, and in a loop
def test_few_rows_go_through_weight_rows_in_any_passes(k):
    rng = np.random.default_rng(k)
    w, values = random_weights(rng, 21, k, 16, "stretched")
    lo = rng.integers(-9, 9, (3, 1)).astype(np.float32)
    x = Int8Rows(values=activations(rng, 3, k, True), scale=ones(3), lo=lo)
    epilogue = Epilogue(
        bias=rng.integers(-9, 9, 21).astype(np.float32),
        gate=rng.integers(1, 9, (3, 21)).astype(np.float32),
        residual=rng.integers(-9, 9, (3, 21)).astype(np.float32),
        out_dtype=jnp.float32,
    )
    found = [
        triton_few_rows.matmul(
            x,
            w,
            epilogue,
            config=triton_few_rows.Config(tile_n=2, passes=passes, words=32),
            interpret=not ON_HARDWARE,
        )
        for passes in (1, 4)
    ]
    np.testing.assert_array_equal(*found)
    sums = int_dot(x.values, values) + (128 + lo) * values.sum(axis=1, dtype=np.float64)
    wanted = epilogue.residual + epilogue.gate * (sums + epilogue.bias)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6, atol=1)


M, N, K = 5, 7, 70


def rows_of(m=M, k=K, **change):
    """Return x, fields changed."""
    return Int8Rows(**{"values": np.zeros((m, k), np.int8), "scale": ones(m), **change})


def packed_of(n=N, k=K, **change):
    """Return packed weights in groups of 16, fields changed."""
    groups = -(-k // 16)
    arrays = {
        "codes": np.zeros((n, groups * 8), np.uint8),
        "shifts": np.zeros((n, -(-groups // 2)), np.uint8),
        "scale": ones(n),
        "padding": groups * 16 - k,
    }
    return PackedRows(**arrays | change)


BAD_X = [
    ({"values": [[0] * K] * M}, "x.values is a list; it must be an array"),
    ({"values": np.zeros(K, np.int8)}, r"x.values has shape \[70\]; it must be \[m, k\]"),
    ({"values": np.zeros((1, M, K), np.int8)}, r"x.values has shape \[1, 5, 70\]"),
    ({"values": np.zeros((M, K), np.float32)}, "x.values has dtype float32; it must be int8"),
    ({"value_bits": 6}, "value_bits is 6; it must be 4 or 8"),
    ({"scale": np.ones((M, 1), jnp.bfloat16)}, "x.scale has dtype bfloat16"),
    ({"scale": np.ones((M,), np.float32)}, "x.scale has shape"),
    ({"lo": np.ones((1, M), np.float32)}, "x.lo has shape"),
]
BAD_PACKED = [
    ({"codes": np.zeros((N, 36), np.uint8)}, "w.codes holds 72 elements a row"),
    ({"codes": np.zeros((N, 32), np.uint8), "padding": 0}, r"w.shifts has shape .* \[7, 2\]"),
    ({"padding": 16}, "w.codes holds 80 elements a row with padding=16"),
    ({"padding": 9}, "x has k=70 and w has k=71"),
    ({"codes": np.zeros((N, 40), np.int8)}, "w.codes has dtype int8; it must be uint8"),
    ({"shifts": np.zeros((N, 5), np.uint8)}, r"w.shifts has shape \[7, 5\]; .* \[7, 3\]"),
    ({"shifts": np.zeros((N, 3), np.int8)}, "w.shifts has dtype int8; it must be uint8"),
    ({"group_size": 12}, "group_size is 12; it must be 8, 16, 32 or 64"),
    ({"group_size": -16}, "group_size is -16"),
    ({"group_size": 0}, "group_size is 0"),
    ({"group_size": 16.0}, "group_size is 16.0"),
    ({"step": "foo"}, "step is 'foo'; it must be 'power' or 'integer'"),
    ({"levels": "foo"}, "levels is 'foo'; it must be 'uniform' or 'stretched'"),
    ({"levels": "stretched"}, "step is 'power' with levels='stretched'"),
    ({"scale": np.ones((1, N), np.float32)}, "w.scale has shape"),
    ({"scale_block": 32}, "scale_block=32"),
    ({"axis": -2}, "axis=-2"),
    ({"range": "minmax"}, "range='minmax'"),
    ({"lo": ones(N)}, "w is asymmetric"),
]
BAD_EPILOGUES = [
    ({"bias": np.ones((N, 1), np.float32)}, "bias has shape"),
    ({"gate": np.ones((M,), np.float32)}, "gate has shape"),
    ({"gate": np.ones((2, N), np.float32)}, "gate is of 2 images; 5 rows aren't as many for each"),
    ({"residual": np.ones((M, M), np.float32)}, "residual has shape"),
    ({"bias": np.ones(N, np.int32)}, "bias has dtype int32; it must be floating"),
    ({"activation": "relu"}, "activation is 'relu'"),
    ({"out_dtype": jnp.int32}, "out_dtype is"),
    ({"out_dtype": jnp.float8_e4m3fn}, "out_dtype is .* 16 bits or more"),
    ({"branch": (ones(M), ones(N))}, "branch is a tuple; it must be a Branch"),
    ({"branch": Branch(input=ones(N), up=ones(N))}, "branch.input has shape"),
    ({"branch": Branch(input=ones(M), up=ones(M))}, "branch.up has shape"),
    ({"branch": Branch(input=ones(M)[:, :0], up=ones(N)[:, :0])}, "branch.input has no columns"),
    (
        {"branch": Branch(input=ones(M), up=ones(N).astype(jnp.bfloat16))},
        "branch.input has dtype float32 and branch.up bfloat16",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_X)
def test_bad_activations_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        matmul.matmul(rows_of(**change), packed_of())


@pytest.mark.parametrize(("change", "message"), BAD_PACKED)
def test_bad_packed_weights_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        matmul.matmul(rows_of(), packed_of(**change))


@pytest.mark.parametrize(("change", "message"), BAD_EPILOGUES)
def test_bad_epilogues_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        matmul.matmul(rows_of(), packed_of(), Epilogue(**change))


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        (3, "implementation is 3; it must be None, a name or a list of names"),
        ([], r"implementation is \[\]"),
    ],
)
def test_bad_implementations_are_refused(implementation, message):
    with pytest.raises(ValueError, match=message):
        matmul.matmul(rows_of(), packed_of(), implementation=implementation)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (np.zeros((M, K), np.int8), packed_of(), "x is a ndarray; it must be Int8Rows"),
        (packed_of(), packed_of(), "x is a PackedRows; it must be Int8Rows"),
        (rows_of(), np.zeros((N, K), np.int8), "w is a ndarray; it must be Int8Rows, PackedRows"),
        (rows_of(k=4), rows_of(k=5), "x has k=4 and w has k=5"),
        (rows_of(k=0), rows_of(k=0), "k is 0; rows must have at least one element"),
        (rows_of(), rows_of(values=np.zeros((M, K), np.uint8)), "w.values has dtype uint8"),
        (rows_of(), rows_of(lo=ones(M)), "w is asymmetric"),
    ],
)
def test_operands_of_other_kinds_are_refused(x, w, message):
    with pytest.raises(ValueError, match=message):
        matmul.matmul(x, w)


def test_what_is_no_epilogue_is_refused():
    with pytest.raises(ValueError, match="epilogue is a ndarray; it must be an Epilogue"):
        matmul.matmul(rows_of(), packed_of(), ones(N))


@pytest.mark.parametrize("stored", [0xE0, 0x0F])
def test_stretched_steps_beyond_fourteen_are_refused(stored):
    shifts = np.zeros((N, 3), np.uint8)
    shifts[2, 1] = stored
    w = packed_of(shifts=shifts, step="integer", levels="stretched")
    for call in (functools.partial(matmul.matmul, rows_of()), matmul.prepare):
        with pytest.raises(ValueError, match=r"w.shifts holds a step of 1[56]"):
            call(w)
    shifts[2, 1] = 0xDD
    assert matmul.matmul(rows_of(), w).shape == (M, N)


@pytest.mark.parametrize(("asymmetric", "most"), [(False, 133_144), (True, 66_311)])
def test_rows_so_long_that_their_sums_could_wrap_are_refused(asymmetric, most):
    def call(k):
        x = rows_of(m=1, k=k, lo=ones(1) if asymmetric else None)
        return jax.eval_shape(matmul.matmul, x, rows_of(m=1, k=k))

    assert call(most).shape == (1, 1)
    with pytest.raises(ValueError, match=f"k is {most + 1}.* for k up to {most}"):
        call(most + 1)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (packed_of(k=0), "k is 0"),
        (packed_of(step="foo"), "step is 'foo'"),
        (packed_of(scale=np.ones(N, np.float32)), "w.scale has shape"),
        (rows_of(scale=np.ones(M, np.float32)), "w.scale has shape"),
    ],
)
def test_weights_that_cannot_be_prepared_are_refused(w, message):
    with pytest.raises(ValueError, match=message):
        matmul.prepare(w)


@pytest.mark.parametrize("w", [packed_of(), rows_of()])
@pytest.mark.parametrize(
    ("out_dtype", "backend"), [(jnp.bfloat16, "mosaic_gpu"), (jnp.float32, None)]
)
def test_a_float32_model_is_not_prepared_for_what_writes_sixteen_bits(w, out_dtype, backend):
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)):
        prepared = jax.eval_shape(functools.partial(matmul.prepare, out_dtype=out_dtype), w)
        assert (prepared and prepared.implementation) == backend
        x, epilogue = rows_of(m=128), Epilogue(out_dtype=out_dtype)
        # Tracing raises where the backend can't run.
        assert jax.eval_shape(matmul.matmul, x, prepared or w, epilogue).dtype == out_dtype


PREPARED = matmul.PreparedWeights(arrays=None, implementation="mosaic_tpu", n=N, k=K, bits=4)


@pytest.mark.parametrize("names", ["xla", ["mosaic_gpu", "xla"]])
def test_prepared_weights_refuse_an_implementation_that_is_not_theirs(names):
    with pytest.raises(ValueError, match="but w is prepared for 'mosaic_tpu'; pass None"):
        matmul.matmul(rows_of(), PREPARED, implementation=names)


@pytest.mark.skipif(ON_HARDWARE, reason="needs a device without the backend")
def test_prepared_weights_explain_their_own_backend_alone():
    assert PREPARED.explain(rows_of()) == "matmul/mosaic_tpu: needs a TPU, not cpu"
