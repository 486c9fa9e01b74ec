"""Quantized matmul on TPU: 4-bit weights decoded in VMEM, then one exact dot per tile.

Every tile of the weights is decoded once, while the first rows of x pass, and kept in VMEM for
the other rows, so a large product runs at the speed of the plain int8 kernel.

The order of the weights is made for 32-bit arithmetic on packed bytes. A word holds eight codes;
its low nibbles are four consecutive k of one column, its high nibbles the four that lie 32 later.
Masking a nibble of each byte and bitcasting 8 rows of words to int8 therefore yields 32
consecutive k, and the steps of their groups are one shift or multiplication of whole words:
sum_b c_b 256**b, times the step, plus 128 in every byte, has no carries since |c * step| <= 127.

Chips without int8 units multiply in float8_e4m3fn or bfloat16, with float32 sums kept below 2**24
and added up as int32. All products and partial sums are then integers that float32 holds, so the
result is the same integer.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import codec, device
from pallas_kernels.matmul import images, reference
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows, int8_values

_LOW_NIBBLES = 0x0F0F0F0F
_EIGHTS = 0x08080808  # the bias that makes stored nibbles unsigned
_ONES = 0x01010101
_SIGN_BITS = -0x7F7F7F80  # 0x80808080 as int32

# The limits divide the layers of FLUX, DiT and PixArt evenly, and fit the smallest VMEM.
_TILE_M, _TILE_K, _TILE_N = 768, 1536, 1536
_KEPT_BYTES = 28 * 2**20  # of decoded weights; beyond it, every step decodes its tile again
_VMEM_BYTES = 56 * 2**20  # v7x has 64 MiB, the others more

# Largest magnitude of an operand of each type: (x, w).
_LARGEST = {"bfloat16": (128, 127), "float8_e4m3fn": (240, 112)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "shifts", "scale", "column"],
    meta_fields=["k", "n", "group_size", "step", "levels"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuWeights:
    """Weights in the order of these kernels; see `prepare`."""

    values: jax.Array  # [k_tiles * tile_k / 8, n_pad] int32 words, or [.., n_pad] int8
    shifts: jax.Array | None  # [groups_pad / 8, n_pad] int32, eight shifts a word; None if int8
    scale: jax.Array  # [1, n_pad] float32, of each output channel
    column: jax.Array  # [1, n_pad] int32, the sums over k of the decoded weights
    k: int  # logical contraction length
    n: int  # logical number of output channels
    group_size: int | None  # elements that share a shift; None if int8
    step: str | None  # "power" or "integer"; None if int8
    levels: str = "uniform"  # or "stretched"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a kernel needs to know besides its arrays."""

    m_tiles: int
    k_tiles: int
    group_size: int | None  # of packed weights
    step: str | None  # of packed weights
    levels: str  # of packed weights
    keep: bool  # decoded weights stay in VMEM for all rows
    x_largest: int  # bounds of the operands, for exact float32 sums
    w_largest: int
    x_offset: int  # what the operand has been lowered by: 128 for asymmetric int8, else 0


def prepare(
    w: Int8Rows | PackedRows,  # [n, k]
) -> TpuWeights:
    """Reorder weights for the TPU kernels: once, when they are loaded."""
    return _prepare_packed(w) if isinstance(w, PackedRows) else _prepare_int8(w)


def _prepare_packed(w: PackedRows) -> TpuWeights:
    """Reorder packed weights.

    Word [8 i + s, n] holds codes + 8 (with stretched levels those from -6 down one less, see
    `_stretch`): in nibble 2 b that of k = 64 i + 4 s + b and in nibble 2 b + 1 that of
    k = 64 i + 32 + 4 s + b. Word [i, n] of the shifts holds those of groups 8 i ... 8 i + 7, the
    first in its lowest nibble. Both are padded to whole tiles with zeros, which meet zeros of x.
    """
    n, k = w.shape
    tile_k, tile_n = _weight_tiles(k, n, w.group_size)
    # [i, half, s, b // 2, n] of bytes with two k each; n last, which is what TPUs lay out well.
    codes = w.codes if w.levels == "uniform" else _lower_outer(w.codes)
    rows = codec.pad(codes, 32).T.reshape(-1, 2, 8, 2, n)
    low, high = rows[:, 0], rows[:, 1]
    even, odd = (low & 15) | (high << 4), (low >> 4) | (high & 0xF0)
    # Flipping the sign bit of a two's complement nibble adds 8.
    words = _words(jnp.stack([even, odd], axis=3).reshape(-1, n) ^ 0x88)
    shift_words = _words(codec.pad(w.shifts, 4).T)
    return TpuWeights(
        values=_pad(words, tile_k // 8, tile_n),
        shifts=_pad(shift_words, -(-k // tile_k) * tile_k // (8 * w.group_size), tile_n),
        scale=_pad(w.scale.T, 1, tile_n),
        column=_column_sums(int8_values(w), tile_n),
        k=k,
        n=n,
        group_size=w.group_size,
        step=w.step,
        levels=w.levels,
    )


def _lower_outer(codes: jax.Array) -> jax.Array:
    """Return packed codes, those from -6 down one less."""
    signed = codec.unpack(codes, signed=True)
    return codec.pack(signed - (signed <= -6).astype(jnp.int8))


def _prepare_int8(w: Int8Rows) -> TpuWeights:
    """Transpose and pad int8 weights for the plain kernel."""
    n, k = w.shape
    tile_k, tile_n = _weight_tiles(k, n, None)
    return TpuWeights(
        values=_pad(w.values.T, tile_k, tile_n),
        shifts=None,
        scale=_pad(w.scale.T, 1, tile_n),
        column=_column_sums(w.values, tile_n),
        k=k,
        n=n,
        group_size=None,
        step=None,
    )


def matmul(
    x: Int8Rows,  # [m, k]
    w: Int8Rows | PackedRows,  # [n, k]
    epilogue: Epilogue,
) -> jax.Array:
    """Multiply int8 activations by weights; see `pallas_kernels.matmul.matmul`.

    Reorders the weights at every call: keep `prepare`'s result where that counts.
    """
    return matmul_prepared(x, prepare(w), epilogue)


def matmul_prepared(
    x: Int8Rows,  # [m, k]
    weights: TpuWeights,  # [n, k]
    epilogue: Epilogue,
    *,
    operand: Any = None,
) -> jax.Array:
    """Multiply int8 activations by prepared weights, with the epilogue in the kernel.

    Args:
      x: the activations.
      weights: from `prepare`.
      epilogue: what becomes of the product.
      operand: type that the matrix units multiply. None for int8 where the device has it, else
        float8_e4m3fn where x and weights are 4-bit codes times powers of two, else bfloat16.

    Returns:
      [m, n] of out_dtype. Rows whose scale is NaN are NaN.

    Raises:
      ValueError: x and weights have different k, or the weights are not exact in `operand`.
    """
    operand = jnp.dtype(operand or _best_operand(device.current(), weights.step, x.value_bits))
    _check(x, weights, operand)
    m, n = x.shape[0], weights.n
    rows = m // epilogue.images
    tiles = tile_m, tile_k, tile_n = tile_sizes(rows, n, weights.k, weights.group_size)
    x, epilogue, crop = images.apart(x, epilogue, tile_m)
    values, offset = _as_operand(x.values, x.lo is not None, operand)
    values = _pad(values, tile_m, tile_k)
    k_tiles, m_tiles = values.shape[1] // tile_k, values.shape[0] // tile_m
    largest = _LARGEST.get(operand.name, (1, 1))
    plan = _Plan(
        m_tiles=m_tiles,
        k_tiles=k_tiles,
        group_size=weights.group_size,
        step=weights.step,
        levels=weights.levels,
        keep=m_tiles > 1 and k_tiles * tile_k * tile_n * operand.itemsize <= _KEPT_BYTES,
        x_largest=largest[0] if x.lo is not None else min(largest[0], 128),
        w_largest=largest[1],
        x_offset=offset,
    )
    scales = {"x_scale": _pad(x.scale, tile_m, 1), "w_scale": weights.scale}
    if x.lo is not None:
        scales |= {"x_lo": _pad(x.lo, tile_m, 1), "column": weights.column}
    y = _call(values, weights, scales, _pad_epilogue(epilogue, tiles), plan, tiles, operand)
    return crop(y)[:, :n]


def _pad_epilogue(epilogue: Epilogue, tiles: tuple[int, int, int]) -> Epilogue:
    """Return an epilogue of float32 columns, its arrays padded to whole tiles.

    Columns are [1, n], a gate of several images [images, 1, n].
    """
    tile_m, _, tile_n = tiles

    def column(array):
        return None if array is None else _pad(array.astype(jnp.float32)[None], 1, tile_n)

    branch, residual, gate = epilogue.branch, epilogue.residual, epilogue.gate
    if gate is not None:
        gate = _pad(gate.astype(jnp.float32).reshape(epilogue.images, -1), 1, tile_n)
        gate = gate if epilogue.images == 1 else gate[:, None]
    if branch is not None:
        branch = Branch(input=_pad(branch.input, tile_m, 128), up=_pad(branch.up, tile_n, 128))
    return dataclasses.replace(
        epilogue,
        bias=column(epilogue.bias),
        gate=gate,
        residual=None if residual is None else _pad(residual, tile_m, tile_n),
        branch=branch,
    )


def tile_sizes(m: int, n: int, k: int, group_size: int | None) -> tuple[int, int, int]:
    """Return the tile sizes along m, k and n; `group_size` is None for int8 weights."""
    return (_tile(m, _TILE_M, 32), *_weight_tiles(k, n, group_size))


def why_not(target: device.Device, x: Int8Rows, w: Any, epilogue: Epilogue) -> str | None:
    """Say why the device can't run these kernels, or return None."""
    if target.platform != "tpu":
        return f"needs a TPU, not {target.platform}"
    return "needs at least one element" if 0 in (*x.shape, *w.shape) else None


def _call(x, weights, scales, epilogue, plan, tiles, operand) -> jax.Array:
    """Run the kernel over a grid of (n, m, k) tiles; all arrays are padded to whole tiles."""
    tile_m, tile_k, tile_n = tiles
    n_tiles = weights.values.shape[1] // tile_n
    packed = weights.shifts is not None
    w_rows = weights.values.shape[0] // plan.k_tiles

    def w_index(n, m, k):
        # Once decoded and kept, the stored tiles aren't fetched again.
        return (jnp.where(m == 0, k, plan.k_tiles - 1) if plan.keep else k), n

    block: Any = pl.BlockSpec  # stands where an array will
    row = block((tile_m, 1), lambda n, m, k: (m, 0))
    column = block((1, tile_n), lambda n, m, k: (0, n))
    tile = block((tile_m, tile_n), lambda n, m, k: (m, n))
    rank = 0 if epilogue.branch is None else epilogue.branch.up.shape[1]
    of_image = x.shape[0] // epilogue.images  # whole tiles if there are several images
    gate = block((None, 1, tile_n), lambda n, m, k: (m * tile_m // of_image, 0, n))
    specs = {"bias": column, "gate": column if epilogue.images == 1 else gate, "residual": tile}
    specs["branch"] = Branch(
        input=block((tile_m, rank), lambda n, m, k: (m, 0)),
        up=block((tile_n, rank), lambda n, m, k: (n, 0)),
    )
    specs = {name: spec for name, spec in specs.items() if getattr(epilogue, name) is not None}
    w_specs = {"values": pl.BlockSpec((w_rows, tile_n), w_index)}
    w_arrays = {"values": weights.values}
    if packed:
        rows = weights.shifts.shape[0]
        w_specs["shifts"] = pl.BlockSpec((rows, tile_n), lambda n, m, k: (0, n))
        w_arrays["shifts"] = weights.shifts
    scratch = [pltpu.VMEM((tile_m, tile_n), jnp.int32)]
    if packed or operand != jnp.int8:
        scratch.append(pltpu.VMEM((plan.k_tiles if plan.keep else 1, tile_k, tile_n), operand))
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(n_tiles, plan.m_tiles, plan.k_tiles),
        in_specs=[
            pl.BlockSpec((tile_m, tile_k), lambda n, m, k: (m, k)),
            w_specs,
            {name: row if name.startswith("x_") else column for name in scales},
            dataclasses.replace(epilogue, **specs),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n_tiles * tile_n), epilogue.out_dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=device.current().platform != "tpu",
        name="quartz_matmul" if packed else "int8_matmul",
    )(x, w_arrays, scales, epilogue)


def _kernel(
    x_ref, w_refs, scale_refs, epilogue_refs, y_ref, acc_ref, decoded_ref=None, *, plan: _Plan
):
    m, k = pl.program_id(1), pl.program_id(2)
    w_ref = w_refs["values"]
    if decoded_ref is not None:
        w_ref = decoded_ref.at[k if plan.keep else 0]
        decode = functools.partial(_decode_tile, w_refs, w_ref, k, plan)
        if plan.keep:
            pl.when(m == 0)(decode)
        else:
            decode()
    acc_ref[...] = jnp.where(k == 0, 0, acc_ref[...]) + _dot(x_ref, w_ref, plan)

    @pl.when(k == plan.k_tiles - 1)
    def _():
        scales, epilogue = jax.tree.map(lambda ref: ref[...], (scale_refs, epilogue_refs))
        y = reference.scale_sums(acc_ref[...], **scales, offset=plan.x_offset)
        y_ref[...] = reference.finish(y, epilogue)


def _decode_tile(w_refs, decoded_ref, k, plan: _Plan) -> None:
    """Decode one tile of weights, 64 rows of k from 8 rows of words at a time."""
    values_ref = w_refs["values"]
    if plan.group_size is None:
        decoded_ref[...] = values_ref[...].astype(decoded_ref.dtype)
        return
    group_bits = plan.group_size.bit_length() - 1
    tile_k, tile_n = decoded_ref.shape
    row_k = 8 * plan.group_size  # k that one row of shifts covers
    within = 4 * lax.broadcasted_iota(jnp.int32, (8, tile_n), 0) >> group_bits
    for start in range(0, tile_k, 32):
        words = values_ref[start // 64 * 8 : start // 64 * 8 + 8, :]
        nibbles = (lax.shift_right_logical(words, 4) if start % 64 else words) & _LOW_NIBBLES
        row = k * (tile_k // row_k) + start // row_k
        shifts = jnp.broadcast_to(w_refs["shifts"][pl.ds(row, 1), :], words.shape)
        nibble = start // plan.group_size % 8 + within
        shifts = lax.shift_right_logical(shifts, 4 * nibble) & 15
        codes = nibbles - _EIGHTS if plan.levels == "uniform" else _stretch(nibbles)
        scaled = codes * (shifts + 1) if plan.step == "integer" else codes << shifts
        decoded = pltpu.bitcast((scaled + _SIGN_BITS) ^ _SIGN_BITS, jnp.int8)
        if decoded_ref.dtype != jnp.int8:
            decoded = decoded.astype(jnp.float32)
        decoded_ref[start : start + 32, :] = decoded.astype(decoded_ref.dtype)


def _stretch(nibbles: jax.Array) -> jax.Array:
    """Return the sum of a word's four stretched levels times 256**b.

    Byte v stands for v - 8 in the middle, 0 for -9, 1 for -7, 14 for 7 and 15 for 9, that is
    v - 9 + (v >= 1) + (v >= 14) + (v == 15); carries of a nibble make the comparisons.
    """
    above_zero = ((nibbles + 15 * _ONES) >> 4) & _ONES
    outer = ((nibbles + 2 * _ONES) >> 4) & _ONES
    return nibbles - 9 * _ONES + above_zero + outer + (outer & nibbles)


def _dot(x_ref, w_ref, plan: _Plan) -> jax.Array:
    """Return the exact int32 product of two tiles."""
    if x_ref.dtype == jnp.int8:
        return jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)
    tile_k = w_ref.shape[0]
    exact_k = 2**24 // (plan.x_largest * plan.w_largest) // 128 * 128
    total = jnp.int32(0)
    for start in range(0, tile_k, exact_k):
        part = slice(start, min(start + exact_k, tile_k))
        dot = jnp.dot(x_ref[:, part], w_ref[part, :], preferred_element_type=jnp.float32)
        total += dot.astype(jnp.int32)
    return total


def _as_operand(x: jax.Array, asymmetric: bool, operand: jnp.dtype) -> tuple[jax.Array, int]:
    """Return x as the operand's type and what it has been lowered by."""
    if operand == jnp.float8_e4m3fn and asymmetric:
        return (x.astype(jnp.float32) + 128).astype(operand), 0
    if operand != jnp.int8:
        x = x.astype(jnp.float32).astype(operand)
    return x, 128 if asymmetric else 0


def _best_operand(target: device.Device, step: str | None, value_bits: int) -> jnp.dtype:
    """Return the fastest type that holds both operands exactly; `step` is that of the weights."""
    if target.int8 or target.platform != "tpu":
        return jnp.int8
    four_bits = step == "power" and value_bits == 4
    return jnp.float8_e4m3fn if target.fp8 and four_bits else jnp.bfloat16


def _check(x: Int8Rows, weights: TpuWeights, operand: jnp.dtype) -> None:
    if x.k != weights.k:
        raise ValueError(f"x has k={x.k} and weights have k={weights.k}; both must agree")
    if operand == jnp.float8_e4m3fn and weights.step != "power":
        raise ValueError(
            "operand=float8_e4m3fn holds only weights of step='power' exactly, not "
            f"step={weights.step!r}; pass operand=bfloat16"
        )


def _weight_tiles(k: int, n: int, group_size: int | None) -> tuple[int, int]:
    """Return the tile sizes along k and n; a tile of k holds whole words of shifts."""
    return _tile(k, _TILE_K, max(128, 8 * (group_size or 0))), _tile(n, _TILE_N, 128)


def _tile(size: int, limit: int, unit: int) -> int:
    """Return the multiple of `unit` up to `limit` that splits `size` with the least padding."""
    tiles = max(-(-size // limit), 1)
    return max(-(-size // (tiles * unit)), 1) * unit


def _pad(array: jax.Array, rows: int, columns: int, value: int = 0) -> jax.Array:
    """Pad a matrix to multiples of `rows` and `columns`."""
    missing = [(0, -array.shape[0] % rows), (0, -array.shape[1] % columns)]
    return jnp.pad(array, missing, constant_values=value)


def _words(values: jax.Array) -> jax.Array:
    """Join bytes [4 j, n] to int32 [j, n], the first in the lowest byte."""
    quads = values.reshape(-1, 4, values.shape[1]).astype(jnp.int32)
    return quads[:, 0] | quads[:, 1] << 8 | quads[:, 2] << 16 | quads[:, 3] << 24


def _column_sums(w: jax.Array, tile_n: int) -> jax.Array:
    return _pad(jnp.sum(w, axis=1, dtype=jnp.int32)[None], 1, tile_n)
