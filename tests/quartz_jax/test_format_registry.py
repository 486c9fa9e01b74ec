"""What every registered format promises, over all of them and their variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.operands import Int8Rows
from quartz_jax.formats import (
    IF4,
    NVFP4,
    SDR,
    BlockRows,
    FittedTable,
    Format,
    Int,
    PackedRows,
    Quartz,
    RaZeR,
    Table,
)
from quartz_jax.formats.base import cut
from quartz_jax.formats.storage import dequantize, exact_16, row_operand
from quartz_jax.schema import from_json, parts, to_json

VARIANTS = [
    Int(width=8),
    Int(width=8, range="minmax"),
    Int(width=3, block=16),
    Int(block=64, scale="float16"),
    Int(block=16, range="minmax"),
    Int(block=64, scale="float16", range="unsigned"),
    NVFP4(block_max="4or6"),
    SDR(base=16),
    Quartz(rounding="truncate"),
    Quartz(range="minmax", scale_block=32),
    Quartz(step="integer", group_size=8),
    Quartz(step="integer", levels="stretched"),
    Quartz(step="integer", levels="stretched", search=True, scale_block=64),
]
FORMATS = [cls() for cls in parts(Format).values()] + VARIANTS
every_format = pytest.mark.parametrize("format_", FORMATS, ids=str)
DATA = [(3, 192), (2, 37)]  # whole blocks, and a short last one


@functools.cache
def rows(shape=(3, 192)):
    """Heavy-tailed rows of scales from 2**-10 to 2**10, a few elements zero."""
    rng = np.random.default_rng(7)
    x = rng.standard_t(3, shape) * 2.0 ** rng.integers(-10, 10, (*shape[:-1], 1))
    return np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)


@functools.cache
def stored_rows(format_, shape=(3, 192)):
    return format_.store(rows(shape))


@functools.partial(jax.jit, static_argnums=1)
def by_columns(x, format_):
    """Return codes, values and values at once of whole blocks, and of three columns of them."""
    blocks, outer, inner = cut(x, format_)
    kept = format_.keep(outer, inner)
    assert all(leaf.shape[-1] == 1 for leaf in jax.tree.leaves((outer, inner, kept)))
    some = (0, blocks.shape[-1] // 2, blocks.shape[-1] - 1)

    def rounded(values):
        codes = format_.encode(values, outer, inner)
        return codes, format_.decode(codes, kept), format_.round(values, outer, inner)

    apart = [rounded(blocks[..., i : i + 1]) for i in some]
    together = jax.tree.map(lambda leaf: leaf[..., np.array(some)], rounded(blocks))
    return together, jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *apart)


@functools.partial(jax.jit, static_argnums=1)
def scales_of_the_first_block(x, format_):
    """Return what is found of the first block of each row alone, and among the others."""
    blocks, outer, inner = cut(x, format_)
    first = jax.tree.map(lambda leaf: leaf[..., :1, :], inner)
    return format_.inner(blocks[..., :1, :], outer), first


def test_every_registered_format_is_here():
    assert {type(format_) for format_ in FORMATS} == set(parts(Format).values())
    assert {"IF4", "RaZeR", "HiF4", "FittedTable", "Table"} <= set(parts(Format))


@pytest.mark.parametrize("shape", DATA)
@every_format
def test_what_is_read_back_is_what_the_call_gives(format_, shape):
    stored = stored_rows(format_, shape)
    assert stored.shape == shape
    np.testing.assert_array_equal(dequantize(stored), format_(rows(shape)))


@pytest.mark.parametrize("shape", [(40,), (0, 20), (2, 3, 1)])
@every_format
def test_any_shape_keeps_its_shape(format_, shape):
    def all_of_it(x):
        stored = format_.store(x)
        assert stored.shape == shape
        return dequantize(stored), format_(x)

    for y in jax.eval_shape(all_of_it, jax.ShapeDtypeStruct(shape, jnp.float32)):
        assert y.shape == shape and y.dtype == jnp.float32


@every_format
def test_values_are_near_what_was_stored(format_):
    x = np.abs(rows()) if "unsigned" in str(format_) else rows()
    error = np.linalg.norm(format_(x) - x, axis=1) / np.linalg.norm(x, axis=1)
    assert (error < 0.35).all()  # of three bits, and of four that share a row's scale


# What is stored beyond what the format needs: bytes where it counts bits, or scales a row that
# are a tensor's. In bits an element of rows of 1024, at least 16 rows.
LOOSE = {
    "int3 g16": 1,
    "sdr8 g16": 1 / 16,
    **{str(f): 32 / 1024 for f in (NVFP4(), NVFP4(block_max="4or6"), IF4(), RaZeR())},
    str(FittedTable()): 32 / 1024,
}


@every_format
def test_stored_bytes_are_the_bits_that_the_format_counts(format_):
    stored = jax.eval_shape(format_.store, jax.ShapeDtypeStruct((16, 1024), jnp.float32))
    extra = LOOSE.get(str(format_), 0)
    assert stored.bits_per_element == pytest.approx(format_.bits(1024) + extra, rel=1e-12)


@every_format
def test_the_tree_is_known_without_data(format_):
    abstract = jax.eval_shape(format_.store, jax.ShapeDtypeStruct((2, 37), jnp.float32))
    stored = stored_rows(format_, (2, 37))
    assert jax.tree.structure(abstract) == jax.tree.structure(stored)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), stored
    )


@every_format
def test_json_both_ways_is_the_identity(format_):
    again = from_json(Format, to_json(format_))
    assert again == format_ and hash(again) == hash(format_)


@every_format
def test_columns_rounded_one_by_one_under_fixed_scales_are_the_block(format_):
    together, apart = by_columns(rows(), format_)
    jax.tree.map(np.testing.assert_array_equal, together, apart)


@every_format
def test_a_block_alone_has_the_scales_that_it_has_among_others(format_):
    if not format_.blocks_apart:
        pytest.skip("scales of this format are of several blocks")
    alone, among = scales_of_the_first_block(rows(), format_)
    jax.tree.map(np.testing.assert_array_equal, alone, among)


@every_format
def test_codes_read_back_are_those_assembled(format_):
    stored = stored_rows(format_, (2, 37))
    if not isinstance(stored, BlockRows):
        pytest.skip("kernels' operands hold no codes of this kind")
    again = format_.assemble(*format_.disassemble(stored), 37)
    assert jax.tree.structure(again) == jax.tree.structure(stored)
    jax.tree.map(np.testing.assert_array_equal, again, stored)


@every_format
def test_rows_apart_means_a_row_alone_is_stored_the_same(format_):
    if not format_.rows_apart:
        pytest.skip("rows share a tensor's scale")
    alone = format_.store(rows()[1:2])
    among = jax.tree.map(lambda leaf: leaf[1:2], stored_rows(format_))
    jax.tree.map(np.testing.assert_array_equal, alone, among)


@every_format
def test_operands_stand_for_what_is_stored(format_):
    stored = stored_rows(format_)
    operand = row_operand(stored)
    if operand is None:
        pytest.skip("kernels have no such operand")
    np.testing.assert_array_equal(dequantize(operand), dequantize(stored))
    if isinstance(stored, BlockRows):
        assert isinstance(operand, Int8Rows) and operand.shape == stored.shape


def test_formats_that_decode_to_int8_under_a_row_scale_are_operands():
    operands = {str(f) for f in FORMATS if row_operand(stored_rows(f)) is not None}
    expected = {f for f in FORMATS if isinstance(f, Quartz | Table | FittedTable)}
    expected |= {Int(), Int(width=8), Int(width=8, range="minmax"), SDR()}
    assert operands == {str(f) for f in expected}


@every_format
def test_sixteen_bits_hold_what_the_format_says_they_hold(format_):
    stored = stored_rows(format_, (2, 37))
    found = exact_16(stored) if isinstance(stored, BlockRows) else None
    if found is None:
        pytest.skip("bfloat16 doesn't hold this format's values")
    values, scale = found
    assert values.dtype == jnp.bfloat16 and values.shape == (2, 37)
    assert scale.dtype == jnp.float32 and scale.shape == (2, 1)
    # The scales of block and row are multiplied in another order there.
    np.testing.assert_allclose(
        values.astype(np.float32) * np.float32(scale), dequantize(stored), rtol=2e-7, atol=0
    )


EIGHT_BITS = [Int(width=8), Int(width=8, range="minmax")]
NAN_ROWS = [f for f in FORMATS if isinstance(f, Quartz | Table) or f in EIGHT_BITS]


@pytest.mark.parametrize("format_", NAN_ROWS, ids=str)
def test_bad_values_make_their_rows_nan_and_no_other(format_):
    x = np.concatenate([rows()] * 2)
    x[[1, 2, 3], 7] = np.nan, np.inf, -np.inf
    y = np.asarray(dequantize(format_.store(x)))
    assert np.isnan(y[1:4, : format_.scale_block]).all()
    assert np.isfinite(y[[0, 4, 5]]).all()


def test_kernels_operands_are_what_quartz_and_eight_bits_are_stored_as():
    assert isinstance(stored_rows(Quartz()), PackedRows)
    assert isinstance(stored_rows(Int(width=8)), Int8Rows)
    assert isinstance(stored_rows(Int()), BlockRows)
