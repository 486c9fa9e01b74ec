"""Facts that hold for every output of stage 2, on random 8-bit values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec_oracle
import strategies
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import codec

GROUPS = st.sampled_from((8, 16, 32, 64))
FORMAT = ("group_size", "step", "levels", "rounding", "search")
encode = jax.jit(codec.encode, static_argnames=FORMAT)
decode = jax.jit(codec.decode, static_argnames=("step", "levels"))

# Steps and roundings, with the dtype that says whether the values are symmetric.
POWER = {
    "nearest": (np.int8, "nearest"),
    "truncate": (np.int8, "truncate"),
    "asymmetric nearest": (np.uint8, "nearest"),
    "asymmetric truncate": (np.uint8, "truncate"),
}
every_power = pytest.mark.parametrize(("dtype", "rounding"), POWER.values(), ids=POWER)
every_dtype = pytest.mark.parametrize("dtype", [np.int8, np.uint8])


def values(dtype):
    return (strategies.int8s if dtype == np.int8 else strategies.uint8s)(2, 64)


def round_trip(q, **options):
    """Return decoded values, magnitudes before and after and each element's shift, as int32."""
    codes, shifts = encode(q, **options)
    kind = {name: options[name] for name in ("step", "levels") if name in options}
    decoded = np.asarray(decode(codes, shifts, **kind), np.int32)
    shift = np.repeat(np.asarray(shifts, np.int32), options["group_size"], axis=-1)
    return decoded, np.abs(np.int32(q)), np.abs(decoded), shift


@every_power
@given(data=st.data(), group_size=GROUPS)
def test_groups_of_small_magnitudes_are_exact(dtype, rounding, data, group_size):
    small = 8 if dtype == np.int8 else 16
    q = np.fmod(data.draw(values(dtype)), small).astype(dtype)
    decoded, *_ = round_trip(q, group_size=group_size, rounding=rounding)
    np.testing.assert_array_equal(decoded, q)


@every_dtype
@given(data=st.data(), group_size=GROUPS)
def test_truncation_loses_less_than_a_step_and_never_grows(dtype, data, group_size):
    q = data.draw(values(dtype))
    _, before, after, shift = round_trip(q, group_size=group_size, rounding="truncate")
    assert ((before - after >= 0) & (before - after <= 2**shift - 1)).all()


@every_dtype
@given(data=st.data(), group_size=GROUPS)
def test_nearest_is_within_half_a_step_unless_saturated(dtype, data, group_size):
    q = data.draw(values(dtype))
    _, before, after, shift = round_trip(q, group_size=group_size, rounding="nearest")
    top = (7 if dtype == np.int8 else 15) << shift
    assert (np.abs(before - after) <= 2**shift / 2)[after < top].all()
    # A saturated magnitude is at most one step above the largest that can be kept.
    assert (before - after < 2**shift)[after == top].all()


@every_power
@given(data=st.data(), group_size=GROUPS)
def test_encoding_decoded_values_gives_the_same_codes(dtype, rounding, data, group_size):
    options = {"group_size": group_size, "rounding": rounding}
    codes, shifts = encode(data.draw(values(dtype)), **options)
    again = encode(decode(codes, shifts), **options)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], shifts)


@every_power
@given(data=st.data(), group_size=GROUPS)
def test_codes_fit_four_bits_and_shifts_zero_to_four(dtype, rounding, data, group_size):
    codes, shifts = encode(data.draw(values(dtype)), group_size=group_size, rounding=rounding)
    low, high = (-7, 7) if dtype == np.int8 else (0, 15)
    assert (np.asarray(codes) >= low).all() and (np.asarray(codes) <= high).all()
    assert (np.asarray(shifts) <= 4).all()


@every_power
@given(data=st.data(), group_size=GROUPS)
def test_decoded_values_are_exact_in_bfloat16_and_float8(dtype, rounding, data, group_size):
    decoded, *_ = round_trip(data.draw(values(dtype)), group_size=group_size, rounding=rounding)
    for narrow in (jnp.bfloat16, jnp.float8_e4m3fn):
        np.testing.assert_array_equal(decoded.astype(narrow).astype(np.int32), decoded)


@every_power
@given(data=st.data(), group_size=GROUPS)
def test_operands_are_exact_in_int8(dtype, rounding, data, group_size):
    codes, shifts = encode(data.draw(values(dtype)), group_size=group_size, rounding=rounding)
    decoded = decode(codes, shifts)
    offset = 0 if dtype == np.int8 else 128
    operand = codec.to_operand(decoded)
    assert operand.dtype == jnp.int8
    np.testing.assert_array_equal(np.asarray(operand, np.int32) + offset, np.int32(decoded))


@pytest.mark.parametrize("search", [False, True], ids=["online", "search"])
@given(data=st.data(), group_size=GROUPS)
def test_an_integer_step_is_within_half_a_step_unless_saturated(search, data, group_size):
    q = data.draw(values(np.int8))
    options = {"group_size": group_size, "step": "integer", "search": search}
    _, before, after, shift = round_trip(q, **options)
    assert (2 * np.abs(before - after) <= shift + 1)[after < 7 * (shift + 1)].all()


@pytest.mark.parametrize("search", [False, True], ids=["online", "search"])
@given(data=st.data(), group_size=GROUPS)
def test_integer_steps_decode_exactly_in_int8_and_bfloat16(search, data, group_size):
    options = {"group_size": group_size, "step": "integer", "search": search}
    decoded, *_, shift = round_trip(data.draw(values(np.int8)), **options)
    assert (np.abs(decoded) <= 112).all() and (shift <= 15).all()
    np.testing.assert_array_equal(decoded.astype(jnp.bfloat16).astype(np.int32), decoded)


@given(data=st.data(), group_size=GROUPS)
def test_no_step_has_less_error_than_the_searched_one(data, group_size):
    q = data.draw(values(np.int8))
    chosen = functools.partial(round_trip, q, group_size=group_size)

    def error(decoded):
        return np.sum((np.int32(q) - decoded).reshape(-1, group_size) ** 2, axis=1)

    searched = error(chosen(step="integer", search=True)[0])
    assert (searched <= error(chosen(step="integer")[0])).all()
    assert (searched <= error(chosen(step="power")[0])).all()


@every_dtype
@given(data=st.data(), n=st.sampled_from((1, 2, 7, 64)))
def test_unpack_undoes_pack(dtype, data, n):
    codes = data.draw(values(dtype))[:, :n] % 8
    unpacked = codec.unpack(codec.pack(codes), signed=dtype == np.int8)
    np.testing.assert_array_equal(unpacked[:, :n], codes)
    assert (unpacked[:, n:] == 0).all()


def test_the_low_nibble_holds_the_first_element_in_twos_complement():
    np.testing.assert_array_equal(codec.pack(jnp.array([1, -2, -7], jnp.int8)), [0xE1, 0x09])


@pytest.mark.parametrize(
    ("group", "rounding", "codes", "shift", "decoded"),
    [
        ([3, -2, 5, 0], "truncate", [3, -2, 5, 0], 0, [3, -2, 5, 0]),
        ([3, -2, 5, 0], "nearest", [3, -2, 5, 0], 0, [3, -2, 5, 0]),
        ([100, 3, -2, 10], "truncate", [6, 0, 0, 0], 4, [96, 0, 0, 0]),
        ([100, 3, -2, 10], "nearest", [6, 0, 0, 1], 4, [96, 0, 0, 16]),
        ([-127, 8, 7, -1], "truncate", [-7, 0, 0, 0], 4, [-112, 0, 0, 0]),
        ([-127, 8, 7, -1], "nearest", [-7, 1, 0, 0], 4, [-112, 16, 0, 0]),
    ],
)
def test_worked_examples(group, rounding, codes, shift, decoded):
    got, shifts = encode(jnp.array(group, jnp.int8), group_size=4, rounding=rounding)
    np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(shifts, [shift])
    np.testing.assert_array_equal(decode(got, shifts), decoded)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_the_shift_is_the_bits_above_those_kept(dtype):
    bits, top = (3, 127) if dtype == np.int8 else (4, 255)
    peaks = np.arange(top + 1)
    _, shifts = encode(peaks[:, None].astype(dtype), group_size=8)
    np.testing.assert_array_equal(
        shifts[:, 0], [max(int(peak).bit_length() - bits, 0) for peak in peaks]
    )


def test_an_online_integer_step_is_the_peak_over_seven_and_a_half_rounded():
    peaks = np.arange(128)
    _, shifts = encode(peaks[:, None].astype(np.int8), group_size=8, step="integer")
    steps = np.clip(np.floor(peaks / 7.5 + 0.5), 1, 16)
    np.testing.assert_array_equal(shifts[:, 0] + 1, steps)


STRETCHED = {"step": "integer", "levels": "stretched"}
SPECIFIED = spec_oracle.Config(**STRETCHED)
STEPS = np.arange(1, 15, dtype=np.int32)[:, None]  # of stretched levels
online_and_search = pytest.mark.parametrize("search", [False, True], ids=["online", "search"])


def test_every_stretched_code_and_step_decodes_as_specified():
    codes = np.tile(np.arange(-7, 8, dtype=np.int8), (14, 1))
    decoded = decode(codes, (STEPS - 1).astype(np.uint8), **STRETCHED)
    wanted = [
        spec_oracle.decode_group(list(map(int, row)), f, SPECIFIED) for f, row in enumerate(codes)
    ]
    np.testing.assert_array_equal(decoded, wanted)
    assert np.abs(np.int32(decoded)).max() == 126


def test_every_magnitude_goes_to_the_nearest_stretched_level_halves_away_from_zero():
    m = np.tile(np.arange(128, dtype=np.int32), (14, 1))
    codes = codec.code_of(m, STEPS - 1, **STRETCHED)
    distance = np.abs(m[..., None] - np.array(spec_oracle.STRETCHED) * STEPS[:, :, None])
    # The last of equals is the one further from zero.
    np.testing.assert_array_equal(codes, 7 - np.argmin(distance[..., ::-1], axis=-1))
    np.testing.assert_array_equal(-codes, codec.code_of(-m, STEPS - 1, **STRETCHED))


def test_encoding_a_decoded_stretched_code_with_its_step_gives_it_back():
    codes = np.tile(np.arange(-7, 8, dtype=np.int8), (14, 1))
    decoded = decode(codes, (STEPS - 1).astype(np.uint8), **STRETCHED).astype(jnp.int32)
    np.testing.assert_array_equal(codec.code_of(decoded, STEPS - 1, **STRETCHED), codes)


def test_an_online_stretched_step_is_the_peak_over_nine_and_a_quarter_rounded():
    peaks = np.arange(128)
    _, shifts = encode(peaks[:, None].astype(np.int8), group_size=8, **STRETCHED)
    steps = np.clip(np.floor(peaks / 9.25 + 0.5), 1, 14)
    np.testing.assert_array_equal(shifts[:, 0] + 1, steps)


@online_and_search
@given(data=st.data(), group_size=GROUPS)
def test_stretched_groups_equal_the_oracle(search, data, group_size):
    q = data.draw(values(np.int8))
    codes, shifts = encode(q, group_size=group_size, search=search, **STRETCHED)
    groups = np.int32(q).reshape(-1, group_size).tolist()
    wanted = [spec_oracle.encode_group(group, SPECIFIED, search=search) for group in groups]
    np.testing.assert_array_equal(codes.reshape(-1, group_size), [codes for codes, _ in wanted])
    np.testing.assert_array_equal(shifts.reshape(-1), [shift for _, shift in wanted])
    decoded = [spec_oracle.decode_group(*group, SPECIFIED) for group in wanted]
    got = decode(codes, shifts, **STRETCHED)
    np.testing.assert_array_equal(got.reshape(-1, group_size), decoded)


@online_and_search
@given(data=st.data(), group_size=GROUPS)
def test_stretched_levels_are_within_a_step_unless_saturated(search, data, group_size):
    options = {"group_size": group_size, "search": search, **STRETCHED}
    decoded, before, after, shift = round_trip(data.draw(values(np.int8)), **options)
    p = shift + 1
    assert (np.abs(before - after) <= p)[before < 9 * p].all()
    assert (2 * np.abs(before - after) <= p)[2 * before < 11 * p].all()
    assert (shift <= 13).all()
    np.testing.assert_array_equal(decoded.astype(jnp.bfloat16).astype(np.int32), decoded)


@given(data=st.data(), group_size=GROUPS)
def test_stretched_values_keep_the_sign_and_order_of_their_codes(data, group_size):
    codes, shifts = encode(data.draw(values(np.int8)), group_size=group_size, **STRETCHED)
    decoded = np.int32(decode(codes, shifts, **STRETCHED)).reshape(-1, group_size)
    codes = np.int32(codes).reshape(-1, group_size)
    order = np.sign(codes[:, :, None] - codes[:, None, :])
    np.testing.assert_array_equal(order, np.sign(decoded[:, :, None] - decoded[:, None, :]))


@given(data=st.data(), group_size=GROUPS)
def test_columns_rounded_one_by_one_with_a_given_step_are_the_group(data, group_size):
    q = np.int32(data.draw(values(np.int8))).reshape(-1, group_size)
    codes, shifts = encode(q.astype(np.int8), group_size=group_size, search=True, **STRETCHED)
    columns = [codec.code_of(q[:, i : i + 1], np.int32(shifts), **STRETCHED) for i in (0, 3, 7)]
    np.testing.assert_array_equal(np.concatenate(columns, axis=1), codes[:, [0, 3, 7]])
