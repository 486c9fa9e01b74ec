"""Simulated formats against independent sources: ml_dtypes, the codec, rules in plain Python."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartz_jax import QuartzConfig, dequantize, quantize, quantize_int
from quartz_jax.formats import MXFP4, NVFP4, SDR, Int, Quartz
from quartz_jax.formats.floating import round_e2m1, round_e4m3
from quartz_jax.schema import from_json, to_json

seeds = st.integers(0, 2**32 - 1)
FORMATS = [
    Int(width=8),
    Int(width=4),
    Int(width=4, block=64, scale="float16"),
    Int(width=4, block=16, scale="float16"),
    Int(width=4, block=64, scale="float16", range="unsigned"),
    Int(width=8, range="minmax"),
    MXFP4(),
    NVFP4(),
    SDR(base=8),
    SDR(base=16),
    Quartz(),
    Quartz(rounding="truncate"),
    Quartz(range="minmax"),
    Quartz(step="integer"),
    Quartz(step="integer", search=True),
    Quartz(group_size=32, scale_block=64),
]


def heavy_tailed(seed, shape=(6, 192)):
    """Values over many orders of magnitude, some exactly zero, as float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, shape) * 2.0 ** rng.integers(-20, 20, (*shape[:-1], 1))
    return np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)


def blocks_of(x, size):
    return x.reshape(*x.shape[:-1], -1, size)


def test_e2m1_rounds_as_ml_dtypes_does_on_every_bfloat16():
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.isfinite(x)]
    expected = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (np.asarray(round_e2m1(x)) == expected).all()


def test_e4m3_rounds_as_ml_dtypes_does_on_every_bfloat16_and_halfway():
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[(x >= 0) & (x <= 448)]
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halfway = (values[1:] + values[:-1]) / 2
    for each in (x, halfway, np.nextafter(halfway, np.float32(0))):
        expected = each.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert (np.asarray(round_e4m3(each)) == expected).all()


@given(seeds)
def test_mxfp4_is_bit_for_bit_what_ml_dtypes_gives(seed):
    x = heavy_tailed(seed)
    blocks = blocks_of(x, 32)
    peak = np.abs(blocks).max(-1, keepdims=True).astype(np.float64)
    exponent = np.floor(np.log2(np.where(peak > 0, peak, 1))) - 2
    scale = (2.0**exponent).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    codes = (blocks / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (np.asarray(MXFP4()(x)) == (codes * scale).reshape(x.shape)).all()


@given(seeds)
def test_nvfp4_is_bit_for_bit_what_ml_dtypes_gives(seed):
    x = heavy_tailed(seed)
    blocks = blocks_of(x, 16)
    g = np.abs(x).max() / np.float32(448 * 6)
    scale = np.abs(blocks).max(-1, keepdims=True) / (np.float32(6) * g)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * g
    codes = (blocks / np.where(scale > 0, scale, 1)).astype(ml_dtypes.float4_e2m1fn)
    assert (np.asarray(NVFP4()(x)) == (codes.astype(np.float32) * scale).reshape(x.shape)).all()


def test_nvfp4_of_one_image_does_not_depend_on_the_others():
    x = heavy_tailed(0, (3, 4, 64)) * np.float32([[[1]], [[100]], [[0.01]]])
    # to the last place: how XLA fuses the two scales depends on the shape
    np.testing.assert_allclose(NVFP4()(x)[1], NVFP4()(x[1]), rtol=2e-7)


def razor(q, base):
    """The rule of the spec, one element of a group at a time, in Python integers."""
    largest = max(abs(v) for v in q)
    step = 1
    for b in range(4, base + 1):
        if 2 ** (b - 1) <= largest < 2**b:
            step = 2 ** (b + 1 - 4)
    out = []
    for value in q:
        mantissa = round(abs(value) / step)  # Python rounds halves to even
        if mantissa == 8 and value > 0:
            mantissa = 7
        out.append((-1 if value < 0 else 1) * mantissa * step)
    return out


@settings(max_examples=40)
@given(seeds, st.sampled_from([8, 16]), st.sampled_from([8, 16, 32]))
def test_sdr_follows_the_rule_on_random_groups(seed, base, group):
    top = 2 ** (base - 1) - 1
    rng = np.random.default_rng(seed)
    q = rng.integers(-top, top + 1, (4, 96)) >> rng.integers(0, base, (4, 96))
    q[:, 0] = top  # so that the scale is 1 and stage one gives the integers themselves
    format_ = SDR(base=base, block=group)
    expected = np.reshape([razor(b, base) for b in q.reshape(-1, group).tolist()], q.shape)
    got = np.asarray(format_(q.astype(np.float32))) / np.float32(top * np.float32(1 / top))
    assert (np.round(got) == expected).all()


@settings(max_examples=40)
@given(
    seeds,
    st.sampled_from([8, 16, 64]),
    st.sampled_from([("nearest", "power"), ("truncate", "power"), ("nearest", "integer")]),
    st.sampled_from(["absmax", "minmax"]),
    st.sampled_from([None, 64]),
    st.sampled_from([1, 37, 130]),
)
def test_quartz_is_bit_for_bit_the_codec(seed, group, variant, range_, block, k):
    rounding, step = variant
    range_ = "absmax" if step == "integer" else range_
    fields = {"group_size": group, "rounding": rounding, "step": step, "range": range_}
    fields["scale_block"] = block
    x = heavy_tailed(seed, (3, k))
    assert (Quartz(**fields)(x) == dequantize(quantize(x, QuartzConfig(**fields)))).all()


def test_searched_steps_are_the_codec_s():
    x = jax.random.normal(jax.random.key(0), (8, 160))
    expected = dequantize(quantize(x, QuartzConfig(step="integer"), search=True))
    assert (Quartz(step="integer", search=True)(x) == expected).all()


@pytest.mark.parametrize(("width", "range_"), [(8, "absmax"), (8, "minmax"), (4, "absmax")])
def test_row_integers_are_the_codec_s(width, range_):
    x = jnp.asarray(heavy_tailed(1))
    expected = dequantize(quantize_int(x, width, range_))
    assert (Int(width=width, range=range_)(x) == expected).all()


@given(seeds, st.sampled_from([16, 64]))
def test_int4_blocks_use_the_float16_scale_that_they_store(seed, block):
    x = heavy_tailed(seed)
    blocks = blocks_of(x, block)
    scale = np.abs(blocks).max(-1, keepdims=True) * np.float32(1 / 7)
    scale = np.minimum(scale, 65504).astype(np.float16).astype(np.float32)
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(np.float32)
    expected = np.clip(np.round(blocks * inverse), -7, 7) * scale
    got = np.asarray(Int(width=4, block=block, scale="float16")(x))
    assert (got == expected.reshape(x.shape)).all()


ONE_LEVEL = [f for f in FORMATS if isinstance(f, Int | MXFP4) and "unsigned" not in str(f)]


@pytest.mark.parametrize("format_", ONE_LEVEL, ids=str)
def test_stored_values_are_kept_when_stored_again(format_):
    once = format_(heavy_tailed(2))
    np.testing.assert_allclose(format_(once), once, rtol=1e-3, atol=1e-3 * float(once.max()))


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_a_short_last_block_and_zeros_are_ordinary_input(format_):
    x = np.zeros((2, 37), np.float32)
    assert (format_(x) == 0).all()
    x[0, 36] = 3
    assert format_(x).shape == x.shape
    assert format_(x)[0, 36] == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize(
    ("format_", "bits"),
    [
        (Int(width=4), 4 + 32 / 512),
        (Int(width=4, block=64, scale="float16"), 4.25),
        (Int(width=4, block=16, scale="float16"), 5),
        (MXFP4(), 4.25),
        (NVFP4(), 4.5),
        (SDR(base=8), 4 + 3 / 16 + 32 / 512),
        (Quartz(), 4.25 + 32 / 512),
        (Quartz(group_size=32, scale_block=64), 4.125 + 0.5),
    ],
)
def test_bits_an_element_count_scales_and_shifts(format_, bits):
    assert format_.bits(512) == bits


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_formats_survive_json(format_):
    assert from_json(to_json(format_)) == format_


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Int(width=9), "width is 9"),
        (lambda: Int(block=0), "block is 0"),
        (lambda: SDR(base=12), "base is 12"),
        (lambda: Quartz(rounding="up"), "rounding is 'up'"),
        (lambda: Quartz(scale_block=24), "scale_block is 24"),
        (lambda: Quartz(search=True), "search is True"),
        (lambda: from_json({"part": "FP3"}), "part is 'FP3'"),
        (lambda: from_json({"part": "Int", "bits": 4}), "part Int has wrong fields"),
    ],
)
def test_bad_fields_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
