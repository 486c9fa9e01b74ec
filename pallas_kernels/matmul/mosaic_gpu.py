"""Quantized matmul for Hopper GPUs: wgmma on int8, 4-bit weights decoded in registers.

The product is made transposed. A tile of 128 weight rows is the first operand: from shared memory
if the weights are int8, from registers if they are 4 bits wide and decoded on the way; tokens are
the second, so one decoded weight serves `tokens` of them. One warpgroup copies tiles to shared
memory, two multiply 64 weight rows each; while a tile multiplies, the next one is decoded.

A 32-bit register of the operand holds four consecutive k of one row. With U four codes plus 8 as
unsigned bytes and P the step of their group, U * P + (0x80808080 - 0x08080808 * P) has the bytes
code * P + 128, without a carry between them since |code * P| <= 112; flipping the top bits gives
code * P as int8. P is 2**shift or the integer step, so one kernel serves both.
"""

import dataclasses
import functools

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
from pallas_kernels.matmul import tuned

TILE_K = 128  # bytes of k in a tile: the widest swizzle of shared memory
ROWS = 64  # weight rows of a warpgroup: the first extent of wgmma
WARPGROUPS = 2  # that multiply
TILE_N = ROWS * WARPGROUPS
OUTPUT_TOKENS = 128  # tokens of a warpgroup's results that shared memory holds, at most
STEP_UNIT = 16  # k that share one register's step: groups must be multiples of this
SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper
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
    meta_fields=["n", "k"],
)
@dataclasses.dataclass(frozen=True)
class TiledWeights:
    """Weights in the kernel's order; see `prepare_weights` and `prepare_int8`.

    The tiles are 4-bit codes and steps in the order in which the kernel's threads read them:
    int32 [n_tiles, k_tiles, 16, 128], codes plus 8, eight a word, and
    int32 [n_tiles, k_tiles, 128], step minus 1 of 16 k, eight a word;
    or int8 [n padded, k padded] alone.
    """

    tiles: tuple[jax.Array, ...]
    scale: jax.Array  # float32 [n, 1]
    column_sums: jax.Array  # int32 [n]: sum over k of the decoded weights
    n: int  # weight rows
    k: int  # contraction length


def prepare_weights(
    codes: jax.Array,  # [n, k_padded / 2], uint8: packed symmetric codes
    shifts: jax.Array,  # [n, ceil(groups / 2)], uint8: packed shifts
    scale: jax.Array,  # [n, 1], float32
    *,
    k: int,
    group_size: int,
    step: str,
) -> TiledWeights:
    """Reorder packed weights for the kernel: once, at load time.

    Thread t of a warpgroup holds rows 16 (t // 32) + t % 32 // 4 and 8 further, and of each 32 k
    those from 4 (t % 4) and from 16 further; the first four k are the low nibbles of a word.
    """
    signed = codec.unpack(codes, signed=True)
    n, width = signed.shape
    groups = codec.unpack(shifts, signed=False)[:, : width // group_size].astype(jnp.int32)
    sums = codec.decode_packed(codes, shifts, group_size=group_size, step=step)
    sums = jnp.sum(sums, axis=1, dtype=jnp.int32)
    steps = groups if step == "integer" else (1 << groups) - 1
    steps = jnp.repeat(steps, group_size // STEP_UNIT, axis=1)
    nibbles = _pad(signed.astype(jnp.int32) + 8, TILE_N, TILE_K, value=8)
    steps = _pad(steps, TILE_N, TILE_K // STEP_UNIT)
    n_tiles, k_tiles = nibbles.shape[0] // TILE_N, nibbles.shape[1] // TILE_K
    # n: tile, warpgroup, warp, half, row; k: tile, pair, step of 32, half, quad, byte
    nibbles = nibbles.reshape(n_tiles, WARPGROUPS, 4, 2, 8, k_tiles, 2, 2, 2, 4, 4)
    words = _join(nibbles.transpose(0, 5, 1, 6, 2, 4, 9, 7, 3, 8, 10), (0, 8, 16, 24))
    words = _join(words, (0, 4))
    steps = steps.reshape(n_tiles, TILE_N, k_tiles, 8).transpose(0, 2, 1, 3)
    tiles = words.reshape(n_tiles, k_tiles, TILE_N // 8, 128), _join(steps, range(0, 32, 4))
    return TiledWeights(tiles=tiles, scale=scale, column_sums=sums, n=n, k=k)


def prepare_int8(
    w: jax.Array,  # [n, k], int8
    scale: jax.Array,  # [n, 1], float32
) -> TiledWeights:
    """Pad int8 weights to whole tiles and sum their columns: once, at load time."""
    n, k = w.shape
    sums = jnp.sum(w, axis=1, dtype=jnp.int32)
    return TiledWeights(tiles=(_pad(w, TILE_N, TILE_K),), scale=scale, column_sums=sums, n=n, k=k)


def _pad(x: jax.Array, rows: int, columns: int, value: int = 0) -> jax.Array:
    missing = [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)]
    return jnp.pad(x, missing, constant_values=value)


def _join(fields: jax.Array, offsets) -> jax.Array:
    """Join the last axis to one int32, element i at bit offsets[i]."""
    bits = fields.astype(jnp.uint32) << jnp.array(offsets, jnp.uint32)
    return lax.bitcast_convert_type(jnp.sum(bits, axis=-1, dtype=jnp.uint32), jnp.int32)


def matmul_prepared(
    x: jax.Array,  # [m, k], int8
    w: TiledWeights,  # [n, k]
    x_scale: jax.Array,  # [m, 1], float32
    *,
    x_lo: jax.Array | None = None,  # [m, 1], float32
    **options,  # of `_call`
) -> jax.Array:
    """Multiply by prepared weights; see `pallas_kernels.matmul.matmul`."""
    sums = w.column_sums if x_lo is not None else None
    given = {"x_scale": x_scale, "w_scale": w.scale, "x_lo": x_lo, "sums": sums}
    return _call(x, w.tiles, given, n=w.n, **options)


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
    """Reorder the weights, then multiply; see `pallas_kernels.matmul.matmul`.

    The reordering costs a pass over the weights: callers that multiply more than once should keep
    what `prepare_weights` returns and call `matmul_prepared`.
    """
    kind = {"k": x.shape[1], "group_size": group_size, "step": step}
    return matmul_prepared(
        x, prepare_weights(w_codes, w_shifts, w_scale, **kind), x_scale, **options
    )


def matmul_int8(
    x: jax.Array,  # [m, k], int8
    w: jax.Array,  # [n, k], int8
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    **options,  # of `matmul_prepared`
) -> jax.Array:
    """Multiply int8 by int8; see `pallas_kernels.matmul.matmul_int8`."""
    return matmul_prepared(x, prepare_int8(w, w_scale), x_scale, **options)


def why_not(
    target: device.Device, x: jax.Array, w: jax.Array, *args, group_size: int = STEP_UNIT, **kwargs
) -> str | None:
    """Say why the device can't run these kernels with these arguments, or return None."""
    if target.platform != "gpu" or target.generation != 90:
        return f"needs a Hopper GPU, not {target.kind}"
    if group_size % STEP_UNIT:
        return f"needs groups of a multiple of {STEP_UNIT}, not {group_size}"
    dtype = jnp.dtype(kwargs.get("out_dtype", jnp.bfloat16))
    if dtype.itemsize != 2:
        return "writes 16-bit floats only"
    residual = kwargs.get("residual")
    if residual is not None and residual.dtype != dtype:
        return f"needs a residual of {dtype}, what it writes, not {residual.dtype}"
    return "needs at least one element" if 0 in (*x.shape, *w.shape) else None


def choose_config(m: int, n: int, *, decode: bool, sms: int = 132) -> Config:
    """Return the tiles that leave the fewest processors idle in the last wave."""

    def cost(tokens: int) -> int:
        tiles = -(-m // tokens) * -(-n // TILE_N)
        # Each tile pays about as much as 24 tokens for its start and end.
        return -(-tiles // sms) * (tokens + 24)

    tokens = min(TOKEN_TILES, key=cost)
    stage = TILE_K * tokens + (TILE_N * TILE_K // 2 + TILE_N * 4 if decode else TILE_N * TILE_K)
    spare = SHARED_MEMORY - 2048 - WARPGROUPS * OUTPUT_TOKENS * ROWS * 2
    return Config(tokens=tokens, stages=min(4 if tokens > 64 else 16, spare // stage))


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("n", "activation", "out_dtype", "config", "interpret"))
def _call(
    x: jax.Array,
    weights: tuple[jax.Array, ...],  # codes and steps, or int8 [n padded, k padded]
    given: dict[str, jax.Array | None],  # x_scale and x_lo [m, 1], w_scale [n, 1], sums [n]
    *,
    n: int,
    bias: jax.Array | None = None,  # [n]
    activation: str | None = None,
    gate: jax.Array | None = None,  # [n]
    residual: jax.Array | None = None,  # [m, n], of out_dtype
    out_dtype: jnp.dtype = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    m, decode = x.shape[0], len(weights) == 2
    sms = 2 if interpret else _multiprocessors()
    if config is None and not interpret:
        found = tuned.lookup("mosaic_gpu" if decode else "mosaic_gpu_int8", m, n, x.shape[1])
        config = Config(**found) if found else None
    config = config or choose_config(m, n, decode=decode, sms=sms)
    # Copies clip at the end of an array, but it must hold whole rows of the swizzle.
    x = _pad(x, config.tokens if interpret else 8, TILE_K)
    # Neither do they clip along an axis of one tile, whose index they drop: there must be columns
    # for both warpgroups, or the second one would write its padding over the first one's results.
    columns = max(n + -n % ROWS, TILE_N)
    if residual is not None:
        residual = _pad(residual, config.tokens if interpret else 8, columns)
    given = given | {"bias": bias, "gate": gate}
    vectors = {
        name: _flat(array, config.tokens if name.startswith("x_") else TILE_N)
        for name, array in given.items()
        if array is not None
    }
    slots, part = _slots(config.tokens, residual is not None)
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, activation=activation, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((x.shape[0], columns), out_dtype),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(config, decode, (slots, part), out_dtype, interpret),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=compat.gpu_interpret_params() if interpret else False,
    )
    return kernel(x, weights, vectors, residual)[:m, :n]


def _slots(tokens: int, residual: bool) -> tuple[int, int]:
    """Return how many parts of an output tile are on their way at once, and tokens of each.

    A residual comes into the slot that its result leaves from, two parts ahead.
    """
    slots = 4 if residual else 2
    limit = OUTPUT_TOKENS // slots
    return slots, max(part for part in range(8, limit + 1, 8) if tokens % part == 0)


def _flat(x: jax.Array, multiple: int) -> jax.Array:
    """Return float32, or int32 as it is, [n padded with zeros] of an [n] or [n, 1] array."""
    wide = x if x.dtype == jnp.int32 else x.astype(jnp.float32)
    return codec.pad(wide.reshape(-1), multiple)


def _multiprocessors() -> int:
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.num_cores
    return getattr(jax.devices()[0], "core_count", 132)


def _scratch(
    config: Config, decode: bool, output: tuple[int, int], out_dtype, interpret: bool
) -> dict:

    def swizzled(columns):
        return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)

    stages = config.stages
    if decode:
        weights = (
            plgpu.SMEM((stages, TILE_N // 8, 128), jnp.int32),
            plgpu.SMEM((stages, TILE_N), jnp.int32),
        )
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
        # The interpreter's wgmma reads its first operand from memory only.
        "decoded": (plgpu.SMEM((WARPGROUPS, ROWS, TILE_K), jnp.int8),) * (decode and interpret),
    }


def _kernel(
    x,  # [m, k], int8
    weights,  # codes [n_tiles, k_tiles, 16, 128] and steps [n_tiles, k_tiles, 128]; or [n, k]
    vectors,  # x_scale, x_lo [m padded]; w_scale, sums, bias, gate [n padded]; those given
    residual,  # [m, n padded] or None
    out,  # [m, n padded]
    *,
    config: Config,
    activation: str | None,
    interpret: bool,
    x_tiles,  # [stages, tokens, TILE_K]
    w_tiles,  # like weights, a tile for each stage
    out_tiles,  # [warpgroup, slots, part of tokens, ROWS]
    filled,
    free,
    added,  # [warpgroup * slots]: a part of the residual is there
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
        steps = compat.gpu_load(
            steps.at[slot, pl.ds(warpgroup * ROWS, ROWS)],
            layout=plgpu.Layout.WGMMA_8BIT.reduce(1),
        )
        if not interpret:
            return decode_tile(words, steps)
        decoded[0][warpgroup] = decode_tile_jnp(words, steps)
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

    def write(acc, row, token):
        """Scale, round and write a tile of [ROWS, tokens] sums, transposed."""

        def load_rows(name):
            layout = plgpu.Layout.WGMMA.reduce(1)
            ref = vectors[name].at[pl.ds(row, ROWS)]
            return compat.gpu_load(ref, layout=layout, optimized=False)

        def load_tokens(name, start):
            layout = plgpu.Layout.WGMMA.reduce(0)
            ref = vectors[name].at[pl.ds(start, part)]
            return compat.gpu_load(ref, layout=layout, optimized=False)

        def down(v):
            return lax.broadcast_in_dim(v, (ROWS, part), [0])

        def along(v):
            return lax.broadcast_in_dim(v, (ROWS, part), [1])

        of_row = {name: load_rows(name) for name in vectors if not name.startswith("x_")}
        scale = of_row["w_scale"]
        for i in range(tokens // part):
            start = token + i * part
            sum_ = acc[:, i * part : (i + 1) * part]
            if "x_lo" in vectors:
                sum_ = sum_ + down(128 * of_row["sums"])
            y = sum_.astype(jnp.float32) * along(load_tokens("x_scale", start)) * down(scale)
            if "x_lo" in vectors:
                lo = along(load_tokens("x_lo", start)) * down(scale)
                y = y + lo * down(of_row["sums"].astype(jnp.float32))
            if "bias" in vectors:
                y = y + down(of_row["bias"])
            if activation == "gelu":
                y = gelu(y)
            if "gate" in vectors:
                y = y * down(of_row["gate"])
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

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        walk(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@plgpu.inline_mgpu(
    arg_types=(
        plgpu.Layout.WG_STRIDED((TILE_N // 8 // WARPGROUPS, 128), vec_size=4),
        plgpu.Layout.WGMMA_8BIT.reduce(1),
    ),
    return_type=plgpu.ShapeDtypeStruct((ROWS, TILE_K), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
)
def decode_tile(ctx, words, steps):
    """Decode a warpgroup's [ROWS, TILE_K] weights to the first operand of wgmma.

    Args:
      ctx: unused.
      words: int32 [8, 128]: see `prepare_weights`.
      steps: int32 [ROWS]: step minus 1 of each 16 k, four bits each.

    Returns:
      int8 [ROWS, TILE_K].
    """
    del ctx
    i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)

    def constant(value):
        return mgpu.c(value, i32)

    def item(register, i):
        return vector.extract(register, [], [i])

    registers = np.empty((1, TILE_K // 16, 1, 1, 2, 1, 1, 1, 1), dtype=object)
    for half, packed in enumerate(steps.registers.flat):
        packed = item(packed, 0)
        low, one = constant(0x0F0F0F0F), constant(0x01010101)
        even = arith.addi(arith.andi(packed, low), one)
        odd = arith.addi(arith.andi(arith.shrui(packed, constant(4)), low), one)
        for k in range(TILE_K // 32):
            word = item(words.registers.flat[k // 2], 2 * (k % 2) + half)
            shift = constant(8 * k)
            pair = [arith.andi(arith.shrui(p, shift), constant(255)) for p in (even, odd)]
            for j, register in enumerate(_decode_word(word, pair, constant)):
                register = vector.bitcast(
                    ir.VectorType.get((4,), i8),
                    vector.broadcast(ir.VectorType.get((1,), i32), register),
                )
                registers[0, 2 * k + j, 0, 0, half, 0, 0, 0, 0] = register
    return mgpu.FragmentedArray(
        _registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=True
    )


def _decode_word(word, steps, constant):
    """Decode the eight codes of a word to two registers of four int8; see the file's docstring."""
    low, bias, sign = constant(0x0F0F0F0F), constant(0x08080808), constant(-0x7F7F7F80)
    codes = (arith.andi(word, low), arith.andi(arith.shrui(word, constant(4)), low))
    for code, step in zip(codes, steps, strict=True):
        offset = arith.subi(sign, arith.muli(step, bias))
        yield arith.xori(arith.addi(arith.muli(code, step), offset), sign)


def decode_tile_jnp(words: jax.Array, steps: jax.Array) -> jax.Array:
    """Do what `decode_tile` does where there are no registers: in interpret mode."""
    # pair of 32 k, warp, row, quad, step of 32, half of 16 rows, then a word's 16 k and 4 bytes
    shifts = 4 * jnp.arange(2)[:, None] + 8 * jnp.arange(4)
    words = words.reshape(2, 4, 8, 4, 2, 2, 1, 1) >> shifts
    codes = words.transpose(1, 5, 2, 0, 4, 6, 3, 7).reshape(ROWS, TILE_K) & 15
    steps = (steps[:, None] >> 4 * jnp.arange(8)) & 15
    return ((codes - 8) * (jnp.repeat(steps, STEP_UNIT, axis=1) + 1)).astype(jnp.int8)
