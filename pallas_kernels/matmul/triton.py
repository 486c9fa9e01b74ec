"""Quantized matmul for any NVIDIA GPU with int8 tensor cores, through Triton.

Many rows: the weights are decoded to int8 ahead, by XLA, and multiplied by a plain int8 kernel with
the epilogue inside. Few rows: reading the weights is the whole cost, so they are read as 4 bits and
decoded in the kernel, eight codes at a time, by the arithmetic that `mosaic_gpu` describes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import codec, device

TILE = 128  # rows of x and of w, and bytes of k, of a tile of the plain kernel
BAND = 8  # tiles of x that meet the same tiles of w before the next ones do
FEW_ROWS = 64  # rows of x up to which weights are decoded in the kernel
FEW_TILE_N = 32  # weight rows of a program of the few-rows kernel
FEW_BYTES = 256  # bytes of codes of each of them in a step, at most
DOT_K = 32  # least k of an int8 dot

# Four int8 from a register of four bytes of codes and one of four equal steps.
_DECODE = """{{ .reg .b32 p, o, t;
and.b32 p, $2, 255; mul.lo.u32 o, p, 0x08080808; sub.u32 o, 0x80808080, o;
shr.u32 t, $1, {shift}; and.b32 t, t, 0x0F0F0F0F; xor.b32 t, t, 0x08080808;
mad.lo.u32 t, t, p, o; xor.b32 $0, t, 0x80808080; }}"""


def matmul(
    x: jax.Array,  # [m, k], int8
    w_codes: jax.Array,  # [n, k_padded / 2], uint8
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    group_size: int,
    step: str,
    **epilogue,  # bias, x_lo, out_dtype, interpret
) -> jax.Array:
    """Multiply int8 activations by packed 4-bit weights; see `pallas_kernels.matmul.matmul`."""
    options = {"group_size": group_size, "step": step}
    if x.shape[0] <= FEW_ROWS:
        return _matmul_few_rows(x, w_codes, w_shifts, x_scale, w_scale, **options, **epilogue)
    w = codec.decode_packed(w_codes, w_shifts, **options)[:, : x.shape[1]]
    return matmul_int8(x, w, x_scale, w_scale, **epilogue)


def matmul_int8(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    bias: jax.Array | None = None,  # [n]
    x_lo: jax.Array | None = None,  # [m, 1], float32
    out_dtype: jnp.dtype = jnp.bfloat16,
    interpret: bool = False,
) -> jax.Array:
    """Multiply int8 by int8; see `pallas_kernels.matmul.matmul_int8`."""
    m, n = x.shape[0], w.shape[0]
    column = None if x_lo is None else jnp.sum(w, axis=1, dtype=jnp.int32)
    vectors = _vectors(TILE, x_scale=x_scale, x_lo=x_lo, w_scale=w_scale, bias=bias, column=column)
    x, w = _pad(x, TILE, TILE), _pad(w, TILE, TILE)
    m_tiles, n_tiles = x.shape[0] // TILE, w.shape[0] // TILE
    walk = functools.partial(_walk, m_tiles=m_tiles, n_tiles=n_tiles)
    y = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), out_dtype),
        grid=(m_tiles * n_tiles,),
        in_specs=[
            pl.BlockSpec((TILE, x.shape[1]), lambda i: (walk(i)[0], 0)),
            pl.BlockSpec((TILE, x.shape[1]), lambda i: (walk(i)[1], 0)),
            _vector_specs(vectors, TILE, TILE, walk),
        ],
        out_specs=pl.BlockSpec((TILE, TILE), walk),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="matmul_int8",
    )(x, w, vectors)
    return y[:m, :n]


def why_not(target: device.Device, x: jax.Array, w: jax.Array, *args, **kwargs) -> str | None:
    """Say why the device can't run these kernels with these arguments, or return None."""
    if target.platform != "gpu" or not target.int8 or target.generation < 80:
        return f"needs an NVIDIA GPU from Ampere on, not {target.kind}"
    return "needs at least one element" if 0 in (*x.shape, *w.shape) else None


def _matmul_few_rows(
    x: jax.Array,
    w_codes: jax.Array,
    w_shifts: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    *,
    group_size: int,
    step: str,
    bias: jax.Array | None = None,
    x_lo: jax.Array | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    interpret: bool = False,
) -> jax.Array:
    m, n = x.shape[0], w_codes.shape[0]
    # Whole bytes of shifts, and enough of codes for a dot. A zero code decodes to zero.
    codes = _pad(w_codes, FEW_TILE_N, max(group_size, DOT_K))
    k_bytes = codes.shape[1]
    shifts = _pad(w_shifts, FEW_TILE_N, k_bytes // group_size)
    # Elements 2j and 2j + 1 share a byte of codes, so they are read as one number.
    tile_m = max(16, pl.next_power_of_2(m))
    pairs = _pad(x, tile_m, 2 * k_bytes).reshape(tile_m, k_bytes, 2)
    pairs = lax.bitcast_convert_type(pairs, jnp.int16)
    vectors = _vectors(tile_m, x_scale=x_scale, x_lo=x_lo)
    vectors |= _vectors(FEW_TILE_N, w_scale=w_scale, bias=bias)
    blocks = codes.reshape(codes.shape[0], -1, group_size)
    y = pl.pallas_call(
        functools.partial(_few_rows_kernel, step=step, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((tile_m, codes.shape[0]), out_dtype),
        grid=(codes.shape[0] // FEW_TILE_N,),
        in_specs=[
            pl.BlockSpec(pairs.shape, lambda i: (0, 0)),
            pl.BlockSpec((FEW_TILE_N, *blocks.shape[1:]), lambda i: (i, 0, 0)),
            pl.BlockSpec((FEW_TILE_N, shifts.shape[1]), lambda i: (i, 0)),
            _vector_specs(vectors, tile_m, FEW_TILE_N, lambda i: (0, i)),
        ],
        out_specs=pl.BlockSpec((tile_m, FEW_TILE_N), lambda i: (0, i)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="matmul_few_rows",
    )(pairs, blocks, shifts, vectors)
    return y[:m, :n]


def _kernel(
    x_ref,  # [TILE, k], int8
    w_ref,  # [TILE, k], int8
    vectors,  # of the tile's rows and columns
    out_ref,  # [TILE, TILE]
):
    def accumulate(i, acc):
        span = pl.ds(i * TILE, TILE)
        x, w = plgpu.load(x_ref.at[:, span]), plgpu.load(w_ref.at[:, span])
        return acc + jnp.dot(x, w.T, preferred_element_type=jnp.int32)

    acc = jnp.zeros(out_ref.shape, jnp.int32)
    acc = lax.fori_loop(0, x_ref.shape[1] // TILE, accumulate, acc)
    out_ref[...] = _epilogue(acc, {name: ref[...] for name, ref in vectors.items()}, out_ref.dtype)


def _few_rows_kernel(
    x_ref,  # [tile_m, bytes], int16: two int8 each
    codes_ref,  # [FEW_TILE_N, bytes / group_size, group_size], uint8
    shifts_ref,  # [FEW_TILE_N, bytes / group_size], uint8: of two groups each
    vectors,  # of the tile's rows and columns
    out_ref,  # [tile_m, FEW_TILE_N]
    *,
    step: str,
    interpret: bool,
):
    rows, blocks, group_size = codes_ref.shape
    # The largest power of two that cuts the row into equal steps.
    part = min(FEW_BYTES // group_size, blocks & -blocks)

    def accumulate(i, carry):
        acc, column = carry
        span = pl.ds(i * part, part)
        steps = _expand(plgpu.load(shifts_ref.at[:, span]), group_size, step)
        codes = plgpu.load(codes_ref.at[:, span])
        x = plgpu.load(x_ref.at[:, pl.ds(i * (part * group_size), part * group_size)])
        for shift, half in ((0, x.astype(jnp.int8)), (4, (x >> 8).astype(jnp.int8))):
            w = _decode(codes, steps, shift, interpret)
            w = w.reshape(rows, part * group_size)
            acc += jnp.dot(w, half.T, preferred_element_type=jnp.int32)
            if "x_lo" in vectors:
                column += jnp.sum(w.astype(jnp.int32), axis=1)
        return acc, column

    start = jnp.zeros((rows, x_ref.shape[0]), jnp.int32), jnp.zeros((rows,), jnp.int32)
    acc, column = lax.fori_loop(0, blocks // part, accumulate, start)
    values = {name: ref[...] for name, ref in vectors.items()} | {"column": column}
    out_ref[...] = _epilogue(acc.T, values, out_ref.dtype)


def _expand(shifts: jax.Array, group_size: int, step: str) -> jax.Array:
    """Return the step of each byte of codes, uint8 [rows, blocks, group_size].

    A byte of shifts [rows, blocks] serves two groups, so half a block of codes each.
    """
    nibbles = [shifts.astype(jnp.int32) & 15, shifts.astype(jnp.int32) >> 4]
    steps = [n + 1 if step == "integer" else 1 << n for n in nibbles]
    first, second = (s.astype(jnp.uint8)[..., None] for s in steps)
    shape = (*shifts.shape, group_size)
    in_first = lax.broadcasted_iota(jnp.int32, shape, 2) < group_size // 2
    return jnp.where(in_first, jnp.broadcast_to(first, shape), jnp.broadcast_to(second, shape))


def _decode(codes: jax.Array, steps: jax.Array, shift: int, interpret: bool) -> jax.Array:
    """Return the decoded int8 of the low nibbles, shift 0, or of the high ones, shift 4."""
    if interpret:
        return (((codes >> shift) & 15 ^ 8).astype(jnp.int8) - 8) * steps.astype(jnp.int8)
    return plgpu.elementwise_inline_asm(
        _DECODE.format(shift=shift),
        args=[codes, steps],
        constraints="=r,r,r",
        pack=4,
        result_shape_dtypes=(jax.ShapeDtypeStruct(codes.shape, jnp.int8),),
    )[0]


def _epilogue(acc: jax.Array, vectors: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Return the result of a tile of sums [rows, columns]; see `reference.epilogue`."""
    x_scale, w_scale = vectors["x_scale"][:, None], vectors["w_scale"][None, :]
    if "x_lo" not in vectors:
        y = acc.astype(jnp.float32) * x_scale * w_scale
    else:
        column = vectors["column"][None, :]
        y = (acc + 128 * column).astype(jnp.float32) * x_scale * w_scale
        y += (vectors["x_lo"][:, None] * w_scale) * column.astype(jnp.float32)
    if "bias" in vectors:
        y += vectors["bias"][None, :]
    return y.astype(dtype)


def _walk(i: jax.Array, m_tiles: int, n_tiles: int) -> tuple[jax.Array, jax.Array]:
    """Return the tile of rows and of columns of a program, in bands of BAND tiles of rows."""
    first = i // (BAND * n_tiles) * BAND
    height = jnp.minimum(m_tiles - first, BAND)
    rest = i % (BAND * n_tiles)
    return first + rest % height, rest // height


def _vectors(multiple: int, **vectors: jax.Array | None) -> dict[str, jax.Array]:
    """Flatten and pad those that are given; the bias becomes float32."""
    flat = {name: v.reshape(-1) for name, v in vectors.items() if v is not None}
    floats = {n: v if n == "column" else v.astype(jnp.float32) for n, v in flat.items()}
    return {name: codec.pad(v, multiple) for name, v in floats.items()}


def _vector_specs(vectors: dict, tile_m: int, tile_n: int, walk: Callable) -> dict:
    def spec(name):
        of_x = name.startswith("x_")
        return pl.BlockSpec((tile_m if of_x else tile_n,), lambda i: (walk(i)[0 if of_x else 1],))

    return {name: spec(name) for name in vectors}


def _pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(x, [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)])
