"""Every backend of the attention, in 16 and in 8 bits, against float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import ON_HARDWARE, jit, subjects

from pallas_kernels import device
from pallas_kernels.attention import (
    ATTENTION,
    ATTENTION_INT8_FP8,
    attention,
    attention_int8_fp8,
    mosaic_gpu,
    operands,
    quantize_heads,
    reference,
    registers,
    value_scale,
)

# batch, queries, keys, heads, kv heads, channels of a head
SHAPES = [
    (1, 128, 128, 1, 1, 128),
    (2, 70, 300, 4, 2, 64),  # padding on both sides, grouped heads, several batch elements
    (1, 300, 130, 2, 1, 128),  # fewer keys than queries, a last block of two keys
    (1, 5, 1, 2, 2, 64),  # one key
    (3, 129, 640, 6, 2, 128),  # more keys than queries, groups of three, an odd block of one query
]
if ON_HARDWARE:
    SHAPES += [
        (1, 4608, 4608, 24, 24, 128),
        (2, 1000, 16896, 4, 1, 128),
        (1, 1536, 1536, 24, 24, 128),
        (4, 4160, 4160, 24, 8, 64),  # an odd number of tiles, which go unpaired
        (1, 129, 257, 3, 3, 128),  # fewer tiles than processors, a block of one key
        (1, 128, 4224, 2, 2, 64),  # an odd number of blocks: the last step is in the loop
    ]
DATA = ["gaussian", "outlier"]
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
of_data = pytest.mark.parametrize("data", DATA)

# Relative errors of a term of the sums are those of the result, if its terms are independent, and
# smaller if few of them count. With three bits of mantissa rounding is off by 2**-4 at most and
# 0.026 rms, for values and for probabilities alike; codes that are linear between powers of two add
# 0.02 rms to the latter and int8 products 0.012: together 0.043.
ERROR = 0.05
# All of these are nearly free of bias: 0.997 to 1.001 were found. Sums of 4608 keys in one
# accumulator of float8 units have 1.07.
GAIN = 0.99, 1.01


def heads_of(seed, shape, data):
    """Return bfloat16 q, k and v, the former two normed as models do."""
    batch, tq, tk, heads, kv_heads, d = shape
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, tq, heads, d))
    k, v = (rng.standard_normal((batch, tk, kv_heads, d)) for _ in range(2))
    if data == "outlier":  # a few large channels, others of all sizes, and none around 0
        k = k + 2 * rng.standard_normal((kv_heads, d))
        k[..., :3] *= 6
        v = v * np.exp(0.7 * rng.standard_normal((kv_heads, d))) + 0.5
    q, k = (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)) for x in (q, k))
    return tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))


def exact(q, k, v, scale):
    """Return the attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    out = np.empty_like(q)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        logits = q[b, :, h] @ k[b, :, h].T * scale
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[b, :, h] = p @ v[b, :, h] / p.sum(axis=1, keepdims=True)
    return out


def error_and_gain(found, wanted):
    found = np.asarray(found, np.float64)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    return error, np.sum(found * wanted) / np.sum(wanted**2)


@jax.jit
def quantized(q, k, v):
    return quantize_heads(q, k, v, v_scale=value_scale(v))


@pytest.mark.parametrize("subject", subjects(ATTENTION))
class TestAttention:
    """What every backend does in 16 bits."""

    @of_data
    @of_shapes
    def test_close_to_float64(self, subject, shape, data):
        q, k, v = heads_of(1, shape, data)
        found = jit(subject, lambda *a: subject(*a, scale=0.1))(q, k, v)
        assert found.dtype == jnp.bfloat16
        error, gain = error_and_gain(found, exact(q, k, v, 0.1))
        # p and the result are rounded to bfloat16, 2**-9 at most and 0.0017 rms each.
        assert error < 0.004
        assert abs(gain - 1) < 0.002


def whole(run, heads, *, scale):
    """Attend in 8 bits, all tokens as one stream."""
    (out,) = run(heads, scale=scale, streams=(heads.tokens,))
    return out


@pytest.mark.parametrize("subject", subjects(ATTENTION_INT8_FP8))
class TestAttentionInt8Fp8:
    """What every backend does in 8 bits."""

    @of_data
    @of_shapes
    def test_close_to_float64(self, subject, shape, data):
        q, k, v = heads_of(2, shape, data)
        scale = 1 / math.sqrt(shape[-1])
        found = jit(subject, lambda x: whole(subject, x, scale=scale))(quantized(q, k, v))
        assert found.dtype == jnp.bfloat16
        assert found.shape == q.shape
        error, gain = error_and_gain(found, exact(q, k, v, scale))
        assert error < ERROR
        assert GAIN[0] < gain < GAIN[1]

    @of_data
    @of_shapes
    def test_close_to_the_reference_on_the_same_codes(self, subject, shape, data):
        heads = quantized(*heads_of(3, shape, data))
        found = jit(subject, lambda x: whole(subject, x, scale=0.1))(heads)
        wanted = np.asarray(whole(reference.attention_int8_fp8, heads, scale=0.1), np.float64)
        # The same codes but for those at a rounding's edge; sums of 128 in some 14 bits, and one
        # rounding to bfloat16.
        assert error_and_gain(found, wanted)[0] < 0.01

    def test_values_may_have_no_scale(self, subject):
        q, k, v = heads_of(4, SHAPES[1], "gaussian")
        found = whole(subject, jax.jit(quantize_heads)(q, k, v), scale=0.1)
        error, gain = error_and_gain(found, exact(q, k, v, 0.1))
        assert error < ERROR
        assert GAIN[0] < gain < GAIN[1]

    def test_sharp_rows_return_their_key_s_value(self, subject):
        """Each query equals a key, so that all weight is there: order, heads and blocks are right.

        The next logit lies more than 30 octaves lower, so only the value's rounding is left.
        """
        batch, tokens, heads, d = 2, 256, 2, 64
        rng = np.random.default_rng(5)
        k = rng.choice([-1.0, 1.0], (batch, tokens, heads, d))
        order = rng.permutation(tokens)
        v = rng.standard_normal(k.shape)
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (k[:, order], k, v))
        found = np.asarray(whole(subject, quantized(q, k, v), scale=4.0), np.float64)
        wanted = np.asarray(v, np.float64)[:, order]
        scale = np.asarray(value_scale(v), np.float64)[:, None]
        # Half a step of e4m3, or of its subnormals, and bfloat16's.
        assert (np.abs(found - wanted) <= 0.065 * np.abs(wanted) + 2.0**-10 * scale).all()

    def test_the_largest_logit_has_its_share(self, subject):
        """Linear codes are right at powers of two and 4 % too high on average.

        With the row's largest probability at a power of two the gain is 0.985.
        """
        q, k, v = heads_of(12, (2, 128, 1152, 4, 4, 128), "gaussian")
        scale = 2 / math.sqrt(128)  # logits of a deviation of 2, of which few count
        _, gain = error_and_gain(
            whole(subject, quantized(q, k, v), scale=scale), exact(q, k, v, scale)
        )
        # The mean of 1024 rows of some ten terms, each 4 % off: a thousandth.
        assert abs(gain - 1) < 0.005

    def test_padding_has_no_weight_where_every_logit_is_very_negative(self, subject):
        """Zeros as keys would have logits of 0, far above all others, which then had no codes."""
        q, k, v = heads_of(6, (1, 64, 100, 1, 1, 64), "gaussian")
        q = jnp.abs(q[:, :1, :, :]) * jnp.ones_like(q)
        k = -q[:, :1] + 0.1 * k
        found = whole(subject, quantized(q, k, v), scale=1.0)
        wanted = exact(q, k, v, 1.0)
        assert (np.einsum("bqhd,bkhd->bhqk", *(np.float64(x) for x in (q, k))) < -30).all()
        # Errors of int8 in logits of 60 are larger than in usual ones.
        assert error_and_gain(found, wanted)[0] < 0.3

    def test_heads_of_a_group_read_one_kv_head(self, subject):
        q, k, v = heads_of(7, (2, 70, 300, 4, 2, 64), "outlier")
        grouped = whole(subject, quantized(q, k, v), scale=0.1)
        repeated = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        np.testing.assert_array_equal(grouped, whole(subject, quantized(q, *repeated), scale=0.1))

    def test_batch_elements_are_independent(self, subject):
        arrays = heads_of(8, (2, 70, 130, 2, 2, 64), "outlier")
        found = whole(subject, quantized(*arrays), scale=0.1)
        for i in range(2):
            alone = whole(subject, quantized(*(x[i : i + 1] for x in arrays)), scale=0.1)
            np.testing.assert_array_equal(found[i : i + 1], alone)

    def test_what_is_not_a_number_stays_so(self, subject):
        q, k, v = heads_of(9, (3, 70, 130, 2, 2, 64), "gaussian")
        q = q.at[0, 3, 1, 5].set(jnp.nan)
        v = v.at[1, 129, 0, 7].set(jnp.nan)
        k = k.at[2, 100, 0, 2].set(jnp.nan)
        found = np.isnan(
            np.asarray(whole(subject, jax.jit(quantize_heads)(q, k, v), scale=0.1), np.float32)
        )
        wanted = np.zeros_like(found)
        wanted[0, 3, 1] = wanted[1, :, 0, 7] = wanted[2, :, 0] = True
        np.testing.assert_array_equal(found, wanted)

    @pytest.mark.parametrize("streams", [(64, 134), (70, 128), (0, 198), (128, 64, 6)])
    def test_streams_come_apart(self, subject, streams):
        """Written apart by the kernel where they end between its rows, cut otherwise."""
        heads = quantized(*heads_of(6, (2, 198, 198, 4, 2, 64), "gaussian"))
        parts = subject(heads, scale=0.1, streams=streams)
        assert [part.shape[1] for part in parts] == list(streams)
        np.testing.assert_array_equal(
            np.concatenate(parts, axis=1), np.asarray(whole(subject, heads, scale=0.1))
        )


def random_heads(shape=SHAPES[1], data="outlier"):
    arrays = heads_of(10, shape, data)
    return arrays, quantized(*arrays)


def test_codes_are_the_rotated_rows_within_half_a_step():
    (q, k, _), heads = random_heads()
    rotation = operands.hadamard(64) / 8.0
    assert np.abs(np.asarray(heads.q)).max(axis=-1).min() == 127
    for x, codes, scale in (
        (q, heads.q, np.asarray(heads.q_scale).transpose(0, 2, 1)[..., None]),
        (
            k,
            heads.k,
            np.repeat(np.asarray(heads.k_scale), 128, axis=2).transpose(0, 2, 1)[..., None],
        ),
    ):
        tokens = x.shape[1]
        wanted = np.asarray(x, np.float64) @ rotation
        found = np.asarray(codes, np.float64) * scale
        # float32 sums of 64 elements move a tie a little.
        assert (np.abs(found[:, :tokens] - wanted) <= 0.5001 * scale[:, :tokens]).all()
        np.testing.assert_array_equal(
            codes[:, tokens:], codes[:, tokens - 1 :][:, :1] + 0 * codes[:, tokens:]
        )


def test_a_block_of_keys_ends_at_127_under_its_own_scale():
    _, heads = random_heads()
    blocks = np.abs(np.asarray(heads.k, np.int32)).reshape(2, 3, 128, 2, 64)
    assert (blocks.max(axis=(2, 4)) == 127).all()
    assert len(np.unique(heads.k_scale)) == heads.k_scale.size


def test_values_and_ones_end_with_the_last_key():
    (_, _, v), heads = random_heads()
    codes = np.asarray(operands.from_kernel_order(heads.v.astype(jnp.float32)))
    assert (codes[:, :, 64:, :300] == 1).all()
    assert (codes[:, :, :, 300:] == 0).all()
    found = codes[:, :, :64, :300] * np.asarray(heads.v_scale)[..., None]
    wanted = np.asarray(v, np.float64).transpose(0, 2, 3, 1)
    # e4m3 has three bits behind the point, and steps of 2**-9 below 2**-6.
    bound = 2.0**-4 * np.abs(wanted) + 2.0**-10 * np.asarray(heads.v_scale)[..., None]
    assert (np.abs(found - wanted) <= 1.001 * bound).all()
    assert (np.abs(codes[:, :, :64]).max(axis=-1) == 448).all()


def test_the_kernel_s_order_is_that_of_an_accumulator_s_columns():
    """A thread has columns 8 j + 2 t and the next one, and gives 4 consecutive bytes at 4 t."""
    given = [8 * j + 2 * thread + e for thread in range(4) for j in (0, 1) for e in (0, 1)]
    np.testing.assert_array_equal(operands.V_ORDER, given)
    x = jnp.arange(64).reshape(2, 32)
    np.testing.assert_array_equal(operands.from_kernel_order(operands.to_kernel_order(x)), x)


def test_probabilities_are_powers_of_two_to_a_sixteenth_and_the_linear_code_s_share():
    octaves = np.linspace(-5.9, 8, 5000, dtype=np.float32)
    ratio = np.asarray(reference.probabilities(octaves), np.float64) / 2.0**octaves
    # 1 + x is at most 6.15 % above 2**x, and rounding to three bits moves by a sixteenth.
    assert ratio.min() >= 1 - 2.0**-4
    assert ratio.max() <= 1.0615 * (1 + 2.0**-4)
    assert (
        np.asarray(reference.probabilities(np.float32([-16, -np.inf, 0, 8]))) == [0, 0, 1, 256]
    ).all()


def test_bits_that_begin_at_the_kernel_s_zero_are_the_float_of_a_product():
    """All that int8 codes of any head can sum up to, -128 included; their order is that of ints."""
    largest = 128 * 128 * max(mosaic_gpu.HEAD_DIMS)
    products = np.arange(-largest, largest + 1, dtype=np.int32)
    bits = np.int32(registers.PRODUCT_BITS) + products
    found = bits.view(np.float32)
    assert found[largest] == registers.PRODUCT_ZERO
    np.testing.assert_array_equal(found - np.float32(registers.PRODUCT_ZERO), products)
    assert (np.diff(bits) == 1).all() and (np.diff(found) == 1).all()


def test_codes_from_those_bits_are_the_reference_s():
    """The kernel's float32 operations: a code differs, by one, at a rounding's edge alone."""
    rng = np.random.default_rng(13)
    zero, f32 = np.float32(registers.PRODUCT_ZERO), np.float32
    products = rng.integers(-400_000, 400_001, (256, 128))
    unit = (rng.uniform(0.5, 200, (256, 1)) / 127**2 / 128).astype(f32)  # octaves
    best = (products.max(axis=1, keepdims=True).astype(f32) * unit).astype(f32)

    def fma(a, b, c):
        return (np.float64(a) * np.float64(b) + np.float64(c)).astype(f32)

    offset = fma(-zero, 8 * unit, fma(f32(reference.TOP) - best, 8, 8 * reference.E4M3_BIAS))
    code = fma((registers.PRODUCT_BITS + products).astype(np.int32).view(f32), 8 * unit, offset)
    exact = 8 * (products * np.float64(unit) - np.float64(best) + reference.TOP + 7)
    # Octaves up to 200, 2**7.65: 2**-10 of a code, and float32 sums of some hundreds.
    assert np.abs(code - exact).max() < 2.0**-9
    found = np.maximum(np.round(code), 0).astype(np.uint8).view(jnp.float8_e4m3fn)
    wanted = np.asarray(reference.probabilities(exact.astype(f32) / 8 - 7))
    different = found.view(np.uint8) != wanted.astype(jnp.float8_e4m3fn).view(np.uint8)
    assert different.mean() < 2.0**-8


def test_without_a_name_the_device_chooses():
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    heads = jax.eval_shape(quantize_heads, q, q, q)
    hopper, ampere = (device.describe("gpu", f"NVIDIA {name}") for name in ("H100", "A100"))
    assert mosaic_gpu.why_not(hopper, heads) is None
    assert mosaic_gpu.why_not(ampere, heads) == "needs a Hopper GPU, not NVIDIA A100"
    small = dataclasses.replace(heads, q=jax.ShapeDtypeStruct((1, 128, 2, 32), jnp.int8))
    assert mosaic_gpu.why_not(hopper, small) == "needs heads of 64 or 128 channels, not 32"
    assert mosaic_gpu.why_not(hopper, heads, scale=-1.0) == "needs a scale of at least 0, not -1.0"
    if not ON_HARDWARE:
        explained = ATTENTION_INT8_FP8.explain(heads, scale=1.0, streams=(128,))
        assert explained.endswith("attention_int8_fp8/reference: runs")


def test_cudnn_takes_what_its_flash_attention_does(monkeypatch):
    why_not = ATTENTION.backend("cudnn").why_not
    hopper = device.describe("gpu", "NVIDIA H100")
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct((1, 128, 2, 256), jnp.bfloat16)
    if not ON_HARDWARE:
        assert "it has no GPU" in why_not(hopper, q)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert why_not(hopper, q) is None
    assert "needs an NVIDIA GPU from Ampere on" in why_not(device.describe("cpu", "cpu"), q)
    assert "at most 128, not 256" in why_not(hopper, wide)
    assert "takes 16-bit floats" in why_not(hopper, jax.ShapeDtypeStruct(q.shape, jnp.float32))


@pytest.mark.parametrize(
    ("tokens", "clusters"), [(4608, {1, 2}), (4480, {1}), (5, {1}), (129, {1, 2})]
)
def test_pairs_need_an_even_number_of_tiles(tokens, clusters):
    assert mosaic_gpu.choose_config(tokens).cluster == max(clusters)
    assert {config.cluster for config in mosaic_gpu.search_space(tokens)} == clusters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 70, 4, 64), np.int8)}, "q has dtype int8; it must be floating"),
        ({"k": np.zeros((2, 9, 4, 32), jnp.bfloat16)}, r"k has shape .*; it must be \[2, tk"),
        ({"v": np.zeros((2, 9, 2, 64), jnp.bfloat16)}, r"v has shape \[2, 9, 2, 64\]; it must be"),
        ({"v": np.zeros((2, 300, 2, 64), np.float32)}, "v has dtype float32; it must be bfloat16"),
        (dict.fromkeys("kv", np.zeros((2, 9, 3, 64), jnp.bfloat16)), "must divide the 4 heads"),
        (dict.fromkeys("kv", np.zeros((2, 0, 2, 64), jnp.bfloat16)), "at least one key"),
        ({"scale": float("nan")}, "scale is nan; it must be None or a finite number"),
        ({"implementation": "mosaic_gpu"}, "known are cudnn, xla"),
    ],
)
def test_bad_16_bit_arguments_are_refused(change, message):
    call = dict(zip("qkv", heads_of(11, SHAPES[1], "gaussian"), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        attention(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 128, 4, 64), np.float32)}, "q has dtype float32; it must be int8"),
        ({"q": np.zeros((2, 70, 4, 64), np.int8)}, "q has 70 tokens; they must be padded to 128s"),
        ({"k": np.zeros((2, 384, 3, 64), np.int8)}, "must divide the 4 heads"),
        ({"k_scale": np.zeros((2, 2, 2), np.float32)}, r"k_scale has shape \[2, 2, 2\]"),
        ({"q_scale": np.zeros((2, 4, 70), np.float32)}, r"q_scale has shape \[2, 4, 70\]"),
        ({"v": np.zeros((2, 2, 64, 384), jnp.float8_e4m3fn)}, r"v has shape \[2, 2, 64, 384\]"),
        ({"v_scale": np.zeros((2, 64), np.float32)}, r"v_scale has shape \[2, 64\]"),
        ({"tokens": 129}, "tokens is 129; it must be what 128 queries are padded from"),
    ],
)
def test_bad_8_bit_arguments_are_refused(change, message):
    _, heads = random_heads()
    with pytest.raises(ValueError, match=message):
        attention_int8_fp8(dataclasses.replace(heads, **change))


@pytest.mark.parametrize("streams", [(64, 7), (71, -1), ()])
def test_streams_are_all_tokens(streams):
    with pytest.raises(ValueError, match="their sum must be the 70 tokens"):
        attention_int8_fp8(random_heads()[1], streams=streams)


def test_floats_are_not_taken_for_codes():
    with pytest.raises(ValueError, match=r"heads is a .*; it must be QuantizedHeads"):
        attention_int8_fp8(jnp.zeros((1, 128, 1, 64)))
