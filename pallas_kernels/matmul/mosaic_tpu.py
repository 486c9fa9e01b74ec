"""Quantized matmul on TPU: 4-bit weights decoded in VMEM, then one exact dot per tile.

Every tile of the weights is decoded once, while the first rows of x pass, and kept in VMEM for
the other rows, so a large product runs at the speed of the plain int8 kernel.

The order of the weights is made for 32-bit arithmetic on packed bytes. A word holds eight codes;
its low nibbles are four consecutive k of one column, its high nibbles the four that lie 32 later.
Masking a nibble of each byte and bitcasting 8 rows of words to int8 therefore yields 32
consecutive k, and the steps of their groups are one shift or multiplication of whole words:
sum_b c_b 256**b, times the step, plus 128 in every byte, has no carries since |c * step| <= 112.

Chips without int8 units multiply in float8_e4m3fn or bfloat16, with float32 sums kept below 2**24
and added up as int32. All products and partial sums are then integers that float32 holds, so the
result is the same integer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import codec, device
from pallas_kernels.matmul import reference

_LOW_NIBBLES = 0x0F0F0F0F
_EIGHTS = 0x08080808  # the bias that makes stored nibbles unsigned
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
    meta_fields=["k", "n", "group_size", "step"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuWeights:
    """Weights in the order of these kernels; see `prepare_weights` and `prepare_int8`."""

    values: jax.Array  # [k_tiles * tile_k / 8, n_pad] int32 words, or [.., n_pad] int8
    shifts: jax.Array | None  # [groups_pad / 8, n_pad] int32, eight shifts a word; None if int8
    scale: jax.Array  # [1, n_pad] float32, of each output channel
    column: jax.Array  # [1, n_pad] int32, the sums over k of the decoded weights
    k: int  # logical contraction length
    n: int  # logical number of output channels
    group_size: int | None  # elements that share a shift; None if int8
    step: str | None  # "power" or "integer"; None if int8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a kernel needs to know besides its arrays."""

    m_tiles: int
    k_tiles: int
    group_size: int | None  # of packed weights
    step: str | None  # of packed weights
    keep: bool  # decoded weights stay in VMEM for all rows
    x_largest: int  # bounds of the operands, for exact float32 sums
    w_largest: int
    x_offset: int  # what the operand has been lowered by: 128 for asymmetric int8, else 0
    activation: str | None  # in the epilogue


def prepare_weights(
    codes: jax.Array,  # [n, k_padded / 2], uint8: packed symmetric codes
    shifts: jax.Array,  # [n, ceil(groups / 2)], uint8: packed shifts
    scale: jax.Array,  # [n, 1], float32
    *,
    k: int,
    group_size: int,
    step: str,
) -> TpuWeights:
    """Reorder packed weights for the TPU kernels: once, when they are loaded.

    Word [8 i + s, n] holds codes + 8: in nibble 2 b that of k = 64 i + 4 s + b and in nibble
    2 b + 1 that of k = 64 i + 32 + 4 s + b. Word [i, n] of the shifts holds those of groups
    8 i ... 8 i + 7, the first in its lowest nibble. Both are padded to whole tiles with zeros,
    which meet zeros of x.
    """
    n = codes.shape[0]
    tile_k, tile_n = _weight_tiles(k, n, group_size)
    # [i, half, s, b // 2, n] of bytes with two k each; n last, which is what TPUs lay out well.
    rows = codec.pad(codes, 32).T.reshape(-1, 2, 8, 2, n)
    low, high = rows[:, 0], rows[:, 1]
    even, odd = (low & 15) | (high << 4), (low >> 4) | (high & 0xF0)
    # Flipping the sign bit of a two's complement nibble adds 8.
    words = _words(jnp.stack([even, odd], axis=3).reshape(-1, n) ^ 0x88)
    shift_words = _words(codec.pad(shifts, 4).T)
    decoded = codec.decode_packed(codes, shifts, group_size=group_size, step=step)
    return TpuWeights(
        values=_pad(words, tile_k // 8, tile_n),
        shifts=_pad(shift_words, -(-k // tile_k) * tile_k // (8 * group_size), tile_n),
        scale=_pad(scale.T, 1, tile_n),
        column=_column_sums(decoded[:, :k], tile_n),
        k=k,
        n=n,
        group_size=group_size,
        step=step,
    )


def prepare_int8(
    w: jax.Array,  # [n, k], int8
    scale: jax.Array,  # [n, 1], float32
) -> TpuWeights:
    """Transpose and pad int8 weights for the plain kernel: once, when they are loaded."""
    n, k = w.shape
    tile_k, tile_n = _weight_tiles(k, n, None)
    return TpuWeights(
        values=_pad(w.T, tile_k, tile_n),
        shifts=None,
        scale=_pad(scale.T, 1, tile_n),
        column=_column_sums(w, tile_n),
        k=k,
        n=n,
        group_size=None,
        step=None,
    )


def matmul_prepared(
    x: jax.Array,  # [m, k], int8: decoded values, minus 128 if asymmetric
    weights: TpuWeights,
    x_scale: jax.Array,  # [m, 1], float32
    *,
    bias: jax.Array | None = None,  # [n], any float
    x_lo: jax.Array | None = None,  # [m, 1], float32: given if x is asymmetric
    activation: str | None = None,  # None or "gelu"
    gate: jax.Array | None = None,  # [n], any float
    residual: jax.Array | None = None,  # [m, n], any float
    out_dtype: jnp.dtype = jnp.bfloat16,
    x_bits: int = 8,
    operand: jnp.dtype | None = None,
) -> jax.Array:
    """Multiply int8 activations by prepared weights, with `reference.epilogue` in the kernel.

    Args:
      x: the activations.
      weights: from `prepare_weights` or `prepare_int8`.
      x_scale: of each row of x.
      bias: see `reference.finish` for this one and the next ones.
      x_lo: the offset of each row of asymmetric x.
      activation: applied after the bias.
      gate: multiplies each column.
      residual: added last.
      out_dtype: of the result.
      x_bits: 4 if x, less 128 or not, is 4-bit codes times powers of two, else 8.
      operand: type that the matrix units multiply. None for int8 where the device has it, else
        float8_e4m3fn where x and weights are 4-bit codes times powers of two, else bfloat16.

    Returns:
      [m, n] of out_dtype. Rows whose scale is NaN are NaN.

    Raises:
      ValueError: x and weights have different k, or the weights are not exact in `operand`.
    """
    operand = jnp.dtype(operand or _best_operand(device.current(), weights.step, x_bits))
    _check(x, weights, operand)
    m, n = x.shape[0], weights.n
    tiles = tile_m, tile_k, tile_n = tile_sizes(m, n, weights.k, weights.group_size)
    x, offset = _as_operand(x, x_lo is not None, operand)
    x = _pad(x, tile_m, tile_k)
    k_tiles, m_tiles = x.shape[1] // tile_k, x.shape[0] // tile_m
    largest = _LARGEST.get(operand.name, (1, 1))
    plan = _Plan(
        m_tiles=m_tiles,
        k_tiles=k_tiles,
        group_size=weights.group_size,
        step=weights.step,
        keep=m_tiles > 1 and k_tiles * tile_k * tile_n * operand.itemsize <= _KEPT_BYTES,
        x_largest=largest[0] if x_lo is not None else min(largest[0], 128),
        w_largest=largest[1],
        x_offset=offset,
        activation=activation,
    )
    rows = {"x_scale": x_scale, "x_lo": x_lo}
    columns = {"bias": bias, "gate": gate}
    epilogue = {key: _pad(a, tile_m, 1) for key, a in rows.items() if a is not None}
    epilogue["w_scale"] = weights.scale
    for key, array in columns.items():
        if array is not None:
            epilogue[key] = _pad(array.astype(jnp.float32).reshape(1, n), 1, tile_n)
    if x_lo is not None:
        epilogue["column"] = weights.column
    if residual is not None:
        epilogue["residual"] = _pad(residual, tile_m, tile_n)
    y = _call(x, weights, epilogue, plan, tiles, operand, out_dtype)
    return y[:m, :n]


def matmul(
    x: jax.Array,  # [m, k], int8
    w_codes: jax.Array,  # [n, k_padded / 2], uint8
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    group_size: int,
    step: str,
    **options,  # of `matmul_prepared`
) -> jax.Array:
    """Multiply int8 activations by packed 4-bit weights; see `pallas_kernels.matmul.matmul`.

    Reorders the weights at every call: keep `prepare_weights`' result where that counts.
    """
    weights = prepare_weights(
        w_codes, w_shifts, w_scale, k=x.shape[1], group_size=group_size, step=step
    )
    return matmul_prepared(x, weights, x_scale, **options)


def matmul_int8(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    **options,  # of `matmul_prepared`
) -> jax.Array:
    """Multiply int8 by int8; see `pallas_kernels.matmul.matmul_int8`."""
    weights = prepare_int8(w, w_scale)
    return matmul_prepared(x, weights, x_scale, **options)


def tile_sizes(m: int, n: int, k: int, group_size: int | None) -> tuple[int, int, int]:
    """Return the tile sizes along m, k and n; `group_size` is None for int8 weights."""
    return (_tile(m, _TILE_M, 32), *_weight_tiles(k, n, group_size))


def why_not(target: device.Device, x: jax.Array, w: jax.Array, *args, **kwargs) -> str | None:
    """Say why the device can't run these kernels, or return None."""
    if target.platform != "tpu":
        return f"needs a TPU, not {target.platform}"
    return "needs at least one element" if 0 in (*x.shape, *w.shape) else None


def _call(x, weights, epilogue, plan, tiles, operand, out_dtype) -> jax.Array:
    """Run the kernel over a grid of (n, m, k) tiles; all arrays are padded to whole tiles."""
    tile_m, tile_k, tile_n = tiles
    n_tiles = weights.values.shape[1] // tile_n
    packed = weights.shifts is not None
    w_rows = weights.values.shape[0] // plan.k_tiles

    def w_index(n, m, k):
        # Once decoded and kept, the stored tiles aren't fetched again.
        return (jnp.where(m == 0, k, plan.k_tiles - 1) if plan.keep else k), n

    row = pl.BlockSpec((tile_m, 1), lambda n, m, k: (m, 0))
    column = pl.BlockSpec((1, tile_n), lambda n, m, k: (0, n))
    tile = pl.BlockSpec((tile_m, tile_n), lambda n, m, k: (m, n))
    specs = {"x_scale": row, "x_lo": row, "residual": tile}
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
            {key: specs.get(key, column) for key in epilogue},
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n_tiles * tile_n), out_dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=device.current().platform != "tpu",
        name="quartz_matmul" if packed else "int8_matmul",
    )(x, w_arrays, epilogue)


def _kernel(x_ref, w_refs, epilogue_refs, y_ref, acc_ref, decoded_ref=None, *, plan: _Plan):
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
        given = {key: ref[...] for key, ref in epilogue_refs.items()}
        y_ref[...] = _epilogue(acc_ref[...], **given, plan=plan, out_dtype=y_ref.dtype)


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
        codes = nibbles - _EIGHTS
        scaled = codes * (shifts + 1) if plan.step == "integer" else codes << shifts
        decoded = pltpu.bitcast((scaled + _SIGN_BITS) ^ _SIGN_BITS, jnp.int8)
        if decoded_ref.dtype != jnp.int8:
            decoded = decoded.astype(jnp.float32)
        decoded_ref[start : start + 32, :] = decoded.astype(decoded_ref.dtype)


def _dot(x_ref, w_ref, plan: _Plan) -> jax.Array:
    """Return the exact int32 product of two tiles."""
    if x_ref.dtype == jnp.int8:
        return jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.int32)
    tile_k = w_ref.shape[0]
    exact_k = 2**24 // (plan.x_largest * plan.w_largest) // 128 * 128
    total = 0
    for start in range(0, tile_k, exact_k):
        part = slice(start, min(start + exact_k, tile_k))
        dot = jnp.dot(x_ref[:, part], w_ref[part, :], preferred_element_type=jnp.float32)
        total += dot.astype(jnp.int32)
    return total


def _epilogue(
    acc: jax.Array,  # [tile_m, tile_n], int32
    *,
    plan: _Plan,
    x_scale: jax.Array,  # [tile_m, 1], float32
    w_scale: jax.Array,  # [1, tile_n], float32
    x_lo: jax.Array | None = None,  # [tile_m, 1], float32
    column: jax.Array | None = None,  # [1, tile_n], int32: sums over k of w
    **options,  # of `reference.finish`, the columns as [1, tile_n]
) -> jax.Array:
    """Turn integer sums into the layer's output, in float32; see `reference.epilogue`."""
    if plan.x_offset:
        acc = acc + plan.x_offset * column
    y = acc.astype(jnp.float32) * x_scale * w_scale
    if x_lo is not None:
        y = y + (x_lo * w_scale) * column.astype(jnp.float32)
    return reference.finish(y, activation=plan.activation, **options)


def _as_operand(x: jax.Array, asymmetric: bool, operand: jnp.dtype) -> tuple[jax.Array, int]:
    """Return x as the operand's type and what it has been lowered by."""
    if operand == jnp.float8_e4m3fn and asymmetric:
        return (x.astype(jnp.float32) + 128).astype(operand), 0
    if operand != jnp.int8:
        x = x.astype(jnp.float32).astype(operand)
    return x, 128 if asymmetric else 0


def _best_operand(target: device.Device, step: str | None, x_bits: int) -> jnp.dtype:
    """Return the fastest type that holds both operands exactly; `step` is that of the weights."""
    if target.int8 or target.platform != "tpu":
        return jnp.int8
    four_bits = step == "power" and x_bits == 4
    return jnp.float8_e4m3fn if target.fp8 and four_bits else jnp.bfloat16


def _check(x: jax.Array, weights: TpuWeights, operand: jnp.dtype) -> None:
    if x.shape[1] != weights.k:
        raise ValueError(f"x has k={x.shape[1]} and weights have k={weights.k}; both must agree")
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
