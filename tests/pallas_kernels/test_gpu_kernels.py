"""GPU kernels against the reference: on a GPU as they are, elsewhere in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import codec
from pallas_kernels.matmul import mosaic_gpu, reference, triton
from pallas_kernels.quantize import reference as quantize_reference
from pallas_kernels.quantize import triton as quantize_triton

ON_GPU = jax.default_backend() == "gpu"
CAN_RUN_MOSAIC = ON_GPU or hasattr(plgpu, "InterpretGPUParams")
needs_mosaic = pytest.mark.skipif(
    not CAN_RUN_MOSAIC, reason="Mosaic GPU kernels run on the CPU only with JAX 0.11 or later"
)
interpreted = functools.partial(functools.partial, interpret=not ON_GPU)

# m, n, k: less than a tile, several tiles, and nothing a multiple of anything
SHAPES = [(1, 16, 16), (20, 72, 1056), (100, 200, 300)]
GPU_SHAPES = [(513, 3080, 1040)]


def random_operands(seed, m, n, k):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(-128, 128, (m, k)), jnp.int8)
    w = jnp.asarray(rng.integers(-112, 113, (n, k)), jnp.int8)
    scales = [jnp.asarray(rng.uniform(0.5, 2, (rows, 1)), jnp.float32) for rows in (m, n)]
    return x, w, *scales


def sparse_rows(x):
    """Keep two elements of each row, as +-1: sums of two weights are exact in bfloat16."""
    rng = np.random.default_rng(x.shape)
    kept = np.zeros(x.shape, np.int8)
    for row in range(x.shape[0]):
        kept[row, rng.integers(x.shape[1], size=2)] = rng.choice([-1, 1])
    return jnp.asarray(kept)


def assert_same(found, wanted):
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


class MatmulTests:
    """What every GPU backend of matmul must do."""

    backend = None

    @pytest.fixture(params=SHAPES + GPU_SHAPES * ON_GPU, ids=str)
    def operands(self, request):
        return random_operands(0, *request.param)

    def pack(self, w, group_size, step):
        codes, shifts = codec.encode(w, group_size=group_size, step=step)
        return codec.pack(codes), codec.pack(shifts)

    def check(self, name, *args, **kwargs):
        kwargs.setdefault("out_dtype", jnp.bfloat16)
        found = interpreted(getattr(self.backend, name))(*args, **kwargs)
        wanted = getattr(reference, name)(*args, **kwargs)
        assert_same(found, wanted)

    def test_int8_integers_equal_the_reference(self, operands):
        x, w, x_scale, w_scale = operands
        one = jnp.ones_like
        self.check("matmul_int8", sparse_rows(x), w, one(x_scale), one(w_scale))

    def test_int8_result_equals_the_reference(self, operands):
        self.check("matmul_int8", *operands)

    @pytest.mark.parametrize("step", ["power", "integer"])
    @pytest.mark.parametrize("group_size", [16, 32])
    def test_decoded_integers_equal_the_reference(self, operands, group_size, step):
        x, w, x_scale, w_scale = operands
        packed = self.pack(w, group_size, step)
        one = jnp.ones_like
        options = {"group_size": group_size, "step": step}
        self.check("matmul", sparse_rows(x), *packed, one(x_scale), one(w_scale), **options)

    def test_4bit_result_equals_the_reference(self, operands):
        x, w, x_scale, w_scale = operands
        packed = self.pack(w, 16, "power")
        self.check("matmul", x, *packed, x_scale, w_scale, group_size=16, step="power")

    def test_nan_scale_makes_the_row_nan(self):
        x, w, x_scale, w_scale = random_operands(1, 3, 5, 20)
        x_scale = x_scale.at[1].set(jnp.nan)
        self.check("matmul_int8", x, w, x_scale, w_scale)

    @pytest.mark.parametrize("name", ["matmul_int8", "matmul"])
    def test_bias_and_asymmetric_terms_round_once(self, operands, name):
        # A compiler may fuse a product and a sum, so the last bit before rounding isn't defined.
        x, w, *scales = operands
        rng = np.random.default_rng(2)
        options = {
            "bias": jnp.asarray(rng.normal(size=w.shape[0]), jnp.float32),
            "x_lo": jnp.asarray(rng.normal(size=(x.shape[0], 1)), jnp.float32),
        }
        weights = (w,)
        if name == "matmul":
            options |= {"group_size": 32, "step": "integer"}
            weights = self.pack(w, 32, "integer")
        found = interpreted(getattr(self.backend, name))(x, *weights, *scales, **options)
        wanted = getattr(reference, name)(x, *weights, *scales, out_dtype=jnp.float32, **options)
        scale = np.abs(wanted) + 1e-2 * np.max(np.abs(wanted))
        assert np.max(np.abs(np.asarray(found, np.float32) - wanted) / scale) <= 2.0**-8


@needs_mosaic
class TestMosaicGpu(MatmulTests):
    backend = mosaic_gpu


class TestTriton(MatmulTests):
    backend = triton


class TestQuantizeTriton:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("shape", [(5, 1), (3, 50), (4, 1168)] + [(4608, 12288)] * ON_GPU)
    @pytest.mark.parametrize(
        ("range", "step", "rounding"),
        [
            ("absmax", "power", "nearest"),
            ("absmax", "power", "truncate"),
            ("absmax", "integer", "nearest"),
            ("minmax", "power", "nearest"),
        ],
    )
    @pytest.mark.parametrize(("bits", "group_size"), [(8, 16), (4, 16), (4, 32)])
    def test_same_bits_as_the_reference(
        self, shape, dtype, bits, group_size, range, step, rounding
    ):
        rng = np.random.default_rng(shape)
        rows = rng.choice([1e-30, 1e-3, 1, 1e3, 1e30], size=(shape[0], 1))
        x = jnp.asarray(rng.normal(size=shape) * rows, dtype)
        x = x.at[0].set(0)
        options = {"bits": bits, "group_size": group_size, "range": range}
        options |= {"step": step, "rounding": rounding}
        found = interpreted(quantize_triton.quantize)(x, **options)
        wanted = quantize_reference.quantize(x, **options)
        for ours, theirs in zip(found, wanted, strict=True):
            if theirs is None:
                assert ours is None
            else:
                np.testing.assert_array_equal(ours, theirs)

    @pytest.mark.parametrize("range", ["absmax", "minmax"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_row_with_nan_or_infinity_has_scale_nan(self, range, bad):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1200)), jnp.bfloat16)
        x = x.at[1, 700].set(bad)
        _, scale, _ = interpreted(quantize_triton.quantize)(
            x, bits=4, group_size=16, range=range, step="power", rounding="nearest"
        )
        assert np.isnan(scale[:, 0]).tolist() == [False, True, False]
