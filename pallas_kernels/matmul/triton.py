"""Quantized matmul for any NVIDIA GPU with int8 tensor cores, through Triton.

The weights are decoded to int8 ahead, by a kernel that moves nothing but them, and multiplied by a
plain int8 kernel with the epilogue inside. For few rows see `triton_few_rows`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import codec, device
from pallas_kernels.matmul import reference, tuned

BAND = 8  # tiles of x that meet the same tiles of w before the next ones do
DECODE_ROWS = 4  # weight rows of a program of the decoding kernel
DECODE_BYTES = 1024  # bytes of codes of each of them, at most

# Eight int8 from a register of four bytes of codes and one of four equal steps: `mosaic_gpu` has
# the arithmetic. The last two instructions put low and high nibbles back in turn.
_DECODE = """{
.reg .b32 p, o, l, h;
and.b32 p, $3, 255; mul.lo.u32 o, p, 0x08080808; sub.u32 o, 0x80808080, o;
and.b32 l, $2, 0x0F0F0F0F; xor.b32 l, l, 0x08080808;
mad.lo.u32 l, l, p, o; xor.b32 l, l, 0x80808080;
shr.u32 h, $2, 4; and.b32 h, h, 0x0F0F0F0F; xor.b32 h, h, 0x08080808;
mad.lo.u32 h, h, p, o; xor.b32 h, h, 0x80808080;
prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362;
}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes of the plain kernel."""

    tile_m: int = 128  # rows of x
    tile_n: int = 128  # rows of w
    tile_k: int = 128  # bytes of k of a step
    warps: int = 4
    stages: int = 3  # steps in flight


def matmul(
    x: jax.Array,  # [m, k], int8
    w_codes: jax.Array,  # [n, k_padded / 2], uint8
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    group_size: int,
    step: str,
    interpret: bool = False,
    **options,  # of `matmul_int8`
) -> jax.Array:
    """Decode the weights, then multiply; see `pallas_kernels.matmul.matmul`."""
    w = decode(w_codes, w_shifts, group_size=group_size, step=step, interpret=interpret)
    return matmul_int8(x, w[:, : x.shape[1]], x_scale, w_scale, interpret=interpret, **options)


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("activation", "out_dtype", "config", "interpret"))
def matmul_int8(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    x_lo: jax.Array | None = None,  # [m, 1], float32
    activation: str | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
    **columns: jax.Array | None,  # bias and gate [n], residual [m, n]
) -> jax.Array:
    """Multiply int8 by int8; see `pallas_kernels.matmul.matmul_int8`."""
    m, n = x.shape[0], w.shape[0]
    config = config or Config(**tuned.lookup("triton_int8", m, n, x.shape[1]) or {})
    tile = config.tile_m, config.tile_n
    sums = None if x_lo is None else jnp.sum(w, axis=1, dtype=jnp.int32)
    given = {"x_scale": x_scale, "x_lo": x_lo, "w_scale": w_scale, "sums": sums} | columns
    given = pad_epilogue(given, *tile)
    x, w = pad(x, config.tile_m, config.tile_k), pad(w, config.tile_n, config.tile_k)
    m_tiles, n_tiles = x.shape[0] // config.tile_m, w.shape[0] // config.tile_n
    walk = functools.partial(_walk, m_tiles=m_tiles, n_tiles=n_tiles)
    y = pl.pallas_call(
        functools.partial(_kernel, tile_k=config.tile_k, activation=activation),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), out_dtype),
        grid=(m_tiles * n_tiles,),
        in_specs=[
            pl.BlockSpec((config.tile_m, x.shape[1]), lambda i: (walk(i)[0], 0)),
            pl.BlockSpec((config.tile_n, x.shape[1]), lambda i: (walk(i)[1], 0)),
            epilogue_specs(given, *tile, walk),
        ],
        out_specs=pl.BlockSpec(tile, walk),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="matmul_int8",
    )(x, w, given)
    return y[:m, :n]


@functools.partial(jax.jit, static_argnames=("group_size", "step", "interpret"))
def decode(
    codes: jax.Array,  # [n, k_padded / 2], uint8
    shifts: jax.Array,  # [n, ceil(groups / 2)], uint8
    *,
    group_size: int,
    step: str,
    interpret: bool = False,
) -> jax.Array:
    """Return the decoded weights, int8 [n, k_padded or a little more, zeros]."""
    rows = codes.shape[0]
    # A byte of shifts serves two groups: group_size bytes of codes.
    codes, shifts = pad(codes, DECODE_ROWS, group_size), pad(shifts, DECODE_ROWS, 1)
    blocks = shifts.shape[1]
    part = min(max(DECODE_BYTES // group_size, 1), blocks & -blocks)
    codes = codes.reshape(codes.shape[0], blocks, group_size)
    spec = pl.BlockSpec((DECODE_ROWS, part, group_size), lambda i, j: (i, j, 0))
    pairs = pl.pallas_call(
        functools.partial(_decode_kernel, step=step, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(codes.shape, jnp.int16),
        grid=(codes.shape[0] // DECODE_ROWS, blocks // part),
        in_specs=[spec, pl.BlockSpec((DECODE_ROWS, part), lambda i, j: (i, j))],
        out_specs=spec,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="decode",
    )(codes, shifts)
    return lax.bitcast_convert_type(pairs, jnp.int8).reshape(codes.shape[0], -1)[:rows]


def why_not(target: device.Device, x: jax.Array, w: jax.Array, *args, **kwargs) -> str | None:
    """Say why the device can't run these kernels with these arguments, or return None."""
    if reason := device.triton_why_not(target):
        return reason
    if max(x.shape[0] * x.shape[1], w.shape[0] * w.shape[1]) > device.TRITON_MAX_BYTES:
        return f"takes up to 2**31 - 1 elements of x and of w, not {x.shape} and {w.shape}"
    return "needs at least one element" if 0 in (*x.shape, *w.shape) else None


def pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Append zeros to both axes, up to multiples."""
    missing = [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def pad_epilogue(
    given: dict[str, jax.Array | None], tile_m: int, tile_n: int
) -> dict[str, jax.Array]:
    """Flatten and pad the epilogue's arrays that are given; `residual` alone has two axes."""
    padded = {}
    for name, array in given.items():
        if name == "residual" and array is not None:
            padded[name] = pad(array, tile_m, tile_n)
        elif array is not None:
            flat = array if name == "sums" else array.astype(jnp.float32)
            padded[name] = codec.pad(flat.reshape(-1), tile_m if _of_x(name) else tile_n)
    return padded


def epilogue_specs(
    given: dict[str, jax.Array], tile_m: int, tile_n: int, walk: Callable
) -> dict[str, pl.BlockSpec]:
    """Return the blocks of the epilogue's arrays for a walk from program to tiles of m and n."""

    def spec(name):
        if name == "residual":
            return pl.BlockSpec((tile_m, tile_n), walk)
        if _of_x(name):
            return pl.BlockSpec((tile_m,), lambda i: (walk(i)[0],))
        return pl.BlockSpec((tile_n,), lambda i: (walk(i)[1],))

    return {name: spec(name) for name in given}


def epilogue(
    acc: jax.Array,  # [rows, columns], int32
    given: dict[str, jax.Array],  # tiles of `pad_epilogue`'s arrays
    activation: str | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return the result of a tile of sums; see `reference.epilogue`."""
    x_scale, w_scale = given["x_scale"][:, None], given["w_scale"][None, :]
    if "x_lo" not in given:
        y = acc.astype(jnp.float32) * x_scale * w_scale
    else:
        column = given["sums"][None, :]
        y = (acc + 128 * column).astype(jnp.float32) * x_scale * w_scale
        y += (given["x_lo"][:, None] * w_scale) * column.astype(jnp.float32)
    rest = {name: given[name][None, :] for name in ("bias", "gate") if name in given}
    rest["residual"] = given.get("residual")
    return reference.finish(y, activation=activation, out_dtype=dtype, **rest)


def step_of(nibbles: jax.Array, step: str) -> jax.Array:
    """Return the steps that stored shifts stand for, int32."""
    return nibbles + 1 if step == "integer" else 1 << nibbles


def _of_x(name: str) -> bool:
    return name.startswith("x_")


def _kernel(
    x_ref,  # [tile_m, k], int8
    w_ref,  # [tile_n, k], int8
    given,  # of the tile's rows and columns
    out_ref,  # [tile_m, tile_n]
    *,
    tile_k: int,
    activation: str | None,
):
    def accumulate(i, acc):
        span = pl.ds(i * tile_k, tile_k)
        x, w = plgpu.load(x_ref.at[:, span]), plgpu.load(w_ref.at[:, span])
        return acc + jnp.dot(x, w.T, preferred_element_type=jnp.int32)

    acc = jnp.zeros(out_ref.shape, jnp.int32)
    acc = lax.fori_loop(0, x_ref.shape[1] // tile_k, accumulate, acc)
    given = {name: ref[...] for name, ref in given.items()}
    out_ref[...] = epilogue(acc, given, activation, out_ref.dtype)


def _decode_kernel(
    codes_ref,  # [rows, blocks, group_size], uint8
    shifts_ref,  # [rows, blocks], uint8: of two groups each
    out_ref,  # [rows, blocks, group_size], int16: two int8 each
    *,
    step: str,
    interpret: bool,
):
    codes, shifts = codes_ref[...], shifts_ref[...].astype(jnp.int32)
    steps = [step_of(s, step).astype(jnp.uint8)[..., None] for s in (shifts & 15, shifts >> 4)]
    second = lax.broadcasted_iota(jnp.int32, codes.shape, 2) >= codes.shape[2] // 2
    first, last = (jnp.broadcast_to(s, codes.shape) for s in steps)
    steps = jnp.where(second, last, first)
    if interpret:
        low, high = (((codes >> s & 15) ^ 8).astype(jnp.int32) - 8 for s in (0, 4))
        p = steps.astype(jnp.int32)
        out_ref[...] = (low * p & 255 | (high * p) << 8).astype(jnp.int16)
        return
    out_ref[...] = plgpu.elementwise_inline_asm(
        _DECODE,
        args=[codes, steps],
        constraints="=r,=r,r,r",
        pack=4,
        result_shape_dtypes=(jax.ShapeDtypeStruct(codes.shape, jnp.int16),),
    )[0]


def _walk(i: jax.Array, m_tiles: int, n_tiles: int) -> tuple[jax.Array, jax.Array]:
    """Return the tile of rows and of columns of a program, in bands of BAND tiles of rows."""
    first = i // (BAND * n_tiles) * BAND
    height = jnp.minimum(m_tiles - first, BAND)
    rest = i % (BAND * n_tiles)
    return first + rest % height, rest // height
