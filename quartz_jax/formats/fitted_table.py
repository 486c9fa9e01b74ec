"""A table of 16 levels fitted to the tensor, under int8: comfy-kitchen's asym_w4a8_int8."""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.codec import TINY_RANGE
from quartz_jax.formats.base import Format, Kept, Scales, absmax, check_block, pad, split
from quartz_jax.formats.floating import load_e4m3, round_e4m3, store_e4m3
from quartz_jax.schema import part

_LEVELS = 16
_INT8_MAX = 127
_E4M3_MAX = 448.0
_LLOYD_STEPS = 25  # the source's
_SCALE_STEPS = 2  # of least squares: what the source takes, as more gain under a thousandth
_SAMPLES = 2**18  # elements that a table is fitted to, evenly spread
_NAMES = tuple(f"row_level_{i:02d}" for i in range(_LEVELS))  # of the table in what is kept


@part()
class FittedTable(Format):
    """A table of 16 levels for the tensor times an E4M3 scale for 16, rounded to int8.

    As in comfy-kitchen (comfy_kitchen/backends/eager/w4a8_int8.py), without its rotation and with
    the codebook always fitted:
      t = x / max|block|, and Lloyd-Max levels of t (Lloyd 1982, method I) from its quantiles;
      s of each block by least squares, sum(x level) / sum(level**2), twice, the levels chosen
        anew in between;
      r = max|s level| / 127 over the row, and scale = E4M3(s / r);
      code i stands for r clip(round(level[i] scale), -127, 127), the nearest is stored.
    A tensor is the last two axes of an array. Fitting sorts a sample, so it is for weights.
    """

    rows_apart = False
    signed_codes = False

    block: int = 16  # elements that share a scale; 16 in the source

    def __post_init__(self):
        check_block("block", self.block)

    def bits(self, k: int) -> float:
        """Four, eight for a block's scale, a float32 a row; the table is too little to count."""
        return 4 + 8 / self.block + 32 / k

    def outer(self, rows: jax.Array) -> Scales:
        """Return the scale of each row, and the table as 16 leaves, the same for all rows."""
        blocks = split(pad(rows, self.block), self.block)
        table = _fit(_over(blocks, absmax(blocks)))
        levels = tuple(
            jnp.broadcast_to(table[..., i : i + 1], (*rows.shape[:-1], 1)) for i in range(_LEVELS)
        )
        of_blocks = tuple(level[..., None] for level in levels)
        scale = _scale(blocks, of_blocks)
        peak = absmax(scale * _level(of_blocks, _nearest(_over(blocks, scale), of_blocks)))
        return jnp.max(peak, axis=-2) / _INT8_MAX, levels

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return the E4M3 scale of each block, relative to the row's, as float32."""
        row, table = outer
        live = row >= TINY_RANGE
        scale = round_e4m3(jnp.minimum(_over(_scale(blocks, table), row), _E4M3_MAX))
        return jnp.where(live, scale, 0)

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return the code of the nearest of 16 integers, the lower one halfway, int32."""
        row, table = outer
        return _nearest(_over(values, row), tuple(_integer(level, inner) for level in table))

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return scales of blocks in E4M3, scales of rows, and the table, one leaf a level."""
        row, table = outer
        levels = dict(zip(_NAMES, table, strict=True))
        return {"scale": store_e4m3(inner), "row_scale": row} | levels

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return integers times the row's scale."""
        return self._integers(codes, kept) * kept["row_scale"]

    def exact_8(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return integers, and the row's scale."""
        return self._integers(codes, kept).astype(jnp.int8), kept["row_scale"]

    def _integers(self, codes: jax.Array, kept: Kept) -> jax.Array:
        level = _level(tuple(kept[name] for name in _NAMES), codes)
        return _integer(level, load_e4m3(kept["scale"]))

    def pack_scales(self, scales: Kept) -> Kept:
        """Return the table once, [..., 1, 16] (or [16] of a single row), beside the scales."""
        table = jnp.concatenate([scales[name] for name in _NAMES], axis=-1)
        table = table[..., :1, :] if table.ndim > 1 else table
        return {"scale": scales["scale"], "row_scale": scales["row_scale"], "table": table}

    def unpack_scales(self, stored: Kept, blocks: int) -> Kept:
        """Undo `pack_scales`; the table's leaves broadcast over rows."""
        scales = {name: leaf for name, leaf in stored.items() if name != "table"}
        levels = {name: stored["table"][..., i : i + 1] for i, name in enumerate(_NAMES)}
        return scales | levels

    def __str__(self):
        return "fitted-table" + f" g{self.block}" * (self.block != 16)


def _fit(
    t: jax.Array,  # float32 [..., rows, blocks, block] or [blocks, block]
) -> jax.Array:
    """Return 16 Lloyd-Max levels of each tensor, ascending, [..., 1, 16] or [16]."""
    leading = t.shape[:-3]
    values = t.reshape(math.prod(leading), math.prod(t.shape[-3:]))
    if not values.size:
        return jnp.zeros((*leading, 1, _LEVELS))
    # An odd stride, so that every place in a block is met.
    stride = max(values.shape[-1] // _SAMPLES, 1) | 1
    table = jax.vmap(_lloyd)(jnp.sort(values[:, ::stride])).reshape(*leading, _LEVELS)
    return table[..., None, :] if t.ndim > 2 else table


def _lloyd(
    sample: jax.Array,  # float32 [samples], ascending
) -> jax.Array:
    """Return 16 levels, ascending: each the mean of the values that are nearest to it."""
    count = len(sample)
    sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(sample)])

    def step(_, levels):
        ends = jnp.searchsorted(sample, (levels[1:] + levels[:-1]) / 2, side="right")
        ends = jnp.concatenate([jnp.array([0]), ends, jnp.array([count])])
        members = jnp.diff(ends)
        mean = jnp.diff(sums[ends]) / jnp.maximum(members, 1)
        return jnp.where(members > 0, mean, levels)

    quantiles = jnp.round(jnp.linspace(0, count - 1, _LEVELS)).astype(jnp.int32)
    return lax.fori_loop(0, _LLOYD_STEPS, step, sample[quantiles])


def _scale(blocks: jax.Array, table: tuple[jax.Array, ...]) -> jax.Array:
    """Return the scale of each block by least squares, twice, from its maximum, [..., 1]."""
    scale = absmax(blocks)
    for _ in range(_SCALE_STEPS):
        level = _level(table, _nearest(_over(blocks, scale), table))
        product = jnp.sum(blocks * level, axis=-1, keepdims=True)
        square = jnp.sum(level * level, axis=-1, keepdims=True)
        scale = jnp.maximum(_over(product, square), 0)
    return scale


def _nearest(values: jax.Array, levels: tuple[jax.Array, ...]) -> jax.Array:
    """Return which of ascending levels is nearest, the lower one halfway, int32."""
    code = jnp.int32(0)
    for low, high in itertools.pairwise(levels):
        code = code + (values > (low + high) / 2)
    return code


def _level(table: tuple[jax.Array, ...], codes: jax.Array) -> jax.Array:
    """Return the level of each code."""
    found = table[0]
    for i, level in enumerate(table[1:], start=1):
        found = jnp.where(codes >= i, level, found)
    return found


def _integer(level: jax.Array, scale: jax.Array) -> jax.Array:
    """Return what a level stands for in a block, a whole float32 of at most 127."""
    return jnp.clip(jnp.round(level * scale), -_INT8_MAX, _INT8_MAX)


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return x / scale, 0 where the scale is tiny."""
    live = scale >= TINY_RANGE
    return jnp.where(live, x / jnp.where(live, scale, 1), 0)
