"""Assembly for several elements at once, run instruction by instruction, against the codec."""

import jax.numpy as jnp
import numpy as np
import ptx
import pytest

from pallas_kernels import codec
from pallas_kernels.matmul import triton as matmul_triton
from pallas_kernels.quantize import triton as quantize_triton

ROUNDED = np.float32(2**23)
# Every magnitude under every peak of its group, with both signs, four at once.
PEAKS, MAGNITUDES = (
    np.concatenate([np.resize(part, -(-len(part) // 4) * 4) for part in parts])
    for parts in zip(
        *((np.full(2 * p + 2, p), np.tile(np.arange(p + 1), 2)) for p in range(128)), strict=True
    )
)
SIGNS = np.where(np.arange(len(PEAKS)) % 3 == 1, -1, 1)


def fours(values):
    """Return four arrays: the first of every four elements, the second and so on."""
    return list(np.ascontiguousarray(values.reshape(-1, 4).T))


def decoded_bytes(code, *shared):
    """Run a stage 2, of the group's arrays those that all four share."""
    rounded = fours(MAGNITUDES.astype(np.float32) + ROUNDED)
    x = fours((SIGNS * np.maximum(MAGNITUDES, 0.25)).astype(np.float32))
    every = [values for array in shared for values in fours(array)]
    (word,) = ptx.run(code, 1, *rounded, *x, *every)
    return word.view(np.int8)


def wanted(**kind):
    """Return what the codec decodes of each element in a group of eight with its peak."""
    groups = np.zeros((len(PEAKS), 8), np.int8)
    groups[:, 0], groups[:, 1] = PEAKS, SIGNS * MAGNITUDES
    codes, shifts = codec.encode(groups, group_size=8, **kind)
    kind.pop("rounding", None)
    return np.asarray(codec.decode(codes, shifts, **kind))[:, 1], np.asarray(shifts)[:, 0]


def test_four_bytes_of_powers_are_the_codecs():
    values, shifts = wanted(step="power", rounding="nearest")
    step = (1 << shifts.astype(np.uint32)) * np.uint32(0x01010101)
    found = decoded_bytes(quantize_triton.bytes_of_powers(), step)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("error", [-(2.0**-22), 2.0**-22])
def test_four_bytes_of_stretched_levels_are_the_codecs(error):
    """At either end of what the approximate reciprocal may be off."""
    values, shifts = wanted(step="integer", levels="stretched", rounding="nearest")
    step = shifts.astype(np.uint32) + 1
    reciprocal = ((1 + 2.0**-9) / step * (1 + error)).astype(np.float32)
    tables = (step * np.uint32(table) for table in (0x03020100, 0x09070504))
    found = decoded_bytes(quantize_triton.bytes_of_stretched(), reciprocal, *tables)
    np.testing.assert_array_equal(found, values)


def test_four_products_are_rounded_half_to_even():
    x = np.arange(-127, 129, 0.25, np.float32)[:-4]
    factors = np.full_like(x, 0.5)
    (word,) = ptx.run(quantize_triton.bytes_of_products(), 1, *fours(x), *fours(factors))
    np.testing.assert_array_equal(word.view(np.int8), np.rint(x * factors))


def codes_and_steps(levels):
    """Return all bytes of two codes, four side by side, under each step that levels have."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (14, 256), np.uint8)
    codes[(codes & 15) == 8] += 1
    codes[(codes >> 4) == 8] += 16
    steps = np.repeat(np.arange(1, 15)[:, None], 64, axis=1)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).astype(np.int32)
    level = np.asarray(codec.level_of(jnp.asarray((nibbles ^ 8) - 8), levels))
    return codes.view(np.uint32), steps, level.reshape(14, 64, 8) * steps[..., None]


@pytest.mark.parametrize("levels", ["uniform", "stretched"])
def test_eight_codes_are_decoded_to_bytes(levels):
    words, steps, values = codes_and_steps(levels)
    found = ptx.run(matmul_triton.decoding(levels, (0, 1)), 2, words, steps.astype(np.uint32))
    found = np.stack(found, axis=-1).view(np.int8)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("levels", ["uniform", "stretched"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_eight_codes_are_decoded_and_scaled_to_16_bits(levels, dtype):
    words, steps, values = codes_and_steps(levels)
    scale = np.random.default_rng(1).random(words.shape).astype(np.float32)
    given = [steps.astype(np.float32)] * 4 + [scale] * 4
    found = ptx.run(matmul_triton.dequantizing(levels, dtype), 4, words, *given)
    found = np.stack(found, axis=-1).view(dtype)
    right = (values.astype(np.float32) * scale[..., None]).astype(dtype)
    np.testing.assert_array_equal(found, right)
