"""Sixteen tables of sixteen int8 levels, of which each block picks one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import codec
from quartz_jax.formats.base import Format, Kept, Scales, check_block
from quartz_jax.schema import part

# Ascending levels, a table a row; see `Table` for how they were found.
TABLES = np.array(
    [
        [-10, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 9],
        [-19, -14, -11, -8, -5, -3, -2, -1, 0, 1, 2, 5, 8, 11, 14, 19],
        [-28, -22, -17, -13, -10, -7, -4, -1, 1, 4, 7, 10, 13, 17, 22, 28],
        [-34, -26, -21, -16, -11, -8, -5, -2, 1, 4, 7, 10, 15, 20, 26, 34],
        [-41, -31, -24, -19, -14, -9, -5, -2, 1, 4, 9, 14, 19, 24, 31, 41],
        [-49, -38, -29, -22, -17, -12, -7, -2, 2, 7, 12, 17, 22, 29, 37, 50],
        [-61, -45, -36, -28, -21, -14, -7, -2, 3, 8, 14, 21, 28, 37, 46, 60],
        [-68, -51, -40, -30, -21, -14, -8, -3, 2, 8, 15, 22, 30, 41, 54, 66],
        [-64, -49, -38, -29, -20, -14, -9, -4, 1, 6, 13, 21, 29, 38, 49, 71],
        [-73, -56, -44, -33, -23, -16, -9, -4, 1, 6, 13, 20, 28, 37, 48, 64],
        [-54, -40, -32, -25, -18, -11, -6, -1, 4, 10, 17, 25, 33, 44, 56, 78],
        [-81, -58, -45, -34, -25, -17, -10, -3, 2, 9, 16, 24, 33, 42, 53, 72],
        [-87, -66, -52, -40, -29, -20, -11, -4, 3, 12, 21, 30, 39, 49, 62, 87],
        [-103, -76, -59, -46, -35, -24, -13, -4, 5, 14, 25, 36, 49, 62, 80, 109],
        [-114, -90, -61, -42, -27, -16, -7, 0, 7, 16, 27, 38, 53, 71, 95, 125],
        [-126, -96, -72, -49, -32, -19, -8, -1, 4, 11, 20, 31, 43, 58, 79, 100],
    ],
    np.int8,
)


@part()
class Table(Format):
    """Each block picks one of 16 tables of 16 int8 levels, under a float32 scale a row.

    After LO-BCQ (arXiv 2502.05376), whose tables are of six bits under scales of blocks. Here a
    row is first quantized to int8 (stage 1 of QuaRTZ, `codec.quantize_absmax`); a block's table is
    the one of least squared error to those integers, the first on a tie; a code is the index of
    the nearest level, the lower one halfway. So it decodes to int8 under one scale a row, an
    operand of kernels, in the bits of `Quartz`: the table's number takes the place of the step.

    The tables: Gaussian, Laplace and Student-t rows (3 degrees of freedom) of 1024, 3072 and 12288
    elements, in equal parts, scaled to a maximum of 127. Blocks of 16 go to the table of least
    squared error; each table then becomes the integer levels of least error for its elements
    (1-D k-means, exact by dynamic programming over 255 values); and so on, over and over. A
    squared error counts 1 / (sum of the row's squares), over what stretched levels have on its
    distribution. From the best of three starts, a table that gained little was replaced by a
    scaled copy of one with much error, all were found anew, and the result kept if it was better,
    32 times. Relative error of rows of 3072: .0726 Gaussian, .0789 Laplace, .0945 Student-t
    (stretched levels, searched: .0796, .0926, .1157).
    """

    block: int = 16  # elements that share a table; the tables were made for 16
    signed_codes = False
    nibbles = ("table",)

    def __post_init__(self):
        check_block("block", self.block)

    def bits(self, k: int) -> float:
        """Four, four for a block's table, and a float32 scale a row."""
        return 4 + 4 / self.block + 32 / k

    def outer(self, rows: jax.Array) -> Scales:
        """Return the `codec.RowScale` of the 8-bit stage."""
        return codec.range_scale(rows)

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the number of each block's table, int32."""
        values = codec.to_8bit(blocks, outer).astype(jnp.int32)

        def compare(number, best):
            error, chosen = best
            table = jnp.full_like(chosen, number)
            rest = values - _level(_code(values, table), table)
            candidate = jnp.sum(rest * rest, axis=-1, keepdims=True)
            return jnp.minimum(error, candidate), jnp.where(candidate < error, table, chosen)

        # Derived from the input, so that under shard_map the loop's carry varies as its body does.
        start = jnp.zeros_like(values[..., :1])
        worst = start + jnp.iinfo(jnp.int32).max
        return lax.fori_loop(0, len(TABLES), compare, (worst, start))[1]

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return the index of the level nearest to the 8-bit value, int32."""
        return _code(codec.to_8bit(values, outer).astype(jnp.int32), inner)

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return tables' numbers, and scales of rows."""
        return {"table": inner.astype(jnp.uint8), "row_scale": outer.scale}

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return levels times the row's scale."""
        return self._levels(codes, kept).astype(jnp.float32) * kept["row_scale"]

    def exact_8(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return levels, and the row's scale."""
        return self._levels(codes, kept).astype(jnp.int8), kept["row_scale"]

    def _levels(self, codes: jax.Array, kept: Kept) -> jax.Array:
        return _level(codes, kept["table"].astype(jnp.int32))

    def __str__(self):
        return "table" + f" g{self.block}" * (self.block != 16)


def _code(values: jax.Array, table: jax.Array) -> jax.Array:
    """Return the index of the nearest level, the lower one halfway, int32."""
    wide = TABLES.astype(np.int32)
    code = jnp.zeros_like(values)
    for twice in (wide[:, 1:] + wide[:, :-1]).T:  # twice the middle of two levels, by table
        code = code + (2 * values > jnp.asarray(twice)[table])
    return code


def _level(codes: jax.Array, table: jax.Array) -> jax.Array:
    """Return the level of each code, int32."""
    return jnp.asarray(TABLES.astype(np.int32).ravel())[16 * table + codes]
