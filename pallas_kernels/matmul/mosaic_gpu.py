"""Quantized matmul for Hopper GPUs: wgmma on int8, 4-bit weights decoded in registers.

The product is made transposed. A tile of 128 weight rows is the first operand: from shared memory
if the weights are int8, from registers if they are 4 bits wide and decoded on the way; tokens are
the second, so one decoded weight serves `tokens` of them. One warpgroup copies tiles to shared
memory, two multiply 64 weight rows each; while a tile multiplies, the next one is decoded.
A branch is one more wgmma for each part of a tile that is written, of 16-bit floats.

A 32-bit register of the operand holds four consecutive k of one row. With c_b the four signed
levels and P the step of their group, sum_b c_b 256**b, times P, plus 0x80808080 has the bytes
c_b * P + 128, without a carry between them since |c_b * P| <= 127; flipping the top bits gives
c_b * P as int8. P is 2**shift or the integer step, so one kernel serves both. The sum of uniform
levels is four codes plus 8 as bytes, less 0x08080808. That of stretched levels is the difference
of two byte permutes of one table of eight bytes: four nibbles of sign and magnitude select the
levels of their magnitudes, except that a nibble whose top bit is set selects copies of the top bit
of a table byte, which are zeros; so one permute sees the positive codes and another, of flipped
top bits, the negative ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from pallas_kernels import codec, compat, device
from pallas_kernels.functions import gelu
from pallas_kernels.matmul import images, tuned
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows, int8_values

TILE_K = 128  # bytes of k in a tile: the widest swizzle of shared memory
ROWS = 64  # weight rows of a warpgroup: the first extent of wgmma
WARPGROUPS = 2  # that multiply
TILE_N = ROWS * WARPGROUPS
OUTPUT_TOKENS = 128  # tokens of a warpgroup's results that shared memory holds, at most
REGISTER_K = 16  # k of a row that the same register of its four threads holds
MAX_RANK = 128  # of a branch whose tiles fit shared memory beside the rest
SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper
# Tokens that both warpgroups multiply while one decodes stretched levels: with it the times of 192
# to 256 tokens at FLUX's shapes on an H200 stand to each other as measured within 5 %.
DECODING = 130
# Extents that integer wgmma takes as its second
TOKEN_TILES = (256, 240, 224, 208, 192, 176, 160, 128, 96, 64, 32, 16, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes of one call."""

    tokens: int  # tokens of a tile, a multiple of 8, at most 256
    stages: int  # tiles of k in flight
    snake: int = 8  # row tiles that share a band of the walk over the output


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tiles", "scale", "column_sums"],
    meta_fields=["n", "k", "levels"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledWeights:
    """Weights in the kernel's order; see `prepare`.

    The tiles are 4-bit codes and steps in the order in which the kernel's threads read them:
    int32 [n_tiles, k_tiles, 16, 128], eight codes a word, and int32 [n_tiles, k_tiles, 1, 128],
    step minus 1 of 16 k, eight a word, or [n_tiles, k_tiles, 2, 128] for groups of 8, those of
    the first and of the second half of each 16 k; or int8 [n padded, k padded] alone.
    """

    tiles: tuple[jax.Array, ...]
    scale: jax.Array  # float32 [n, 1]
    column_sums: jax.Array  # int32 [n]: sum over k of the decoded weights
    n: int  # weight rows
    k: int  # contraction length
    levels: str  # of the codes: "uniform" or "stretched"


def prepare(
    w: Int8Rows | PackedRows,  # [n, k]
) -> TiledWeights:
    """Reorder weights for the kernel and sum their columns: once, at load time."""
    sums = jnp.sum(int8_values(w), axis=1, dtype=jnp.int32)
    tiles = _tile_packed(w) if isinstance(w, PackedRows) else (_pad(w.values, TILE_N, TILE_K),)
    n, k = w.shape
    levels = w.levels if isinstance(w, PackedRows) else "uniform"
    return TiledWeights(tiles=tiles, scale=w.scale, column_sums=sums, n=n, k=k, levels=levels)


def _tile_packed(w: PackedRows) -> tuple[jax.Array, jax.Array]:
    """Reorder packed weights.

    Thread t of a warpgroup holds rows 16 (t // 32) + t % 32 // 4 and 8 further, and of each 32 k
    those from 4 (t % 4) and from 16 further. A word holds these eight codes: plus 8, the first four
    k in the low nibbles of its bytes; or for stretched levels a sign bit above the magnitude, in
    order.
    """
    codes = codec.unpack(w.codes, signed=True).astype(jnp.int32)
    groups = codec.unpack(w.shifts, signed=False)[:, : codes.shape[1] // w.group_size]
    groups = groups.astype(jnp.int32)
    steps = groups if w.step == "integer" else (1 << groups) - 1
    halves = REGISTER_K // min(w.group_size, REGISTER_K)
    steps = jnp.repeat(steps, max(w.group_size // REGISTER_K, 1), axis=1)
    stretched = w.levels == "stretched"
    codes = _pad(codes, TILE_N, TILE_K)
    nibbles = jnp.where(codes < 0, 8 - codes, codes) if stretched else codes + 8
    steps = _pad(steps, TILE_N, TILE_K // REGISTER_K * halves)
    n_tiles, k_tiles = nibbles.shape[0] // TILE_N, nibbles.shape[1] // TILE_K
    # n: tile, warpgroup, warp, half, row; k: tile, pair, step of 32, half, quad, byte
    nibbles = nibbles.reshape(n_tiles, WARPGROUPS, 4, 2, 8, k_tiles, 2, 2, 2, 4, 4)
    nibbles = nibbles.transpose(0, 5, 1, 6, 2, 4, 9, 7, 3, 8, 10)
    half, byte = (16, 4) if stretched else (4, 8)
    words = _join(nibbles.reshape(*nibbles.shape[:-2], 8), _offsets(2, half, 4, byte))
    steps = steps.reshape(n_tiles, TILE_N, k_tiles, TILE_K // REGISTER_K, halves)
    steps = _join(steps.transpose(0, 2, 4, 1, 3), range(0, 32, 4))
    return words.reshape(n_tiles, k_tiles, TILE_N // 8, 128), steps


def _offsets(first: int, stride: int, second: int, step: int) -> list[int]:
    """Return the bit offsets of fields [first, second], flat."""
    return [stride * i + step * j for i in range(first) for j in range(second)]


def _pad(x: jax.Array, rows: int, columns: int, value: int = 0) -> jax.Array:
    missing = [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)]
    return jnp.pad(x, missing, constant_values=value)


def _join(fields: jax.Array, offsets) -> jax.Array:
    """Join the last axis to one int32, element i at bit offsets[i]."""
    bits = fields.astype(jnp.uint32) << jnp.array(offsets, jnp.uint32)
    return lax.bitcast_convert_type(jnp.sum(bits, axis=-1, dtype=jnp.uint32), jnp.int32)


def matmul(
    x: Int8Rows,  # [m, k]
    w: Int8Rows | PackedRows,  # [n, k]
    epilogue: Epilogue,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Reorder the weights, then multiply; see `pallas_kernels.matmul.matmul`.

    The reordering costs a pass over the weights: callers that multiply more than once should keep
    what `prepare` returns and call `matmul_prepared`.
    """
    return matmul_prepared(x, prepare(w), epilogue, config=config, interpret=interpret)


def why_not(target: device.Device, x: Int8Rows, w: Any, epilogue: Epilogue) -> str | None:
    """Say why the device can't run these kernels with these arguments, or return None."""
    if target.platform != "gpu" or target.generation != 90:
        return f"needs a Hopper GPU, not {target.kind}"
    dtype = jnp.dtype(epilogue.out_dtype)
    if dtype.itemsize != 2:
        return "writes 16-bit floats only"
    residual = epilogue.residual
    if residual is not None and residual.dtype != dtype:
        return f"needs a residual of {dtype}, what it writes, not {residual.dtype}"
    if epilogue.branch is not None:
        up = epilogue.branch.up
        if up.dtype.itemsize != 2 or up.shape[1] > MAX_RANK:
            return f"adds 16-bit branches of a rank up to {MAX_RANK}, not {up.dtype}{[*up.shape]}"
    return "needs at least one element" if 0 in (*x.shape, *w.shape) else None


def choose_config(m: int, n: int, *, decode: bool, rank: int = 0, sms: int = 132) -> Config:
    """Return the tiles that leave the fewest processors idle in the last wave.

    Args:
      m: rows of x.
      n: output channels.
      decode: whether the weights are 4-bit.
      rank: of the branch, 0 without one.
      sms: processors.
    """

    def cost(tokens: int) -> float:
        tiles = -(-m // tokens) * -(-n // TILE_N)
        # A warpgroup multiplies its half of a tile, then decodes: no more than the other's product
        # hides. Each tile pays about as much as 24 tokens for its start and end.
        taken = max(tokens, tokens / 2 + DECODING) if decode else tokens
        return -(-tiles // sms) * (taken + 24)

    fitting = [t for t in TOKEN_TILES if most_stages(t, decode=decode, rank=rank) >= 3]
    tokens = min(fitting, key=cost)
    most = most_stages(tokens, decode=decode, rank=rank)
    return Config(tokens=tokens, stages=min(4 if tokens > 64 else 16, most))


def most_stages(tokens: int, *, decode: bool, rank: int = 0) -> int:
    """Return how many tiles of k fit shared memory, a branch of padded rank beside them."""
    # Groups of 8 have twice the steps.
    weights = TILE_N * (TILE_K // 2 + 8) if decode else TILE_N * TILE_K
    branch = 2 * _padded_rank(rank) * (tokens + TILE_N)
    spare = SHARED_MEMORY - 2048 - WARPGROUPS * OUTPUT_TOKENS * ROWS * 2 - branch
    return max(spare, 0) // (TILE_K * tokens + weights)


def _padded_rank(rank: int) -> int:
    """Return whole rows of a swizzle: 32, or a multiple of 64."""
    return 32 if 0 < rank <= 32 else -(-rank // 64) * 64


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def matmul_prepared(
    x: Int8Rows,  # [m, k]
    w: TiledWeights,  # [n, k]
    epilogue: Epilogue,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply by prepared weights; see `pallas_kernels.matmul.matmul`."""
    (m, k), n, decode = x.shape, w.n, len(w.tiles) == 2
    sms = 2 if interpret else device.processors()
    rank = 0 if epilogue.branch is None else epilogue.branch.up.shape[1]
    if config is None and not interpret:
        found = tuned.lookup("mosaic_gpu" if decode else "mosaic_gpu_int8", m, n, k)
        config = Config(**found) if found else None
    config = config or choose_config(m, n, decode=decode, rank=rank, sms=sms)
    most = most_stages(config.tokens, decode=decode, rank=rank)
    config = dataclasses.replace(config, stages=min(config.stages, most))
    slots, part = _slots(config.tokens, epilogue.residual is not None)
    x, epilogue, crop = images.apart(x, epilogue, part)
    # Copies clip at the end of an array, but it must hold whole rows of the swizzle.
    row_unit = config.tokens if interpret else 8
    values = _pad(x.values, row_unit, TILE_K)
    # Neither do they clip along an axis of one tile, whose index they drop: there must be columns
    # for both warpgroups, or the second one would write its padding over the first one's results.
    columns = max(n + -n % ROWS, TILE_N)
    residual = epilogue.residual
    if residual is not None:
        residual = _pad(residual, row_unit, columns)
    branch = epilogue.branch
    if branch is not None:
        width = _padded_rank(rank)
        branch = Branch(
            input=_pad(branch.input, row_unit, width),
            up=jnp.pad(branch.up, [(0, columns - n), (0, -rank % width)]),
        )
    given = {"x_scale": x.scale, "x_lo": x.lo, "w_scale": w.scale}
    given |= {"sums": None if x.lo is None else w.column_sums}
    given |= {"bias": epilogue.bias, "gate": epilogue.gate}
    vectors = {
        name: _flat(array, config.tokens if name.startswith("x_") else TILE_N)
        for name, array in given.items()
        if array is not None
    }
    body = functools.partial(
        _kernel,
        config=config,
        rows=x.shape[0] // epilogue.images,
        images=epilogue.images,
        levels=w.levels,
        activation=epilogue.activation,
        interpret=interpret,
    )
    kernel = plgpu.kernel(
        compat.named(body, "matmul"),
        out_type=jax.ShapeDtypeStruct((values.shape[0], columns), epilogue.out_dtype),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(
            config, w.tiles, (slots, part), branch, epilogue.out_dtype, interpret
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=compat.gpu_interpret_params() if interpret else False,
    )
    y = kernel(values, w.tiles, vectors, residual, branch)
    return crop(y)[:, :n]


def _slots(tokens: int, residual: bool) -> tuple[int, int]:
    """Return how many parts of an output tile are on their way at once, and tokens of each.

    A residual comes into the slot that its result leaves from, two parts ahead.
    """
    slots = 4 if residual else 2
    limit = OUTPUT_TOKENS // slots
    return slots, max(part for part in range(8, limit + 1, 8) if tokens % part == 0)


def _flat(x: jax.Array, multiple: int) -> jax.Array:
    """Return float32, or int32 as it is, flat: an [n] or [n, 1] array, or rows [images, n].

    Each n is padded with zeros.
    """
    wide = x if x.dtype == jnp.int32 else x.astype(jnp.float32)
    rows = wide.reshape(1, -1) if x.ndim == 1 or x.shape[1] == 1 else wide
    return codec.pad(rows, multiple).reshape(-1)


def _scratch(
    config: Config,
    tiles: tuple[jax.Array, ...],
    output: tuple[int, int],
    branch: Branch | None,
    out_dtype: Any,
    interpret: bool,
) -> dict:
    def swizzled(columns, width=128):
        return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(width)

    def side(rows, like):  # of a branch
        columns = like.shape[1]
        row = min(columns, 64)
        transforms = swizzled(row, 2 * row)
        return plgpu.SMEM((rows, columns), like.dtype, transforms=transforms)

    stages, decode = config.stages, len(tiles) == 2
    if decode:
        weights = tuple(plgpu.SMEM((stages, *tile.shape[2:]), jnp.int32) for tile in tiles)
    else:
        weights = (plgpu.SMEM((stages, TILE_N, TILE_K), jnp.int8, transforms=swizzled(TILE_K)),)
    return {
        "x_tiles": plgpu.SMEM(
            (stages, config.tokens, TILE_K), jnp.int8, transforms=swizzled(TILE_K)
        ),
        "w_tiles": weights,
        "out_tiles": plgpu.SMEM(
            (WARPGROUPS, *output, ROWS),
            out_dtype,
            transforms=swizzled(ROWS),
        ),
        "filled": plgpu.Barrier(num_arrivals=1 + len(weights), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "added": plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS * output[0]),
        "branch_tiles": branch and (side(config.tokens, branch.input), side(TILE_N, branch.up)),
        "branch_filled": branch and plgpu.Barrier(num_arrivals=2),
        "branch_free": branch and plgpu.Barrier(num_arrivals=WARPGROUPS),
        # The interpreter's wgmma reads its first operand from memory only.
        "decoded": (plgpu.SMEM((WARPGROUPS, ROWS, TILE_K), jnp.int8),) * (decode and interpret),
    }


def _kernel(
    x,  # [m, k], int8
    weights,  # codes and steps, tiled as `TiledWeights` says; or [n, k]
    vectors,  # x_scale, x_lo [m padded]; w_scale, sums, bias, gate [n padded]; those given
    residual,  # [m, n padded] or None
    branch,  # input [m, rank] and up [n padded, rank], or None
    out,  # [m, n padded]
    *,
    config: Config,
    rows: int,  # of an image, whole parts if there are several
    images: int,  # whose gates follow each other
    levels: str,
    activation: str | None,
    interpret: bool,
    x_tiles,  # [stages, tokens, TILE_K]
    w_tiles,  # like weights, a tile for each stage
    out_tiles,  # [warpgroup, slots, part of tokens, ROWS]
    filled,
    free,
    added,  # [warpgroup * slots]: a part of the residual is there
    branch_tiles,  # input [tokens, rank] and up [TILE_N, rank], or None
    branch_filled,
    branch_free,
    decoded,  # [warpgroups, ROWS, TILE_K] where the interpreter wants it, else empty
):
    decode = len(weights) == 2
    tokens, stages = config.tokens, config.stages
    slots, part = out_tiles.shape[1:3]
    k_tiles = x.shape[1] // TILE_K
    grid = (vectors["w_scale"].shape[0] // TILE_N, pl.cdiv(out.shape[0], tokens))
    warpgroup, sms = lax.axis_index("warpgroup"), lax.axis_size("sm")

    def walk(body):
        """Run body(n_tile, m_tile, first step) over this processor's share of the tiles."""

        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
        def _(info):
            n_tile, m_tile = plgpu.planar_snake(info.index[0], grid, 0, config.snake)
            body(n_tile, m_tile, info.local_index * k_tiles)

    def slot_of(step):
        return lax.rem(step, jnp.array(stages, step.dtype))

    def fill(n_tile, m_tile, first):
        @pl.loop(0, k_tiles)
        def _(k_tile):
            step = first + k_tile
            slot = slot_of(step)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            span = pl.ds(k_tile * TILE_K, TILE_K)
            tile = x.at[pl.ds(m_tile * tokens, tokens), span]
            plgpu.copy_gmem_to_smem(tile, x_tiles.at[slot], filled.at[slot])
            for source, target in zip(weights, w_tiles, strict=True):
                rows = pl.ds(n_tile * TILE_N, TILE_N)
                tile = source.at[n_tile, k_tile] if decode else source.at[rows, span]
                plgpu.copy_gmem_to_smem(tile, target.at[slot], filled.at[slot])

        if branch is not None:
            # Behind the last tiles of k, by when the last results' branch has long been read.
            pl.when(first > 0)(lambda: plgpu.barrier_wait(branch_free))
            sides = (branch.input, m_tile * tokens, tokens), (branch.up, n_tile * TILE_N, TILE_N)
            for (source, start, size), target in zip(sides, branch_tiles, strict=True):
                plgpu.copy_gmem_to_smem(source.at[pl.ds(start, size)], target, branch_filled)

    def operand(step):
        """Wait for a tile of k and return this warpgroup's weights of it."""
        slot = slot_of(step)
        plgpu.barrier_wait(filled.at[slot])
        if not decode:
            return ()
        codes, steps = w_tiles
        part = TILE_N // 8 // WARPGROUPS
        words = compat.gpu_load(
            codes.at[slot, pl.ds(warpgroup * part, part)],
            layout=plgpu.Layout.WG_STRIDED((part, 128), vec_size=4),
        )
        steps = [
            compat.gpu_load(
                steps.at[slot, half, pl.ds(warpgroup * ROWS, ROWS)],
                layout=plgpu.Layout.WGMMA_8BIT.reduce(1),
            )
            for half in range(steps.shape[1])
        ]
        if not interpret:
            return decoder(levels, len(steps))(words, *steps)
        decoded[0][warpgroup] = decode_tile_jnp(words, jnp.stack(steps), levels)
        return ()

    def multiply_step(acc, weight, step, prefetch):
        slot = slot_of(step)
        if not decode:
            weight = w_tiles[0].at[slot, pl.ds(warpgroup * ROWS, ROWS)]
        elif interpret:
            weight = decoded[0].at[warpgroup]
        plgpu.wgmma(acc, weight, x_tiles.at[slot].transpose((1, 0)))
        following = operand(step + 1) if prefetch else None
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[slot])
        return following

    def multiply(n_tile, m_tile, first):
        row, token = n_tile * TILE_N + warpgroup * ROWS, m_tile * tokens
        if residual is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(min(slots // 2, tokens // part)):
                fetch(i, row, token)

        def dot(acc):
            # In pairs, so that a decoded tile never lands in registers that are being multiplied.
            def pair(i, weight):
                step = first + 2 * i
                weight = multiply_step(acc, weight, step, True)
                return multiply_step(acc, weight, step + 1, True)

            pairs = (k_tiles - 1) // 2
            weight = lax.fori_loop(0, pairs, pair, operand(first))
            for k_tile in range(2 * pairs, k_tiles):
                weight = multiply_step(acc, weight, first + k_tile, k_tile < k_tiles - 1)
            return acc[...]

        acc = pl.run_scoped(dot, plgpu.ACC((ROWS, tokens), jnp.int32))
        write(acc, row, token)

    def window(ref, i, row, token):
        return ref.at[pl.ds(token + i * part, part), pl.ds(row, ROWS)]

    def fetch(i, row, token):
        """Start to copy part i of the residual to its slot, which the last result has left."""
        slot = i % slots
        arrived = added.at[warpgroup * slots + slot]
        plgpu.copy_gmem_to_smem(
            window(residual, i, row, token), out_tiles.at[warpgroup, slot], arrived
        )

    def add_branch(y, i):
        """Add part i of the branch to a part of the results."""
        inputs, up = branch_tiles

        def product(sums):
            rows, columns = pl.ds(warpgroup * ROWS, ROWS), pl.ds(i * part, part)
            plgpu.wgmma(sums, up.at[rows], inputs.at[columns].transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return sums[...]

        return y + pl.run_scoped(product, plgpu.ACC((ROWS, part), jnp.float32))

    def write(acc, row, token):
        """Scale, round and write a tile of [ROWS, tokens] sums, transposed."""

        def load_rows(name, image=0):
            layout = plgpu.Layout.WGMMA.reduce(1)
            first = row + image * vectors["w_scale"].shape[0]
            ref = vectors[name].at[pl.ds(first, ROWS)]
            return compat.gpu_load(ref, layout=layout, optimized=False)

        def load_tokens(name, start):
            layout = plgpu.Layout.WGMMA.reduce(0)
            ref = vectors[name].at[pl.ds(start, part)]
            return compat.gpu_load(ref, layout=layout, optimized=False)

        def down(v):
            return lax.broadcast_in_dim(v, (ROWS, part), [0])

        def along(v):
            return lax.broadcast_in_dim(v, (ROWS, part), [1])

        once = vectors.keys() - (
            ("x_scale", "x_lo") if images == 1 else ("x_scale", "x_lo", "gate")
        )
        of_row = {name: load_rows(name) for name in sorted(once)}
        scale = of_row["w_scale"]
        if branch is not None:
            plgpu.barrier_wait(branch_filled)
        for i in range(tokens // part):
            start = token + i * part
            sum_ = acc[:, i * part : (i + 1) * part]
            if "x_lo" in vectors:
                sum_ = sum_ + down(128 * of_row["sums"])
            y = sum_.astype(jnp.float32) * along(load_tokens("x_scale", start)) * down(scale)
            if "x_lo" in vectors:
                lo = along(load_tokens("x_lo", start)) * down(scale)
                y = y + lo * down(of_row["sums"].astype(jnp.float32))
            if branch is not None:
                y = add_branch(y, i)
                if i == tokens // part - 1:
                    plgpu.barrier_arrive(branch_free)
            if "bias" in vectors:
                y = y + down(of_row["bias"])
            if activation == "gelu":
                y = gelu(y)
            if "gate" in vectors:
                gate = of_row.get("gate")
                if gate is None:
                    # Past the last row of all, results are dropped.
                    gate = load_rows("gate", jnp.minimum(start // rows, images - 1))
                y = y * down(gate)
            slot = out_tiles.at[warpgroup, i % slots]
            if residual is not None:
                plgpu.barrier_wait(added.at[warpgroup * slots + i % slots])
                before = compat.gpu_load(
                    slot.transpose((1, 0)), layout=plgpu.Layout.WGMMA_TRANSPOSED
                )
                before = plgpu.layout_cast(before, plgpu.Layout.WGMMA)
                y = y + before.astype(jnp.float32)
            else:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            y = plgpu.layout_cast(y.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            slot.transpose((1, 0))[...] = y
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, window(out, i, row, token))
            ahead = i + slots // 2
            if residual is not None and ahead < tokens // part:
                plgpu.wait_smem_to_gmem(slots // 2, wait_read_only=True)
                fetch(ahead, row, token)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        walk(fill)
        tiles = (grid[0] * grid[1] - lax.axis_index("sm") + sms - 1) // sms

        @pl.loop(jnp.maximum(tiles * k_tiles - stages, 0), tiles * k_tiles)
        def _(step):
            plgpu.barrier_wait(free.at[slot_of(step)])

        if branch is not None:
            pl.when(tiles > 0)(lambda: plgpu.barrier_wait(branch_free))

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        walk(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@functools.cache
def decoder(levels: str, halves: int) -> Callable:
    """Return what decodes a warpgroup's [ROWS, TILE_K] weights to the first operand of wgmma.

    Args:
      levels: "uniform" or "stretched".
      halves: steps of each 16 k: 1, or 2 for groups of 8.

    Returns:
      A function from words, int32 [8, 128], see `_tile_packed`, and as many arrays of steps,
      int32 [ROWS], step minus 1 of each 16 k, four bits each, to int8 [ROWS, TILE_K].
    """
    words_of = _stretched_words if levels == "stretched" else _uniform_words

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WG_STRIDED((TILE_N // 8 // WARPGROUPS, 128), vec_size=4),
            *(plgpu.Layout.WGMMA_8BIT.reduce(1),) * halves,
        ),
        return_type=plgpu.ShapeDtypeStruct(
            (ROWS, TILE_K), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def decode_tile(ctx, words, *steps):
        del ctx
        registers = np.empty((1, TILE_K // 16, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        for half, stored in enumerate(zip(*(part.registers.flat for part in steps), strict=True)):
            even, odd = _steps_of(*(_item(part, 0) for part in stored))
            for k in range(TILE_K // 32):
                word = _item(words.registers.flat[k // 2], 2 * (k % 2) + half)
                for j, (sums, packed) in enumerate(zip(words_of(word), (even, odd), strict=True)):
                    step = _permute(packed, _constant(0), _constant(0x4440 + k))
                    registers[0, 2 * k + j, 0, 0, half, 0, 0, 0, 0] = _bytes(_scale(sums, step))
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=True
        )

    return decode_tile


def _steps_of(*stored):
    """Return the steps of the even and of the odd 16 k of this thread, four bytes each."""
    packed = stored[0]
    if len(stored) == 2:  # groups of 8: the third and fourth of a row's threads hold the second
        thread = _assembly("mov.u32 $0, %tid.x;", "=r")
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, _constant(2)), _constant(0))
        packed = arith.select(first, *stored)
    low, one = _constant(0x0F0F0F0F), _constant(0x01010101)
    even, odd = packed, arith.shrui(packed, _constant(4))
    return [arith.addi(arith.andi(part, low), one) for part in (even, odd)]


def _uniform_words(word):
    """Yield sum_b c_b 256**b of the first and of the second four codes of a word."""
    low, bias = _constant(0x0F0F0F0F), _constant(0x08080808)
    for part in (word, arith.shrui(word, _constant(4))):
        yield arith.subi(arith.andi(part, low), bias)


def _stretched_words(word):
    """Yield sum_b L(c_b) 256**b of the first and of the second four codes of a word."""
    small, large = _constant(0x03020100), _constant(0x09070504)
    flipped = arith.xori(word, _constant(-0x77777778))
    for shift in (0, 16):
        positive, negative = (
            _permute(small, large, arith.shrui(part, _constant(shift)) if shift else part)
            for part in (word, flipped)
        )
        yield arith.subi(positive, negative)


def _scale(sums, step):
    """Return the bytes of sum_b c_b 256**b times a step; see the file's docstring."""
    sign = _constant(-0x7F7F7F80)
    return arith.xori(arith.addi(arith.muli(sums, step), sign), sign)


def _constant(value: int):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _item(register, i: int):
    return vector.extract(register, [], [i])


def _bytes(register):
    """Return a 32-bit register as vector<4xi8>."""
    word = vector.broadcast(ir.VectorType.get((1,), register.type), register)
    return vector.bitcast(ir.VectorType.get((4,), ir.IntegerType.get_signless(8)), word)


def _permute(low, high, selector):
    """Return the four of eight bytes that the low four nibbles of a selector choose.

    A nibble whose top bit is set chooses eight copies of the top bit of its byte.
    """
    return _assembly("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", low, high, selector)


def _assembly(text: str, constraints: str, *operands):
    """Return the 32-bit result of PTX without side effects."""
    attributes = {"asm_string": text, "constraints": constraints}
    return ir.Operation.create(
        "llvm.inline_asm",
        results=[ir.IntegerType.get_signless(32)],
        operands=operands,
        attributes={name: ir.StringAttr.get(value) for name, value in attributes.items()},
    ).result


def decode_tile_jnp(
    words: jax.Array,  # int32 [8, 128]
    steps: jax.Array,  # int32 [halves, ROWS]
    levels: str,
) -> jax.Array:
    """Do what `decoder`'s functions do where there are no registers: in interpret mode."""
    stretched = levels == "stretched"
    half, byte = (16, 4) if stretched else (4, 8)
    # pair of 32 k, warp, row, quad, step of 32, half of 16 rows, then a word's 16 k and 4 bytes
    shifts = half * jnp.arange(2)[:, None] + byte * jnp.arange(4)
    words = words.reshape(2, 4, 8, 4, 2, 2, 1, 1) >> shifts
    nibbles = words.transpose(1, 5, 2, 0, 4, 6, 3, 7).reshape(ROWS, TILE_K) & 15
    codes = jnp.where(nibbles < 8, nibbles, 8 - nibbles) if stretched else nibbles - 8
    steps = (steps.T[:, None] >> 4 * jnp.arange(8)[:, None]) & 15  # [ROWS, 8, halves]
    steps = jnp.repeat(steps.reshape(ROWS, -1), REGISTER_K // steps.shape[2], axis=1)
    return (codec.level_of(codes, levels) * (steps + 1)).astype(jnp.int8)
