"""Quantized matmul for any NVIDIA GPU with int8 tensor cores, through Triton.

The weights are decoded to int8 ahead, by a kernel that moves nothing but them, and multiplied by a
plain int8 kernel with the epilogue inside. For few rows see `triton_few_rows`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import codec, device
from pallas_kernels.matmul import images, reference, tuned
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows

BAND = 8  # tiles of x that meet the same tiles of w before the next ones do
DECODE_ROWS = 4  # weight rows of a program of the decoding kernel
DECODE_BYTES = 1024  # bytes of codes of each of them, at most
_OF_X = ("x_scale", "x_lo")  # of the scales, those of rows of x

# Bytes that the low three bits of a code choose, two words: of codes from 0 up, and the magnitudes
# of codes from -8 up.
TABLES = {
    "uniform": ((0x03020100, 0x07060504), (0x05060708, 0x01020304)),
    "stretched": ((0x03020100, 0x09070504), (0x05070900, 0x01020304)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes of the plain kernel."""

    tile_m: int = 128  # rows of x
    tile_n: int = 128  # rows of w
    tile_k: int = 128  # bytes of k of a step
    warps: int = 4
    stages: int = 3  # steps in flight


def matmul(
    x: Int8Rows,  # [m, k]
    w: Int8Rows | PackedRows,  # [n, k]
    epilogue: Epilogue,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Decode the weights, then multiply; see `pallas_kernels.matmul.matmul`."""
    if isinstance(w, PackedRows):
        w = Int8Rows(values=decode(w, interpret=interpret)[:, : x.k], scale=w.scale)
    return _call(x, w, epilogue, config=config, interpret=interpret)


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _call(
    x: Int8Rows,  # [m, k]
    w: Int8Rows,  # [n, k]
    epilogue: Epilogue,
    *,
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    (m, k), n = x.shape, w.shape[0]
    config = config or Config(**tuned.lookup("triton_int8", m, n, k) or {})
    tile = config.tile_m, config.tile_n
    x, epilogue, crop = images.apart(x, epilogue, config.tile_m)
    rows = x.shape[0] // epilogue.images
    sums = None if x.lo is None else jnp.sum(w.values, axis=1, dtype=jnp.int32)
    scales = pad_scales(x, w.scale, sums, *tile)
    epilogue = pad_epilogue(epilogue, *tile)
    values = (
        pad(x.values, config.tile_m, config.tile_k),
        pad(w.values, config.tile_n, config.tile_k),
    )
    m_tiles, n_tiles = values[0].shape[0] // config.tile_m, values[1].shape[0] // config.tile_n
    walk = functools.partial(_walk, m_tiles=m_tiles, n_tiles=n_tiles)
    width = values[0].shape[1]
    y = pl.pallas_call(
        functools.partial(_kernel, tile_k=config.tile_k),
        out_shape=jax.ShapeDtypeStruct(
            (m_tiles * config.tile_m, n_tiles * config.tile_n), epilogue.out_dtype
        ),
        grid=(m_tiles * n_tiles,),
        in_specs=[
            pl.BlockSpec((config.tile_m, width), lambda i: (walk(i)[0], 0)),
            pl.BlockSpec((config.tile_n, width), lambda i: (walk(i)[1], 0)),
            scale_specs(scales, *tile, walk),
            epilogue_specs(epilogue, *tile, walk, rows),
        ],
        out_specs=pl.BlockSpec(tile, walk),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="matmul_int8",
    )(*values, scales, epilogue)
    return crop(y)[:, :n]


def decoding(
    levels: str,
    halves: tuple[int, ...],  # 0 for a word's first four codes, 1 for the others
) -> str:
    """Return assembly from a word of eight codes and their step to words of four int8.

    The arithmetic is that of `mosaic_gpu`: permutes look up the positive and the negative codes.
    """
    positive, negative = (", ".join(map(hex, table)) for table in TABLES[levels])
    word, step = (f"${len(halves) + i}" for i in range(2))
    lines = [f"and.b32 p, {step}, 255; xor.b32 f, {word}, 0x88888888;"]
    for half in halves:
        lines.append(
            f"shr.u32 a{half}, {word}, {16 * half}; shr.u32 b, f, {16 * half}; "
            f"prmt.b32 a{half}, {positive}, a{half}; prmt.b32 b, {negative}, b; "
            f"sub.u32 a{half}, a{half}, b; mad.lo.u32 a{half}, a{half}, p, 0x80808080;"
        )
    # Written last, since a result may share its register with the word or the step.
    lines += [f"xor.b32 ${i}, a{half}, 0x80808080;" for i, half in enumerate(halves)]
    return "\n".join(["{", ".reg .b32 p, f, a0, a1, b;", *lines, "}"])


def decoding_jnp(
    codes: jax.Array,  # integers, any number of codes each
    step: jax.Array,  # int32, of their shape
    first: int,  # code of each that comes first
    count: int,  # codes
    levels: str,
) -> jax.Array:
    """Return the int8 of some codes as the bytes of an int32: for interpret mode."""
    joined = jnp.zeros(codes.shape, jnp.int32)
    for i in range(count):
        code = ((codes.astype(jnp.int32) >> 4 * (first + i) & 15) ^ 8) - 8
        joined |= (codec.level_of(code, levels) * step & 255) << 8 * i
    return joined


@functools.partial(jax.jit, static_argnames=("interpret",))
def decode(
    w: PackedRows,  # [n, k]
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return the decoded weights, int8 [n, k padded to groups or a little more, zeros]."""
    codes, shifts, group_size = w.codes, w.shifts, w.group_size
    rows = codes.shape[0]
    # A byte of shifts serves two groups: group_size bytes of codes.
    codes, shifts = pad(codes, DECODE_ROWS, group_size), pad(shifts, DECODE_ROWS, 1)
    blocks = shifts.shape[1]
    part = min(max(DECODE_BYTES // group_size, 1), blocks & -blocks)
    codes = codes.reshape(codes.shape[0], blocks, group_size)
    spec = pl.BlockSpec((DECODE_ROWS, part, group_size), lambda i, j: (i, j, 0))
    pairs = pl.pallas_call(
        functools.partial(_decode_kernel, step=w.step, levels=w.levels, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(codes.shape, jnp.int16),
        grid=(codes.shape[0] // DECODE_ROWS, blocks // part),
        in_specs=[spec, pl.BlockSpec((DECODE_ROWS, part), lambda i, j: (i, j))],
        out_specs=spec,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="decode",
    )(codes, shifts)
    return lax.bitcast_convert_type(pairs, jnp.int8).reshape(codes.shape[0], -1)[:rows]


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def dequantize(
    w: PackedRows,  # [n, k]
    dtype: Any,  # of 16 bits
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return decoded weights times their scale, [n, k]; see `dequantize.dequantize`."""
    n, group_size = w.shape[0], w.group_size
    codes, shifts = pad(w.codes, DECODE_ROWS, group_size), pad(w.shifts, DECODE_ROWS, 1)
    scale = codec.pad(w.scale[:, 0], DECODE_ROWS)
    blocks = shifts.shape[1]
    part = min(max(DECODE_BYTES // group_size, 1), blocks & -blocks)
    codes = codes.reshape(codes.shape[0], blocks, group_size)
    spec = pl.BlockSpec((DECODE_ROWS, part, group_size), lambda i, j: (i, j, 0))
    pairs = pl.pallas_call(
        functools.partial(
            _dequantize_kernel, step=w.step, levels=w.levels, dtype=dtype, interpret=interpret
        ),
        out_shape=jax.ShapeDtypeStruct(codes.shape, jnp.int32),
        grid=(codes.shape[0] // DECODE_ROWS, blocks // part),
        in_specs=[
            spec,
            pl.BlockSpec((DECODE_ROWS, part), lambda i, j: (i, j)),
            pl.BlockSpec((DECODE_ROWS,), lambda i, j: (i,)),
        ],
        out_specs=spec,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="dequantize",
    )(codes, shifts, scale)
    return lax.bitcast_convert_type(pairs, dtype).reshape(codes.shape[0], -1)[:n, : w.k]


def dequantize_why_not(target: device.Device, w: Int8Rows | PackedRows, dtype: Any) -> str | None:
    """Say why the device can't run `dequantize` with these arguments, or return None."""
    if reason := device.triton_why_not(target):
        return reason
    if not isinstance(w, PackedRows):
        return "decodes 4-bit weights, not int8"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"writes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if w.size > device.TRITON_MAX_BYTES:
        return f"takes up to 2**31 - 1 elements, not {w.shape}"
    return "needs at least one element" if 0 in w.shape else None


def why_not(target: device.Device, x: Int8Rows, w: Any, epilogue: Epilogue) -> str | None:
    """Say why the device can't run these kernels with these arguments, or return None."""
    if reason := device.triton_why_not(target):
        return reason
    if max(x.size, w.size) > device.TRITON_MAX_BYTES:
        return f"takes up to 2**31 - 1 elements of x and of w, not {x.shape} and {w.shape}"
    if epilogue.branch is not None and epilogue.branch.up.dtype.itemsize != 2:
        return f"needs a branch of 16-bit floats, not {epilogue.branch.up.dtype}"
    return "needs at least one element" if 0 in (*x.shape, *w.shape) else None


def pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Append zeros to both axes, up to multiples."""
    missing = [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def pad_scales(
    x: Int8Rows,  # [m, k]
    w_scale: jax.Array,  # [n, 1]
    sums: jax.Array | None,  # [n], int32
    tile_m: int,
    tile_n: int,
) -> dict[str, jax.Array]:
    """Return what scales a tile of sums, flat and padded; see `_OF_X` for which are of rows."""
    rows = {"x_scale": x.scale} | ({} if x.lo is None else {"x_lo": x.lo})
    columns = {"w_scale": w_scale} | ({} if sums is None else {"sums": sums})
    padded = {name: codec.pad(array.reshape(-1), tile_m) for name, array in rows.items()}
    return padded | {name: codec.pad(a.reshape(-1), tile_n) for name, a in columns.items()}


def pad_epilogue(epilogue: Epilogue, tile_m: int, tile_n: int) -> Epilogue:
    """Return an epilogue of float32 columns, its arrays padded to whole tiles."""

    def column(array):
        return None if array is None else codec.pad(array.astype(jnp.float32), tile_n)

    branch, residual, gate = epilogue.branch, epilogue.residual, epilogue.gate
    if epilogue.images == 1 and gate is not None:
        gate = gate.reshape(-1)
    if branch is not None:
        rank = max(16, pl.next_power_of_2(branch.up.shape[1]))  # what Triton multiplies
        branch = Branch(input=pad(branch.input, tile_m, rank), up=pad(branch.up, tile_n, rank))
    return dataclasses.replace(
        epilogue,
        bias=column(epilogue.bias),
        gate=column(gate),
        residual=None if residual is None else pad(residual, tile_m, tile_n),
        branch=branch,
    )


def scale_specs(
    scales: dict[str, jax.Array], tile_m: int, tile_n: int, walk: Callable
) -> dict[str, pl.BlockSpec]:
    """Return the blocks of `pad_scales`' arrays for a walk from program to tiles of m and n."""
    row = pl.BlockSpec((tile_m,), lambda i: (walk(i)[0],))
    column = pl.BlockSpec((tile_n,), lambda i: (walk(i)[1],))
    return {name: row if name in _OF_X else column for name in scales}


def epilogue_specs(
    epilogue: Epilogue,
    tile_m: int,
    tile_n: int,
    walk: Callable,
    rows: int,  # of an image, whole tiles if there are several
) -> Epilogue:
    """Return the blocks of `pad_epilogue`'s arrays, in an epilogue."""
    block: Any = pl.BlockSpec  # stands where an array will
    column = block((tile_n,), lambda i: (walk(i)[1],))

    def of_image(i):
        return walk(i)[0] * tile_m // rows, walk(i)[1]

    gate = column if epilogue.images == 1 else block((None, tile_n), of_image)
    specs = {"bias": column, "gate": gate, "residual": block((tile_m, tile_n), walk)}
    if epilogue.branch is not None:
        rank = epilogue.branch.up.shape[1]
        specs["branch"] = Branch(
            input=block((tile_m, rank), lambda i: (walk(i)[0], 0)),
            up=block((tile_n, rank), lambda i: (walk(i)[1], 0)),
        )
    given = {name: spec for name, spec in specs.items() if getattr(epilogue, name) is not None}
    return dataclasses.replace(epilogue, **given)


def finish(
    acc: jax.Array,  # [rows, columns], int32
    scales: dict[str, jax.Array],  # tiles of `pad_scales`' arrays
    epilogue: Epilogue,  # tiles of `pad_epilogue`'s arrays
    added: jax.Array | None = None,  # [rows, columns], float32: the product of a branch
) -> jax.Array:
    """Return the result of a tile of sums."""
    y = reference.scale_sums(
        acc,
        x_scale=scales["x_scale"][:, None],
        w_scale=scales["w_scale"][None, :],
        x_lo=scales["x_lo"][:, None] if "x_lo" in scales else None,
        column=scales["sums"][None, :] if "sums" in scales else None,
    )
    return reference.finish(y if added is None else y + added, epilogue)


def step_of(nibbles: jax.Array, step: str) -> jax.Array:
    """Return the steps that stored shifts stand for, int32."""
    return nibbles + 1 if step == "integer" else 1 << nibbles


def _kernel(
    x_ref,  # [tile_m, k], int8
    w_ref,  # [tile_n, k], int8
    scales,  # of the tile's rows and columns
    epilogue,  # the same
    out_ref,  # [tile_m, tile_n]
    *,
    tile_k: int,
):
    def accumulate(i, acc):
        span = pl.ds(i * tile_k, tile_k)
        x, w = plgpu.load(x_ref.at[:, span]), plgpu.load(w_ref.at[:, span])
        return acc + jnp.dot(x, w.T, preferred_element_type=jnp.int32)

    acc = jnp.zeros(out_ref.shape, jnp.int32)
    acc = lax.fori_loop(0, x_ref.shape[1] // tile_k, accumulate, acc)
    scales, epilogue = jax.tree.map(lambda ref: ref[...], (scales, epilogue))
    out_ref[...] = finish(acc, scales, epilogue)


def _decode_kernel(
    codes_ref,  # [rows, blocks, group_size], uint8
    shifts_ref,  # [rows, blocks], uint8: of two groups each
    out_ref,  # [rows, blocks, group_size], int16: two int8 each
    *,
    step: str,
    levels: str,
    interpret: bool,
):
    codes = codes_ref[...]
    steps = _steps_of(shifts_ref[...], codes.shape, step, jnp.uint8)
    if interpret:
        pairs = decoding_jnp(codes, steps.astype(jnp.int32), 0, 2, levels)
        out_ref[...] = pairs.astype(jnp.int16)
        return
    out_ref[...] = plgpu.elementwise_inline_asm(
        decoding(levels, (0, 1)),
        args=[codes, steps],
        constraints="=r,=r,r,r",
        pack=4,
        result_shape_dtypes=(jax.ShapeDtypeStruct(codes.shape, jnp.int16),),
    )[0]


def _steps_of(shifts: jax.Array, shape: tuple[int, ...], step: str, dtype) -> jax.Array:
    """Return the step of each byte of codes, [rows, blocks, group_size], of two groups a block."""
    wide = shifts.astype(jnp.int32)
    both = [step_of(s, step).astype(dtype)[..., None] for s in (wide & 15, wide >> 4)]
    second = lax.broadcasted_iota(jnp.int32, shape, 2) >= shape[2] // 2
    first, last = (jnp.broadcast_to(s, shape) for s in both)
    return jnp.where(second, last, first)


def _dequantize_kernel(
    codes_ref,  # [rows, blocks, group_size], uint8
    shifts_ref,  # [rows, blocks], uint8: of two groups each
    scale_ref,  # [rows], float32
    out_ref,  # [rows, blocks, group_size], int32: two 16-bit floats each
    *,
    step: str,
    levels: str,
    dtype: Any,
    interpret: bool,
):
    codes = codes_ref[...]
    steps = _steps_of(shifts_ref[...], codes.shape, step, jnp.float32)
    scale = jnp.broadcast_to(scale_ref[...][:, None, None], codes.shape)
    if interpret:
        nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1).astype(jnp.int32)
        level = codec.level_of((nibbles ^ 8) - 8, levels).astype(jnp.float32)
        pairs = (level * steps[..., None] * scale[..., None]).astype(dtype)
        out_ref[...] = lax.bitcast_convert_type(pairs, jnp.int32)
        return
    out_ref[...] = plgpu.elementwise_inline_asm(
        dequantizing(levels, dtype),
        args=[codes, steps, scale],
        constraints="=r,=r,=r,=r,r,f,f,f,f,f,f,f,f",
        pack=4,
        result_shape_dtypes=(jax.ShapeDtypeStruct(codes.shape, jnp.int32),),
    )[0]


def dequantizing(levels: str, dtype: Any) -> str:
    """Return assembly from eight codes ($4), their step ($5) and scale ($9) to words of two floats.

    Levels plus 128, bytes, are found as in `decoding`; below the bits of 2**23 they are floats.
    Level times step is exact, times the scale it is rounded to float32 and then to the dtype.
    """
    positive, negative = (", ".join(map(hex, table)) for table in TABLES[levels])
    convert = "cvt.rn.bf16x2.f32" if dtype == jnp.bfloat16 else "cvt.rn.f16x2.f32"
    lines = ["xor.b32 f, $4, 0x88888888;"]
    for half in range(2):
        lines.append(
            f"shr.u32 a{half}, $4, {16 * half}; shr.u32 b, f, {16 * half}; "
            f"prmt.b32 a{half}, {positive}, a{half}; prmt.b32 b, {negative}, b; "
            f"sub.u32 a{half}, a{half}, b; add.u32 a{half}, a{half}, 0x80808080;"
        )
    for i in range(4):
        half, first = divmod(2 * i, 4)
        for name, at in (("x", first), ("y", first + 1)):
            lines.append(
                f"prmt.b32 b, a{half}, 0x4B000000, 0x765{at}; mov.b32 {name}, b; "
                f"sub.rn.f32 {name}, {name}, 0f4B000080; mul.rn.f32 {name}, {name}, $5; "
                f"mul.rn.f32 {name}, {name}, $9;"
            )
        lines.append(f"{convert} w{i}, y, x;")
    # Written last, since a result may share its register with what is still read.
    lines += [f"mov.b32 ${i}, w{i};" for i in range(4)]
    registers = ".reg .b32 f, a0, a1, b, w0, w1, w2, w3; .reg .f32 x, y;"
    return "\n".join(["{", registers, *lines, "}"])


def _walk(i: jax.Array, m_tiles: int, n_tiles: int) -> tuple[jax.Array, jax.Array]:
    """Return the tile of rows and of columns of a program, in bands of BAND tiles of rows."""
    first = i // (BAND * n_tiles) * BAND
    height = jnp.minimum(m_tiles - first, BAND)
    rest = i % (BAND * n_tiles)
    return first + rest % height, rest // height
