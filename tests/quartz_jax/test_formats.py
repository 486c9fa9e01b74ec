"""Formats against independent sources: ml_dtypes, NumPy, rules in plain Python, hand-made cases."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import codec
from quartz_jax.formats import (
    IF4,
    MXFP4,
    NVFP4,
    SDR,
    FittedTable,
    Format,
    HiF4,
    Int,
    Quartz,
    RaZeR,
    Table,
)
from quartz_jax.formats.floating import decode_e2m1, encode_e2m1, round_e2m1, round_e4m3
from quartz_jax.formats.storage import row_operand
from quartz_jax.formats.table import TABLES
from quartz_jax.schema import from_json

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
    Quartz(step="integer", levels="stretched"),
    Quartz(group_size=32, scale_block=64),
    NVFP4(block_max="4or6"),
    IF4(),
    RaZeR(),
    HiF4(),
    FittedTable(),
    Table(),
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
    assert (np.asarray(decode_e2m1(encode_e2m1(x))) == expected).all()


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


def e2m1(t):
    return t.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def two_level(x, top, largest):
    """Return blocks of 16, and the E4M3 scale times g that takes each one's maximum to `top`."""
    blocks = blocks_of(x, 16)
    g = np.abs(x).max() / np.float32(6 * largest)
    scale = np.abs(blocks).max(-1, keepdims=True) / (np.float32(top) * g)
    return blocks, scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * g


def best_of(candidates, blocks):
    """Return the candidate of least squared error of each block, the first on a tie."""
    error = [((np.float64(y) - blocks) ** 2).sum(-1, keepdims=True) for y in candidates]
    return np.take_along_axis(np.stack(candidates), np.argmin(error, 0)[None], 0)[0]


@settings(max_examples=30)
@given(seeds)
def test_four_over_six_takes_the_better_of_both_scales(seed):
    x = np.random.default_rng(seed).standard_t(4, (6, 192)).astype(np.float32)
    candidates = []
    for top in (6, 4):
        blocks, step = two_level(x, top, largest=256)
        candidates.append(e2m1(blocks / np.where(step > 0, step, 1)) * step)
    expected = best_of(candidates, blocks).reshape(x.shape)
    assert (np.asarray(NVFP4(block_max="4or6")(x)) == expected).all()


def test_four_over_six_holds_four_evenly_spaced_values():
    x = np.float32([[8, 6, 4, 2] + [0] * 12])
    np.testing.assert_allclose(NVFP4(block_max="4or6")(x), x, rtol=1e-6)
    # 6 / 8 of six is 4.5, which E2M1 lacks
    np.testing.assert_allclose(NVFP4()(x), [[8, 16 / 3, 4, 2] + [0] * 12], rtol=1e-6)


@settings(max_examples=30)
@given(seeds)
def test_if4_takes_the_better_of_floats_and_integers(seed):
    x = np.random.default_rng(seed).standard_t(4, (6, 192)).astype(np.float32)
    blocks, step = two_level(x, 6, largest=448)
    t = blocks / np.where(step > 0, step, 1)
    integers = np.clip(np.rint(t * np.float32(7 / 6)), -7, 7) * np.float32(6 / 7)
    expected = best_of([e2m1(t) * step, integers * step], blocks).reshape(x.shape)
    assert (np.asarray(IF4()(x)) == expected).all()


def test_if4_holds_all_integers_to_seven_and_flags_them_in_the_scale_s_sign():
    integers = np.float32([[7, -6, 5, -4, 3, -2, 1, 0] * 2])
    floats = np.float32([[6, -4, 3, -2, 1.5, -1, 0.5, 0] * 2])
    x = np.concatenate([integers, floats * 7 / 6])
    np.testing.assert_allclose(IF4()(x), x, rtol=1e-6)
    assert (IF4().store(x).scales["scale"] >> 7).tolist() == [[1], [0]]


@settings(max_examples=30)
@given(seeds)
def test_razer_takes_the_better_of_both_extra_values(seed):
    x = np.random.default_rng(seed).standard_t(4, (6, 192)).astype(np.float32)
    blocks, step = two_level(x, 6, largest=448)
    t = blocks / np.where(step > 0, step, 1)
    extended = [np.where(np.abs(t - v) <= np.abs(t - e2m1(t)), v, e2m1(t)) for v in (5, -5)]
    candidates = [np.float32(values) * step for values in extended]
    assert (np.asarray(RaZeR()(x)) == best_of(candidates, blocks).reshape(x.shape)).all()


def test_razer_holds_five_in_place_of_minus_zero():
    x = np.float32([[6, 5, -4, -0.0] + [-0.1] * 12, [-6, -5, 4, 5.4] + [0] * 12])
    expected = np.float32([[6, 5, -4, 0] + [0] * 12, [-6, -5, 4, 6] + [0] * 12])
    np.testing.assert_allclose(RaZeR()(x), expected, rtol=1e-6, atol=0)
    assert (RaZeR().store(x).scales["scale"] >> 7).tolist() == [[0], [1]]


def hif4_of(values):
    """The rule of 64 elements, one at a time, in Python floats."""
    peak = max(map(abs, values)) / 7
    exponent = min(max(int(np.floor(np.log2(peak))), -48), 15)
    scale = min(round(peak / 2.0 ** (exponent - 2)) * 2.0 ** (exponent - 2), 1.5 * 2.0**15)
    out = []
    for i, value in enumerate(values):
        eight = max(abs(v) for v in values[i // 8 * 8 : i // 8 * 8 + 8])
        four = max(abs(v) for v in values[i // 4 * 4 : i // 4 * 4 + 4])
        step = scale * (2 if eight >= 4 * scale else 1)
        step *= 2 if four >= 2 * step else 1
        out.append(max(min(round(4 * value / step), 7), -7) / 4 * step)
    return out


@settings(max_examples=20)
@given(seeds)
def test_hif4_follows_the_rule_on_random_rows(seed):
    x = np.random.default_rng(seed).standard_t(3, (3, 128)).astype(np.float32)
    expected = np.reshape([hif4_of(b) for b in x.reshape(-1, 64).tolist()], x.shape)
    np.testing.assert_array_equal(HiF4()(x), expected.astype(np.float32))


def test_hif4_holds_what_its_exponents_reach():
    x = np.zeros((1, 64), np.float32)
    x[0, :4] = 7, -6, 5, 4  # both exponent bits: whole numbers
    x[0, 4:8] = 3.5, -2.5, 0.5, 0  # the eight's bit alone: halves
    x[0, 8:12] = 1.75, -1.5, 0.25, 0  # neither: quarters
    stored = HiF4().store(x)
    np.testing.assert_array_equal(HiF4()(x), x)
    assert stored.scales["scale"].tolist() == [[48 << 2]]  # 2**0
    assert stored.scales["by_8"].tolist() == [[1]]
    assert stored.scales["by_4"].tolist() == [[1, 0]]


def test_tables_ascend_and_one_of_them_holds_zero():
    assert TABLES.shape == (16, 16) and (np.diff(TABLES.astype(int)) > 0).all()
    assert (np.abs(TABLES.astype(int)) <= 127).all() and (TABLES == 0).any()


@settings(max_examples=15)
@given(seeds)
def test_a_block_takes_the_table_of_least_error_and_its_nearest_levels(seed):
    x = heavy_tailed(seed, (3, 64))
    q, scale = (np.asarray(a) for a in codec.quantize_absmax(x))
    distance = np.abs(2 * np.int32(q)[..., None, None] - 2 * TABLES.astype(int))
    codes = np.argmin(distance, -1)  # [3, 64, 16 tables], the lower of equals
    nearest = np.take_along_axis(np.moveaxis(distance, -1, 0), codes[None], 0)[0]
    table = np.argmin((blocks_of(nearest.swapaxes(1, 2), 16) ** 2).sum(-1), 1)  # [3, 4]
    each = np.repeat(table, 16, axis=1)
    values = TABLES[each, np.take_along_axis(codes, each[..., None], -1)[..., 0]]
    stored = Table().store(x)
    np.testing.assert_array_equal(codec.unpack(stored.scales["table"], signed=False), table)
    operand = row_operand(stored)
    np.testing.assert_array_equal(operand.values, values)
    np.testing.assert_array_equal(operand.scale, scale)
    np.testing.assert_array_equal(Table()(x), values * scale)


def stored_table(x):
    """Return the arrays of a fitted table of [rows, k]: table, E4M3 scales, row scales, codes."""
    stored = FittedTable().store(x)
    scale = np.asarray(stored.scales["scale"]).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.asarray(codec.unpack(stored.codes, signed=False))
    return np.asarray(stored.scales["table"])[0], scale, stored.scales["row_scale"], codes


def test_a_fitted_table_decodes_to_int8_as_its_source_has_it():
    x = heavy_tailed(3)
    table, scale, row, codes = stored_table(x)
    integers = np.clip(np.rint(table[codes] * np.repeat(scale, 16, 1)), -127, 127)
    operand = row_operand(FittedTable().store(x))
    np.testing.assert_array_equal(operand.values, integers)
    np.testing.assert_array_equal(operand.scale, row)
    # The largest is 127 but for the rounding of its block's scale, to a sixteenth.
    assert (np.abs(integers).max(1) >= 119).all()
    # Each code is of the integer nearest to the value.
    levels = np.clip(np.rint(table * np.repeat(scale, 16, 1)[..., None]), -127, 127)
    distance = np.abs(levels - (x / np.where(row > 0, row, 1))[..., None])
    chosen = np.take_along_axis(distance, codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(-1), rtol=0, atol=2e-5)


def test_levels_of_a_fitted_table_are_the_means_of_what_is_nearest():
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    table = stored_table(x)[0]
    assert (np.diff(table) > 0).all()
    t = blocks_of(x, 16) / np.abs(blocks_of(x, 16)).max(-1, keepdims=True)
    nearest = np.argmin(np.abs(t[..., None] - table), -1)
    means = [t[nearest == i].mean() for i in range(16)]
    # 25 steps of Lloyd's method come this near to where it stops.
    np.testing.assert_allclose(table, means, rtol=0, atol=0.01)


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


@settings(max_examples=10)
@given(
    seeds,
    st.sampled_from([8, 16]),
    st.sampled_from(["power", "truncate", "integer", "stretched", "searched"]),
    st.sampled_from(["absmax", "minmax"]),
    st.sampled_from([None, 64]),
)
def test_quartz_stores_what_the_codec_gives(seed, group, variant, range_, block):
    step = "power" if variant in ("power", "truncate") else "integer"
    stage_2 = {
        "rounding": "truncate" if variant == "truncate" else "nearest",
        "step": step,
        "levels": "stretched" if variant in ("stretched", "searched") else "uniform",
        "search": variant == "searched",
    }
    range_ = "absmax" if step == "integer" else range_
    x = heavy_tailed(seed, (3, 37))
    values, scale, lo = codec.quantize_8bit(x, range=range_, scale_block=block)
    codes, shifts = codec.encode(values, group_size=group, **stage_2)
    q = Quartz(group_size=group, range=range_, scale_block=block, **stage_2).store(x)
    np.testing.assert_array_equal(q.codes, codec.pack(codes))
    np.testing.assert_array_equal(q.shifts, codec.pack(shifts))
    np.testing.assert_array_equal(q.scale, scale)
    assert (q.lo is None) == (lo is None)
    if lo is not None:
        np.testing.assert_array_equal(q.lo, lo)


@pytest.mark.parametrize("range_", ["absmax", "minmax"])
def test_eight_bits_of_a_row_are_stage_one(range_):
    x = jnp.asarray(heavy_tailed(1))
    values, scale, lo = codec.quantize_8bit(x, range=range_)
    q = Int(width=8, range=range_).store(x)
    np.testing.assert_array_equal(q.values, codec.to_operand(values))
    np.testing.assert_array_equal(q.scale, scale)
    assert (q.lo is None) == (lo is None)


def test_four_bit_rows_are_multiplied_as_integers_of_seven_steps():
    x = jnp.asarray(heavy_tailed(1))
    values, scale = codec.quantize_absmax(x, limit=7)
    q = row_operand(Int().store(x))
    np.testing.assert_array_equal(q.values, values)
    np.testing.assert_array_equal(q.scale, scale)


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
        (NVFP4(block_max="4or6"), 4.5),
        (IF4(), 4.5),
        (RaZeR(), 4.5),
        (HiF4(), 4.5),
        (FittedTable(), 4.5 + 32 / 512),
        (Table(), 4.25 + 32 / 512),
        (SDR(base=8), 4 + 3 / 16 + 32 / 512),
        (Quartz(), 4.25 + 32 / 512),
        (Quartz(group_size=32, scale_block=64), 4.125 + 0.5),
    ],
)
def test_bits_an_element_count_scales_and_shifts(format_, bits):
    assert format_.bits(512) == bits


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Int(width=9), "width is 9"),
        (lambda: Int(block=0), "block is 0"),
        (lambda: SDR(base=12), "base is 12"),
        (lambda: Quartz(rounding="up"), "rounding is 'up'"),
        (lambda: Quartz(scale_block=24), "scale_block is 24"),
        (lambda: Quartz(search=True), "search is True"),
        (lambda: NVFP4(block_max="4"), "block_max is '4'"),
        (lambda: IF4(block=0), "block is 0"),
        (lambda: Table(block=1.5), "block is 1.5"),
        (lambda: FittedTable(block=None), "block is None"),
        (lambda: from_json(Format, {"part": "FP3"}), "format.part is 'FP3'"),
        (lambda: from_json(Format, {"part": "Int", "bits": 4}), "unknown fields: bits"),
    ],
)
def test_bad_fields_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
