"""Every backend of the activation quantization against the reference, and after a norm float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import ON_HARDWARE, Subject, quickly, subjects
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from pallas_kernels import codec, quantize
from pallas_kernels.functions import Norm
from pallas_kernels.quantize import QUANTIZE, channels, reference

# Every shape compiles anew, so the examples are few and aren't shrunk.
few_examples = settings(max_examples=3, phases=[Phase.explicit, Phase.generate])

CONFIGS = [
    {"bits": 8, "range": "absmax", "step": "power", "rounding": "nearest"},
    {"bits": 8, "range": "minmax", "step": "power", "rounding": "nearest"},
    {"bits": 4, "range": "absmax", "step": "power", "rounding": "nearest"},
    {"bits": 4, "range": "absmax", "step": "power", "rounding": "truncate"},
    {"bits": 4, "range": "minmax", "step": "power", "rounding": "nearest"},
    {"bits": 4, "range": "minmax", "step": "power", "rounding": "truncate"},
    {"bits": 4, "range": "absmax", "step": "integer", "rounding": "nearest"},
    {"bits": 4, "range": "absmax", "step": "integer", "rounding": "nearest", "levels": "stretched"},
]
STRETCHED = CONFIGS[7]
LEVELS = (0, 1, 2, 3, 4, 5, 7, 9)  # of stretched codes
configs = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: "-".join(map(str, config.values()))
)
# Inputs of linears in families beside FLUX.1: FLUX.2, Z-Image, SD3, PixArt, DiT, Sana, SDXL.
FAMILIES = [320, 640, 1152, 2240, 3840, 4096, 10240, 16384]
GATED = [(0, 640, jnp.bfloat16), (704, 64, jnp.float32), (3, 700, jnp.bfloat16)]
FLUX = [(4608, 3072), (4608, 12288), (4608, 15360)] if ON_HARDWARE else []


def random_input(rng, m, k, dtype):
    """Return rows from zero and 2**-116 to 2**116, one-sided ones, and outliers within a row."""
    x = rng.standard_normal((m, k)) * np.exp(rng.uniform(-80, 80, (m, 1)))
    x *= np.exp(rng.standard_normal((m, k))) * rng.integers(0, 5, (m, 1))
    return np.where(rng.random((m, 1)) < 0.3, np.abs(x), x).astype(dtype)


@functools.cache
def compiled(function, config):
    """Jit a backend or the reference once for all tests, config as pairs."""
    plain = reference.quantize in (function, *getattr(function, "args", ()))
    return jax.jit(
        lambda x, arrays: function(x, **arrays, **dict(config)),
        compiler_options=None if plain else quickly(),
    )


def run(function, x, *, norm=None, multiplier=None, **config):
    """Call under jit; return NumPy arrays."""
    wide = config.pop("wide", None)
    call = compiled(function, tuple(sorted(config.items())))
    wide = None if wide is None else np.asarray(wide)
    arrays = call(x, {"norm": norm, "multiplier": multiplier, "wide": wide})
    return [None if a is None else np.asarray(a) for a in arrays]


def assert_same(subject: Subject, x, **config):
    found, wanted = run(subject, x, **config), run(reference.quantize, x, **config)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("subject", subjects(QUANTIZE, without="reference"))
class TestQuantize:
    """What every backend does."""

    @configs
    @few_examples
    @given(
        seed=st.integers(0, 2**31),
        m=st.integers(1, 150),
        k=st.integers(1, 400),
        group_size=st.sampled_from([8, 16, 32, 64]),
        dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    )
    def test_values_and_scales(self, subject, config, seed, m, k, group_size, dtype):
        x = random_input(np.random.default_rng(seed), m, k, dtype)
        assert_same(subject, x, group_size=group_size, **config)

    @pytest.mark.parametrize("group_size", [16, 32])
    @pytest.mark.parametrize("shape", [(1, 3072), (5, 1168), (33, 1), *FLUX], ids=str)
    def test_values_of_long_and_short_rows(self, subject, shape, group_size):
        x = random_input(np.random.default_rng(0), *shape, jnp.bfloat16)
        assert_same(subject, x, group_size=group_size, **CONFIGS[2])

    @pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[4], CONFIGS[6]], ids=str)
    @pytest.mark.parametrize(("m", "k", "group_size"), [(5, 700, 32), (3, 4200, 16)])
    def test_packed_codes_and_shifts(self, subject, config, m, k, group_size):
        x = random_input(np.random.default_rng(k), m, k, jnp.bfloat16)
        assert_same(subject, x, group_size=group_size, packed=True, **config)

    @configs
    @pytest.mark.parametrize(("dtype", "k"), [(jnp.bfloat16, 1024), (jnp.float32, 1000)])
    def test_parts_of_arrays_one_through_gelu(self, subject, config, dtype, k):
        rng = np.random.default_rng(k)
        plain, wide = (rng.standard_normal((7, n)).astype(dtype) * 4 for n in (192, k))

        found = run(functools.partial(of_parts, subject), (plain, wide), group_size=16, **config)
        both = zip([plain.astype(np.float64)] * 2, gelu_interval(wide[:, 64:]), strict=True)
        check_interval(found, *(np.concatenate(pair, axis=1) for pair in both), config)

    @pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[2], CONFIGS[4]], ids=str)
    @pytest.mark.parametrize(("dtype", "k"), [(jnp.bfloat16, 1024), (jnp.float32, 1000)])
    def test_a_norm_comes_before(self, subject, config, dtype, k):
        check_norm(subject, 12, k, dtype, config, packed=False)

    @pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[6]], ids=str)
    def test_packing_after_a_norm(self, subject, config):
        check_norm(subject, 7, 1000, jnp.bfloat16, config, packed=True)

    @pytest.mark.parametrize("rotation", [None, *channels.SIZES])
    @few_examples
    @given(
        seed=st.integers(0, 2**31),
        m=st.integers(1, 40),
        blocks=st.integers(1, 3),
        group_size=st.sampled_from([8, 16, 32, 64]),
        dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
        config=st.sampled_from(CONFIGS),
        multiplied=st.booleans(),
        form=st.sampled_from(["plain", "packed", "wide"]),
    )
    @example(1, 1, 3, 32, jnp.bfloat16, STRETCHED, True, "wide")
    def test_channels_that_are_scaled_and_rotated_and_wide_groups(
        self, subject, rotation, seed, m, blocks, group_size, dtype, config, multiplied, form
    ):
        rng = np.random.default_rng(seed)
        k = blocks * {None: 99, 16: 80}.get(rotation, rotation)
        x = random_input(rng, m, k, dtype)
        options = {"group_size": group_size, "rotation": rotation}
        if multiplied:
            options["multiplier"] = np.exp(rng.standard_normal(k)).astype(np.float32)
        if form == "packed" and config["bits"] == 4:
            options["packed"] = True
        if form == "wide":
            options["wide"] = tuple((rng.random(-(-k // group_size)) < 0.4).tolist())
        assert_same(subject, x, **options, **config)

    @pytest.mark.parametrize("rotation", channels.SIZES)
    @pytest.mark.parametrize("shape", [(3, 3072), *FLUX], ids=str)
    def test_long_rows_with_all_choices(self, subject, shape, rotation):
        rng = np.random.default_rng(rotation)
        x = random_input(rng, *shape, jnp.bfloat16)
        multiplier = np.exp(rng.standard_normal(shape[1])).astype(np.float32)
        wide = tuple((rng.random(shape[1] // 16) < 0.1).tolist())
        options = {"group_size": 16, "rotation": rotation, "multiplier": multiplier, "wide": wide}
        assert_same(subject, x, **options, **STRETCHED)

    @pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=str)
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("kind", ["layer", "rms"])
    @pytest.mark.parametrize("shifted", [False, True])
    def test_norms_of_every_kind(self, subject, kind, shifted, dtype, config):
        check_norm(subject, 9, 700, dtype, config, packed=False, kind=kind, shifted=shifted)

    @pytest.mark.parametrize("images", [2, 3])
    @pytest.mark.parametrize("form", ["both", "one shift", "scale alone"])
    @pytest.mark.parametrize("k", [640, 2240])
    def test_images_together_are_as_each_by_itself(self, subject, images, form, k):
        rng = np.random.default_rng(k)
        x = rng.standard_normal((images * 10, k)).astype(jnp.bfloat16)
        scale = rng.standard_normal((images, k)).astype(np.float32)
        shift = rng.standard_normal((images, k)).astype(jnp.bfloat16)
        shift = {"both": shift, "one shift": shift[0], "scale alone": None}[form]
        kind = "rms" if form == "scale alone" else "layer"
        norm = Norm(scale=scale, shift=shift, kind=kind)
        options = {"group_size": 16, **CONFIGS[2]}
        together = run(subject, x, norm=norm, **options)
        for i in range(images):
            at = slice(10 * i, 10 * i + 10)
            alone = jax.tree.map(lambda v: v[i] if v.ndim > 1 else v, norm)  # noqa: B023
            values, found, _ = run(subject, x[at], norm=alone, **options)
            np.testing.assert_array_equal(together[0][at], values)
            np.testing.assert_array_equal(together[1][at], found)

    @pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]], ids=str)
    @pytest.mark.parametrize("activation", [None, "gelu", "silu"])
    @pytest.mark.parametrize(("start", "times", "dtype"), GATED)
    def test_parts_that_multiply_each_other(self, subject, start, times, dtype, activation, config):
        rng = np.random.default_rng(3)
        x = (4 * rng.standard_normal((5, 1344))).astype(dtype)
        place = {"start": start, "times": times, "size": 640, "activation": activation}
        bounds = np.asarray(x, np.float64)[:, start : start + 640], x[:, times : times + 640]
        low, high = product_interval(*bounds, activation, dtype)

        def gated(x, **options):
            return subject((quantize.Part(array=x, **place),), **options)

        check_interval(run(gated, x, group_size=16, **config), low, high, config)

    @pytest.mark.parametrize("k", FAMILIES)
    def test_inputs_as_long_as_those_of_families(self, subject, k):
        x = random_input(np.random.default_rng(k), 3, k, jnp.bfloat16)
        assert_same(subject, x, group_size=16, **CONFIGS[0])
        assert_same(subject, x, group_size=32, **STRETCHED)

    @pytest.mark.parametrize("packed", [False, True])
    def test_stretched_levels_are_those_of_every_magnitude_and_peak(self, subject, packed):
        """The input's stage 1 is its own integers; wide groups keep them."""
        groups = [
            [peak, *range(start, min(start + 15, peak + 1))]
            for peak in range(128)
            for start in range(0, peak + 1, 15)
        ]
        x = np.array([group + [0] * (16 - len(group)) for group in groups])
        x = (x * np.where(np.arange(16) % 3, 1, -1)).reshape(1, -1)
        x = np.concatenate([x, -x]).astype(np.float32)
        wide = None if packed else tuple(i % 7 == 0 for i in range(x.shape[1] // 16))
        found = run(subject, x, group_size=16, packed=packed, wide=wide, **STRETCHED)
        np.testing.assert_array_equal(found[-2], np.float32(127) * np.float32(1 / 127))
        values = found[0]
        if packed:
            options = {"group_size": 16, "step": "integer", "levels": "stretched"}
            values = codec.decode_packed(*found[:2], **options)
        wanted = [
            group if wide and wide[i % len(wide)] else stretched(group)
            for i, group in enumerate(x.astype(int).reshape(-1, 16).tolist())
        ]
        np.testing.assert_array_equal(values.reshape(-1, 16), wanted)

    @pytest.mark.parametrize("rotation", [None, 16, 64])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    def test_a_norm_comes_before_the_multiplier_and_the_rotation(self, subject, dtype, rotation):
        rng = np.random.default_rng(5)
        x = (rng.standard_normal((9, 320)) * 3 + 1).astype(dtype)
        vectors = rng.standard_normal((3, 320)).astype(np.float32)
        norm = Norm(shift=vectors[0].astype(dtype), scale=vectors[1], epsilon=1e-2)
        options = {"norm": norm, "multiplier": np.exp(vectors[2]), "rotation": rotation}
        assert_near(subject, x, group_size=16, **options, **CONFIGS[0])

    @pytest.mark.parametrize("rotation", [16, 64, 256])
    def test_parts_are_joined_before_the_rotation(self, subject, rotation):
        rng = np.random.default_rng(6)
        arrays = tuple(rng.standard_normal((7, n)).astype(jnp.bfloat16) * 4 for n in (192, 896))
        joined = functools.partial(of_parts, reference.quantize)
        options = {"group_size": 16, "rotation": rotation, **CONFIGS[0]}
        assert_near(functools.partial(of_parts, subject), arrays, joined, **options)

    @pytest.mark.parametrize("rotation", channels.SIZES)
    @pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4], STRETCHED], ids=str)
    @pytest.mark.parametrize(("k", "blocks"), [(1536, 1), (1536, 4), (2304, 8)])
    def test_channels_before_the_first_that_is_rotated_stay(
        self, subject, k, blocks, config, rotation
    ):
        x = random_input(np.random.default_rng(k + blocks), 5, k, jnp.bfloat16)
        first = blocks * rotation
        options = {"group_size": 16, "rotation": rotation, "rotated_from": first}
        assert_same(subject, x, **options, **config)

    @pytest.mark.parametrize("first", [16, 48, 192, 208])
    @pytest.mark.parametrize("multiplied", [False, True])
    def test_part_of_parts_is_rotated(self, subject, first, multiplied):
        rng = np.random.default_rng(first)
        arrays = tuple(rng.standard_normal((7, n)).astype(jnp.bfloat16) * 4 for n in (192, 896))
        joined = functools.partial(of_parts, reference.quantize)
        options = {"group_size": 16, "rotation": 16, "rotated_from": first, **CONFIGS[0]}
        if multiplied:
            options["multiplier"] = np.exp(rng.standard_normal(1024)).astype(np.float32)
        assert_near(functools.partial(of_parts, subject), arrays, joined, **options)

    @pytest.mark.parametrize(("norm", "rotation"), [(False, None), (True, None), (False, 64)])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("range_", ["absmax", "minmax"])
    def test_a_row_that_is_not_finite_has_scale_nan(self, subject, range_, value, norm, rotation):
        x = np.ones((5, 1152), jnp.bfloat16)
        x[3, 700] = value
        ones = np.ones(1152, np.float32)
        norm = Norm(shift=ones, scale=ones, epsilon=1e-6) if norm else None
        config = {"bits": 4, "group_size": 16, "step": "power", "rounding": "nearest"}
        _, scale, _ = run(subject, x, norm=norm, rotation=rotation, range=range_, **config)
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(scale)), [3])


def of_parts(function, arrays, **options):
    """Quantize two arrays side by side, of the second all but 64 columns, through GELU."""
    plain, wide = arrays
    place = {"array": wide, "start": 64, "size": wide.shape[1] - 64, "activation": "gelu"}
    parts = quantize.Part(array=plain, start=0, size=plain.shape[1]), quantize.Part(**place)
    return function(parts, **options)


def assert_near(function, x, wanted=reference.quantize, **options):
    """Hold 8-bit values to the reference's up to float32 sums of other orders before them."""
    (found, scale, _), (expected, wanted_scale, _) = (
        run(f, x, **options) for f in (function, wanted)
    )
    # A unit in the last place of bfloat16 moves an element by up to half a step here.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.mean(found == expected) >= 0.97
    np.testing.assert_allclose(scale, wanted_scale, rtol=2.0**-8)


def stretched(group):
    """Return what stretched levels leave of a group of integers, in Python's integers."""
    peak = max(map(abs, group))
    p = min(max((4 * peak + 18) // 37, 1), 14)
    decoded = []
    for value in group:
        m = abs(value)
        code = min((2 * m + p) // (2 * p), 5) if m < 6 * p else 6 if m < 8 * p else 7
        decoded.append((1 if value >= 0 else -1) * LEVELS[code] * p)
    return decoded


def check_norm(subject, m, k, dtype, config, *, packed, kind="layer", shifted=True):
    """Hold the result of a norm against all that float32 sums in any order may make of it.

    Orders of summation differ between backends by a few units in the last place of float32, so
    every normed element has an interval; rounding is monotone, so this gives an interval for each
    8-bit value too. Nearly all hold a single integer, and groups of those determine their codes.
    """
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((m, k)) * 3 + rng.standard_normal((m, 1))).astype(dtype)
    shift, scale = rng.standard_normal((2, k)).astype(dtype) / 4
    shift = shift if shifted else None
    scale = 1 + scale.astype(np.float32)
    norm = Norm(shift=shift, scale=scale, epsilon=k * 1e-4, kind=kind)
    found = run(subject, x, norm=norm, group_size=16, packed=packed, **config)
    check_interval(found, *normed_interval(x, norm), config, packed=packed)


def check_interval(found, low, high, config, *, packed=False):
    """Hold a result in groups of 16 against all that inputs between low and high may make of it."""
    *values, found_scale, found_lo = found
    m, k = low.shape
    q_low, q_high, scales, los = quantized_interval(low, high, config["range"])
    group_size = 16
    assert (found_scale >= scales[0]).all() and (found_scale <= scales[1]).all()
    if los is None:
        assert found_lo is None
    else:
        assert (found_lo >= los[0]).all() and (found_lo <= los[1]).all()
    if config["bits"] == 8:
        found = values[0].astype(int) + 128 * (config["range"] == "minmax")
        assert (found >= q_low).all() and (found <= q_high).all()
        assert np.mean(q_low == q_high) >= 0.97
        return
    certain = np.pad(q_low == q_high, [(0, 0), (0, -k % group_size)], constant_values=True)
    certain = np.repeat(certain.reshape(m, -1, group_size).all(axis=2), group_size, axis=1)[:, :k]
    assert certain.mean() >= 0.8
    exact = q_low.astype(np.int8 if config["range"] == "absmax" else np.uint8)
    kind = {"step": config["step"], "levels": config.get("levels", "uniform")}
    options = {"group_size": group_size, **kind}
    codes, shifts = codec.encode(exact, rounding=config["rounding"], **options)
    wanted = codec.to_operand(codec.decode(codes, shifts, **kind))[:, :k]
    if packed:
        signed = config["range"] == "absmax"
        values = [codec.decode_packed(*values, signed=signed, **options)[:, :k]]
    np.testing.assert_array_equal(np.where(certain, values[0], 0), np.where(certain, wanted, 0))


def gelu_interval(x):
    """Return bounds of GELU(x), its tanh form, in the dtype of x, as float64."""
    return product_interval(np.asarray(x, np.float64), np.float64(1), "gelu", x.dtype)


def product_interval(x, factor, activation, dtype):
    """Return bounds of activation(x) * factor in a dtype, x and they float64."""
    exponent = {
        "gelu": np.sqrt(8 / np.pi) * (x + 0.044715 * x**3),
        "silu": x,
        None: np.full_like(x, np.inf),
    }[activation]
    y = x / (1 + np.exp(-exponent)) * np.asarray(factor, np.float64)
    # The exponential has the rounding of its argument; it vanishes where float32 has nothing left.
    error = 1e-6 + 2.5e-7 * np.where(np.isfinite(exponent), np.abs(exponent), 0)
    error = error * np.abs(y) + 1e-36
    return tuple((y + sign * error).astype(dtype).astype(np.float64) for sign in (-1, 1))


def normed_interval(x, norm):
    """Return bounds of norm(x) * scale + shift in the dtype of x, as float64."""
    given = (x, 0 if norm.shift is None else norm.shift, norm.scale)
    wide, shift, scale = (np.asarray(a, np.float64) for a in given)
    wide = wide - wide.mean(axis=1, keepdims=True) if norm.kind == "layer" else wide
    wide /= np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + norm.epsilon)
    y = wide * scale + shift
    # The mean is off in units of the standard deviation, the rest in those of the element.
    error = 2e-6 * ((np.abs(wide) + 1) * np.abs(scale) + np.abs(shift))
    return tuple((y + sign * error).astype(x.dtype).astype(np.float64) for sign in (-1, 1))


def quantized_interval(low, high, range_):
    """Return bounds of the 8-bit values, of the scale, and of lo (None for absmax)."""

    def largest(a):
        return a.max(axis=1, keepdims=True)

    def scales(extents, levels):
        return [np.float32(extent * sign) * np.float32(1 / levels) for extent, sign in extents]

    slack = 1e-4  # of the float32 product, at 127 or 255
    if range_ == "absmax":
        smallest = np.where((low <= 0) & (high >= 0), 0, np.minimum(np.abs(low), np.abs(high)))
        a_low, a_high = largest(smallest), largest(np.maximum(np.abs(low), np.abs(high)))
        q_low = low * 127 / np.where(low > 0, a_high, a_low)
        q_high = high * 127 / np.where(high > 0, a_low, a_high)
        bounds, los, limits = (a_low, a_high), None, (-127, 127)
    else:
        los = -largest(-low), -largest(-high)
        d_low, d_high = largest(low) - los[1], largest(high) - los[0]
        q_low, q_high = (low - los[1]) * 255 / d_high, (high - los[0]) * 255 / d_low
        bounds, limits = (d_low, d_high), (0, 255)
    q_low, q_high = (
        np.clip(np.rint(q_low - slack), *limits),
        np.clip(np.rint(q_high + slack), *limits),
    )
    signs = (1 - 3e-7, 1 + 3e-7)  # float32 differences and products
    scale = scales(zip(bounds, signs, strict=True), limits[1])
    return np.clip(q_low, *limits), np.clip(q_high, *limits), scale, los


def norm_of(shift, scale):
    """Return a norm of vectors of these lengths."""
    return Norm(shift=np.ones(shift, np.float32), scale=np.ones(scale, np.float32), epsilon=1e-6)


PART = quantize.Part(array=np.ones((3, 8), np.float32), start=0, size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 6}, "bits is 6; it must be 4 or 8"),
        ({"bits": 8, "packed": True}, "packed is True with bits=8"),
        ({"norm": (np.ones(37), np.ones(37))}, "norm is a tuple; it must be a Norm or None"),
        ({"norm": norm_of(3, 37)}, r"norm.shift has shape \[3\]; it must be \[37\]"),
        ({"norm": norm_of(37, (2, 37))}, "norm.scale is of 2 images; 3 rows aren't as many for"),
        ({"norm": dataclasses.replace(norm_of(37, 37), kind="batch")}, "norm.kind is 'batch'"),
        ({"norm": norm_of(37, 3)}, r"norm.scale has shape \[3\]; it must be \[37\]"),
        ({"multiplier": np.ones(3)}, r"multiplier has shape \[3\]; it must be \[37\]"),
        ({"multiplier": np.ones(37, int)}, "multiplier has dtype int64; it must be floating"),
        ({"rotation": 32}, "rotation is 32; it must be None, 16, 64 or 256"),
        ({"rotation": 16}, "k is 37 with rotation=16; it must be a multiple of that"),
        ({"rotated_from": 16}, "rotated_from is 16 without a rotation"),
        ({"rotated_from": 37}, "rotated_from is 37; it must be one of the 37 channels"),
        ({"rotated_from": -1}, "rotated_from is -1; it must be one of the 37 channels"),
        (
            {"wide": [True, False]},
            r"wide is bool\[2\]; it must be None or one boolean for each of 3",
        ),
        ({"wide": [1, 0, 1]}, r"wide is int64\[3\]; it must be None or one boolean"),
        ({"wide": [True, False, True], "packed": True}, "wide is given with packed=True"),
        ({"levels": "stretched"}, "step is 'power' with levels='stretched'"),
        ({"levels": "wide"}, "levels is 'wide'; it must be 'uniform' or 'stretched'"),
        ({"range": "minmax", "step": "integer"}, "range is 'minmax' with step='integer'"),
        ({"rounding": "truncate", "step": "integer"}, "rounding is 'truncate' with step="),
        ({"range": "absmx"}, "range is 'absmx'; it must be 'absmax' or 'minmax'"),
        ({"rounding": "up"}, "rounding is 'up'; it must be 'nearest' or 'truncate'"),
        ({"step": "foo"}, "step is 'foo'"),
        ({"group_size": 12}, "group_size is 12; it must be 8, 16, 32 or 64"),
        ({"group_size": 0}, "group_size is 0"),
        ({"implementation": 3}, "implementation is 3"),
        ({"x": np.ones((3, 0), np.float32)}, "k is 0"),
        ({"x": np.ones(37, np.float32)}, r"x has shape \[37\]; it must be \[m, k\]"),
        ({"x": np.ones((3, 37), np.int32)}, "x has dtype int32; it must be floating"),
        ({"x": [PART]}, "x is a list; it must be an array, or a tuple of Part"),
        ({"x": ()}, r"x is a tuple of \(\); it must be an array, or a tuple of Part"),
        ({"x": (PART, 3)}, r"x is a tuple of \(Part, int\)"),
        ({"x": (quantize.Part(array=np.ones(8), start=0, size=8),)}, r"part of x has shape \[8\]"),
        ({"x": (dataclasses.replace(PART, activation="relu"),)}, "activation of a part is 'relu'"),
        ({"x": (dataclasses.replace(PART, times=1),)}, "part of columns 1 to 9 of an array of 8"),
        ({"x": (dataclasses.replace(PART, times=-8),)}, "part of columns -8 to 0 of an array of 8"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    call = {"x": np.ones((3, 37), np.float32), **change}
    with pytest.raises(ValueError, match=message):
        quantize.quantize(**call)
