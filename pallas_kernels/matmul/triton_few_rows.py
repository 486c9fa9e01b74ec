"""4-bit matmul for few rows on NVIDIA GPUs: reading the weights is the whole cost.

Each program reads the codes of a few weight rows, whole words of eight codes in the checkpoint's
own order, decodes them by the arithmetic that `mosaic_gpu` describes and multiplies with dp4a,
which the ordinary cores have.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import device
from pallas_kernels.matmul import images, reference, triton, tuned
from pallas_kernels.operands import Epilogue, Int8Rows, PackedRows

MAX_ROWS = 64  # of x; more are bound by arithmetic
MAX_ROWS_HOPPER = 4  # where `mosaic_gpu` is faster beyond
UNROLLED = 8  # parts of a weight row up to which all are loaded before the first is used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of one program."""

    tile_m: int = 4  # rows of x
    tile_n: int = 4  # weight rows at once
    passes: int = 1  # as many weight rows after each other, for which x stays in registers
    words: int = 128  # of eight codes, of a weight row at once, at most
    warps: int = 2


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def matmul(
    x: Int8Rows,  # [m, k]
    w: PackedRows,  # [n, k]
    epilogue: Epilogue,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply int8 activations by packed 4-bit weights; see `pallas_kernels.matmul.matmul`."""
    m, n = x.shape[0], w.shape[0]
    config = config or Config(**tuned.lookup("triton_few_rows", m, n, x.k) or {})
    # A byte of shifts serves two groups: group_size bytes of codes. A zero code decodes to zero.
    tile = min(config.tile_m, pl.next_power_of_2(m)), config.tile_n * config.passes
    codes = triton.pad(w.codes, tile[1], w.group_size)
    shifts = triton.pad(w.shifts, tile[1], 1)
    words = codes.reshape(*shifts.shape, w.group_size // 4, 4)
    words = lax.bitcast_convert_type(words, jnp.int32)
    x, epilogue, crop = images.apart(x, epilogue, tile[0])
    values = triton.pad(x.values, tile[0], 2 * w.group_size)
    rows = values.shape[0]
    pairs = lax.bitcast_convert_type(values.reshape(rows, *words.shape[1:], 2, 4), jnp.int32)
    m_tiles, n_tiles = rows // tile[0], codes.shape[0] // tile[1]
    # So small a product is left to XLA.
    branch, epilogue = epilogue.branch, dataclasses.replace(epilogue, branch=None)
    added = None if branch is None else triton.pad(reference.branch_product(branch), *tile)
    scales = triton.pad_scales(x, w.scale, None, *tile)
    epilogue = triton.pad_epilogue(epilogue, *tile)

    def walk(i):  # programs that share weights are neighbours
        return i % m_tiles, i // m_tiles

    y = pl.pallas_call(
        functools.partial(
            _kernel,
            step=w.step,
            levels=w.levels,
            words=config.words,
            passes=config.passes,
            interpret=interpret,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, codes.shape[0]), epilogue.out_dtype),
        grid=(m_tiles * n_tiles,),
        in_specs=[
            pl.BlockSpec((tile[0], *pairs.shape[1:]), lambda i: (walk(i)[0], 0, 0, 0)),
            pl.BlockSpec((tile[1], *words.shape[1:]), lambda i: (walk(i)[1], 0, 0)),
            pl.BlockSpec((tile[1], shifts.shape[1]), lambda i: (walk(i)[1], 0)),
            triton.scale_specs(scales, *tile, walk),
            triton.epilogue_specs(epilogue, *tile, walk, x.shape[0] // epilogue.images),
            None if added is None else pl.BlockSpec(tile, walk),
        ],
        out_specs=pl.BlockSpec(tile, walk),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps),
        interpret=interpret,
        name="matmul_few_rows",
    )(pairs, words, shifts, scales, epilogue, added)
    return crop(y)[:, :n]


def why_not(target: device.Device, x: Int8Rows, w: Any, epilogue: Epilogue) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    limit = MAX_ROWS_HOPPER if target.generation == 90 else MAX_ROWS
    if x.shape[0] > limit:
        return f"serves up to {limit} rows on this device, not {x.shape[0]}"
    return triton.why_not(target, x, w, dataclasses.replace(epilogue, branch=None))


def _kernel(
    x_ref,  # [tile_m, blocks, words, 2], int32: the two words that meet one of codes
    words_ref,  # [tile_n, blocks, words], int32
    shifts_ref,  # [tile_n, blocks], uint8: of two groups each
    scales,  # of the tile's rows and columns
    epilogue,  # the same
    added,  # [tile_m, tile_n], float32: the product of the branch; or None
    out_ref,  # [tile_m, tile_n]
    *,
    step: str,
    levels: str,
    words: int,
    passes: int,
    interpret: bool,
):
    tile_n, blocks, block = words_ref.shape
    rows = tile_n // passes
    # The largest power of two that cuts the row into equal parts.
    part = min(max(words // block, 1), blocks & -blocks)
    dot = _dot_jnp if interpret else _dot
    decode = _decode_jnp if interpret else _decode
    asymmetric = "x_lo" in scales

    unrolled = blocks // part <= UNROLLED
    starts = range(0, blocks, part)

    def load(at, start):
        span = pl.ds(start, part)
        return plgpu.load(words_ref.at[at, span]), plgpu.load(shifts_ref.at[at, span])

    def load_x(m, start, half):
        at = pl.ds(m, 1), pl.ds(start, part), slice(None)
        return plgpu.load(x_ref.at[(*at, pl.ds(half, 1))]).reshape(1, part, block)

    kept = {}
    if unrolled and passes > 1:
        every = itertools.product(range(x_ref.shape[0]), starts, range(2))
        kept = {which: load_x(*which) for which in every}

    def multiply(carry, start, codes, shifts):
        halves = decode(codes, _steps(shifts, codes.shape, step), levels)
        sums = []
        for m, acc in enumerate(carry[: x_ref.shape[0]]):
            for i, w in enumerate(halves):
                x = kept[m, start, i] if kept else load_x(m, start, i)
                acc = dot(w, jnp.broadcast_to(x, w.shape), acc)
            sums.append(acc)
        if asymmetric:
            ones = jnp.full(codes.shape, 0x01010101, jnp.int32)
            sums.append(dot(halves[1], ones, dot(halves[0], ones, carry[-1])))
        return tuple(sums)

    def run(at):
        """Multiply by some weight rows and write the results."""
        carry = (jnp.zeros((rows, part, block), jnp.int32),) * (x_ref.shape[0] + asymmetric)
        if unrolled:
            for start, loaded in zip(starts, [load(at, start) for start in starts], strict=True):
                carry = multiply(carry, start, *loaded)
        else:
            carry = lax.fori_loop(
                0, blocks // part, lambda i, c: multiply(c, i * part, *load(at, i * part)), carry
            )
        sums = [jnp.sum(jnp.sum(acc, axis=2), axis=1) for acc in carry]
        _write(sums, scales, epilogue, added, out_ref, at)

    if passes == 1:
        run(slice(None))
    else:
        pl.loop(0, passes)(lambda i: run(pl.ds(i * rows, rows)))


def _write(sums: list[jax.Array], scales, epilogue, added, out_ref, at):
    """Scale and store some columns, one row of x at a time."""
    columns = {name: plgpu.load(ref.at[at]) for name, ref in scales.items() if name in ("w_scale",)}
    columns |= {"sums": sums[-1]} if "x_lo" in scales else {}
    rows = {name: ref for name, ref in scales.items() if name not in columns}
    whole = jax.tree.map(
        lambda ref: plgpu.load(ref.at[at]), dataclasses.replace(epilogue, residual=None)
    )
    for m in range(out_ref.shape[0]):
        row = pl.ds(m, 1)
        values = columns | {name: plgpu.load(ref.at[row]) for name, ref in rows.items()}
        before, product = jax.tree.map(
            lambda ref: plgpu.load(ref.at[row, at]),  # noqa: B023 (called at once)
            (epilogue.residual, added),
        )
        y = triton.finish(
            sums[m][None, :], values, dataclasses.replace(whole, residual=before), product
        )
        plgpu.store(out_ref.at[row, at], y)


def _steps(shifts: jax.Array, shape: tuple[int, ...], step: str) -> jax.Array:
    """Return the step of each word, int32 [rows, blocks, words], of two groups a block."""
    shifts = jnp.broadcast_to(shifts.astype(jnp.int32)[..., None], shape)
    second = lax.broadcasted_iota(jnp.int32, shape, 2) >= shape[2] // 2
    return triton.step_of(jnp.where(second, shifts >> 4, shifts & 15), step)


def _decode(words: jax.Array, steps: jax.Array, levels: str) -> list[jax.Array]:
    """Decode words of eight codes to two words of four int8 each, int32 of their shape."""
    return [
        plgpu.elementwise_inline_asm(
            triton.decoding(levels, (half,)),
            args=[words, steps],
            constraints="=r,r,r",
            pack=1,
            result_shape_dtypes=(jax.ShapeDtypeStruct(words.shape, jnp.int32),),
        )[0]
        for half in range(2)
    ]


def _decode_jnp(words: jax.Array, steps: jax.Array, levels: str) -> list[jax.Array]:
    """Do what `_decode` does in interpret mode."""
    return [triton.decoding_jnp(words, steps, first, 4, levels) for first in (0, 4)]


def _dot(a: jax.Array, b: jax.Array, acc: jax.Array) -> jax.Array:
    """Return acc plus the dot of each word's four int8, int32."""
    return plgpu.elementwise_inline_asm(
        "dp4a.s32.s32 $0, $1, $2, $3;",
        args=[a, b, acc],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=(jax.ShapeDtypeStruct(acc.shape, jnp.int32),),
    )[0]


def _dot_jnp(a: jax.Array, b: jax.Array, acc: jax.Array) -> jax.Array:
    """Do what `_dot` does where there is no dp4a: in interpret mode."""
    for byte in range(4):
        acc += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return acc
