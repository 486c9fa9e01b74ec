"""8-bit attention for Hopper GPUs: int8 q k^T, float8 p v, float32 sums.

A tile is 128 queries of a head, 64 for each of two warpgroups; a third one copies keys and values
to shared memory. Warpgroups take turns: one starts q k^T of a block of 128 keys and p v of the
block before, and while the tensor cores multiply, the other one finds maxima and probabilities.
Two processors of a cluster work on neighbouring tiles of a head, and copy one half each of the keys
and values that both read.

Three things make it faster than 16 bits. Both products run at twice the rate. Probabilities take no
exponential (`reference.probabilities`): Hopper computes 16 of these a clock and processor, as long
as both products take together. And the sums of the probabilities come from the tensor cores too,
from rows of ones below V^T, so that they hold the very codes that are multiplied.

The tensor cores' float8 sums have about 14 bits. With one accumulator for all keys the result was
7 % too large on 4608 Gaussian keys; here each block has its own, which is added to float32 sums,
for 4 % of the time (one H100, 2026-11-28, an earlier form of this kernel).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, device
from pallas_kernels.attention import registers
from pallas_kernels.attention.operands import BLOCK, ONES, QuantizedHeads
from pallas_kernels.attention.reference import LOG2_E, split
from pallas_kernels.attention.registers import ROW, ROWS, SUM_ROWS, transforms

WARPGROUPS = 2  # that multiply
TILE = ROWS * WARPGROUPS  # queries of a processor
HEAD_DIMS = (64, 128)
SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper
CLUSTERS = (1, 2)  # the search space of `Config`
STAGES = (2, 3, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a call is spread; of the same result."""

    cluster: int  # processors that share the copies of keys and values: 1 or 2
    stages: int = 4  # blocks of keys, and of values, in flight: 4 are 136 KiB at heads of 128


def choose_config(tokens: int) -> Config:
    """Return pairs, which halve what comes from L2, if the tiles of a head make them."""
    return Config(cluster=1 if -(-tokens // TILE) % 2 else 2)


def search_space(tokens: int) -> list[Config]:
    """Return what may be tried for a call."""
    tiles = -(-tokens // TILE)
    clusters = [cluster for cluster in CLUSTERS if tiles % cluster == 0]
    return [Config(cluster=cluster, stages=stages) for cluster in clusters for stages in STAGES]


def shared_bytes(config: Config, d: int) -> int:
    """Return the bytes of shared memory that tiles take, which barriers add little to."""
    stage = BLOCK * d + (d + ONES) * BLOCK
    return config.stages * stage + TILE * d * (1 + 2)  # queries in int8, results in bfloat16


def why_not(
    target: device.Device, heads: QuantizedHeads, *, scale: float = 1.0, **kwargs
) -> str | None:
    """Say why the device can't run this kernel with these arguments, or return None."""
    if reason := device_why_not(target, heads.q.shape[3]):
        return reason
    if scale < 0:  # the largest product isn't the largest logit
        return f"needs a scale of at least 0, not {scale}"
    return "needs at least one query and one key" if 0 in (*heads.q.shape, *heads.k.shape) else None


def device_why_not(target: device.Device, head_dim: int | None = None) -> str | None:
    """Say why the device can't run this kernel with such heads, or with any, or return None."""
    if target.platform != "gpu" or target.generation != 90:
        return f"needs a Hopper GPU, not {target.kind}"
    if head_dim not in (None, *HEAD_DIMS):
        return f"needs heads of 64 or 128 channels, not {head_dim}"
    return compat.gpu_attention_why_not()


# Under jit of its own a kernel that a program calls many times is lowered once.
@functools.partial(jax.jit, static_argnames=("scale", "streams", "config"))
def attention_int8_fp8(
    heads: QuantizedHeads,
    *,
    scale: float,
    streams: tuple[int, ...],
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """Return the attention; see `pallas_kernels.attention.attention_int8_fp8`.

    Streams are written apart where none but the last ends within a warpgroup's queries.
    """
    batch, _, count, d = heads.q.shape
    if any(tokens % ROWS or not tokens for tokens in streams[:-1]):
        whole = attention_int8_fp8(heads, scale=scale, streams=(heads.tokens,), config=config)
        return split(whole[0], streams)
    config = config or choose_config(heads.tokens)
    processors = device.processors() // config.cluster
    clustered = config.cluster > 1
    # Copies clip at the end of an axis of whole rows of the swizzle, but not along one that a tile
    # covers whole.
    last = streams[-1]
    rows = *streams[:-1], last + -last % 8 if last > TILE else TILE
    kernel = plgpu.kernel(
        compat.named(
            functools.partial(_kernel, config=config, octaves=scale * LOG2_E), "attention"
        ),
        out_type=tuple(
            jax.ShapeDtypeStruct((batch, tokens, count * d), jnp.bfloat16) for tokens in rows
        ),
        grid=(processors,),
        grid_names=("sm",),
        cluster=(config.cluster,) if clustered else (),
        cluster_names=("cluster",) if clustered else (),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(config, d, heads.v.shape[2]),
        # Lane: the steps of `registers` are written for one thread.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    # Copies have five axes at most, two of them within tiles: heads lie in the columns of tokens.
    q, k = (x.reshape(*x.shape[:2], -1) for x in (heads.q, heads.k))
    v = heads.v.reshape(-1, *heads.v.shape[2:])
    outs = kernel(q, k, v, heads.q_scale, heads.k_scale, heads.v_scale)
    return tuple(
        out.reshape(*out.shape[:2], count, d)[:, :tokens]
        for out, tokens in zip(outs, streams, strict=True)
    )


def _scratch(config: Config, d: int, v_rows: int) -> dict:
    stages = config.stages
    free: Callable[..., Any] = plgpu.Barrier
    if config.cluster > 1:  # a slot is filled for both processors once both have left it
        free = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    return {
        "q_tiles": plgpu.SMEM((WARPGROUPS, ROWS, d), jnp.int8, transforms=transforms(d)),
        "k_tiles": plgpu.SMEM((stages, BLOCK, d), jnp.int8, transforms=transforms(d)),
        "v_tiles": plgpu.SMEM(
            (stages, v_rows, BLOCK), jnp.float8_e4m3fn, transforms=transforms(BLOCK)
        ),
        "out_tiles": plgpu.SMEM((WARPGROUPS, ROWS, d), jnp.bfloat16, transforms=transforms(d, 2)),
        "q_full": plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS),
        "q_free": plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS),
        "k_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        "k_free": free(num_arrivals=WARPGROUPS, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        "v_free": free(num_arrivals=WARPGROUPS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS),
    }


def _kernel(
    q,  # [b, tq, heads * d], int8
    k,  # [b, tk, kv_heads * d], int8
    v,  # [b * kv_heads, d + ONES, tk], float8
    q_scale,  # [b, heads, tq], float32
    k_scale,  # [b, kv_heads, tk / BLOCK], float32
    v_scale,  # [b, kv_heads, d], float32, or None
    *outs,  # of each stream: [b, queries, heads * d], bfloat16
    config: Config,
    octaves: float,  # of a logit of 1, in units of q times k
    q_tiles,  # [warpgroup, ROWS, d]
    k_tiles,  # [stages, BLOCK, d]
    v_tiles,  # [stages, d + ONES, BLOCK]
    out_tiles,  # [warpgroup, ROWS, d]
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    turn,  # [warpgroup]: it may start its products
):
    batch, heads, tq = q_scale.shape
    kv_heads, d = k_scale.shape[1], q_tiles.shape[2]
    tiles_of_head, blocks = tq // TILE, k.shape[1] // BLOCK
    tiles = batch * heads * tiles_of_head // config.cluster  # for each cluster
    warpgroup, processors = lax.axis_index("warpgroup"), lax.axis_size("sm")

    def walk(body):
        """Run body(batch, head, first query, first step, tile's number) over this share."""

        @plgpu.nd_loop((tiles,), collective_axes="sm")
        def _(info):
            tile = info.index[0] * config.cluster
            if config.cluster > 1:
                tile = tile + lax.axis_index("cluster")
            head, row = tile // tiles_of_head, tile % tiles_of_head * TILE
            first, number = info.local_index * blocks, info.local_index
            body(head // heads, head % heads, row, first, number)

    def slot_of(step):
        return lax.rem(step, jnp.array(config.stages, step.dtype))

    # ---- the warpgroup that copies

    def fill(batch, head, row, first, number):
        for w in range(WARPGROUPS):
            pl.when(number > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))
            rows = q.at[batch, pl.ds(row + ROWS * w, ROWS), pl.ds(head * d, d)]
            plgpu.copy_gmem_to_smem(rows, q_tiles.at[w], q_full.at[w])
        shared = {"collective_axes": "cluster"} if config.cluster > 1 else {}
        kv_head = head // (heads // kv_heads)

        @pl.loop(0, blocks)
        def _(block):
            step, keys = first + block, pl.ds(block * BLOCK, BLOCK)
            slot = slot_of(step)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
            source = k.at[batch, keys, pl.ds(kv_head * d, d)]
            plgpu.copy_gmem_to_smem(source, k_tiles.at[slot], k_full.at[slot], **shared)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
            source = v.at[batch * kv_heads + kv_head, :, keys]
            plgpu.copy_gmem_to_smem(source, v_tiles.at[slot], v_full.at[slot], **shared)

    def drain():
        """Wait until all that was copied is used, as barriers must be left at rest."""
        mine = (tiles - lax.axis_index("sm") + processors - 1) // processors

        @pl.loop(jnp.maximum(mine * blocks - config.stages, 0), mine * blocks)
        def _(step):
            plgpu.barrier_wait(k_free.at[slot_of(step)])
            plgpu.barrier_wait(v_free.at[slot_of(step)])

        for w in range(WARPGROUPS):
            pl.when(mine > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))

    # ---- the warpgroups that multiply

    start_qk, start_both = registers.start_qk(d), registers.start_both(d)
    first_softmax, softmax = registers.first_softmax(), registers.softmax_and_sums(d)
    last_product = registers.last_product(d)
    q_tile = q_tiles.at[warpgroup]

    def in_turn(start):
        """Start products when it is this warpgroup's turn; the other one's is next."""
        plgpu.barrier_wait(turn.at[warpgroup])
        result = start()
        plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, jnp.int32(WARPGROUPS))])
        return result

    def values(slot):
        """Return V^T of a slot and as many rows of ones as are multiplied."""
        return v_tiles.at[slot].at[pl.ds(0, d + SUM_ROWS)]

    def attend(first, unit, key_scale):
        """Return the result of this warpgroup's rows, float32 [ROWS, d], before the values' scale.

        Args:
          first: number of the first step.
          unit: octaves of a query's code times a key's scale, for each row.
          key_scale: of a block.
        """
        slot = slot_of(first)
        plgpu.barrier_wait(k_full.at[slot])
        products = in_turn(lambda: start_qk(q_tile, k_tiles.at[slot]))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(k_free.at[slot])
        maximum = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
        sums = plgpu.layout_cast(jnp.zeros((ROWS, d + SUM_ROWS), jnp.float32), registers.SUMS)
        p, maximum, factor = first_softmax(products, maximum, unit * key_scale(0))

        def step(block, carry):
            p, maximum, sums, factor, scale = carry
            # Read one step ahead, so that nothing waits for memory.
            following = key_scale(jnp.minimum(block + 1, blocks - 1))
            k_slot, v_slot = slot_of(first + block), slot_of(first + block - 1)
            plgpu.barrier_wait(k_full.at[k_slot])
            plgpu.barrier_wait(v_full.at[v_slot])
            products, added = in_turn(
                lambda: start_both(q_tile, k_tiles.at[k_slot], p, values(v_slot))
            )
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_free.at[k_slot])
            plgpu.barrier_arrive(v_free.at[v_slot])
            p, maximum, factor, sums = softmax(products, maximum, unit * scale, added, sums, factor)
            return p, maximum, sums, factor, following

        def pair(i, carry):
            return step(2 * i + 2, step(2 * i + 1, carry))

        # In pairs, so that p isn't written to the registers that are being multiplied.
        carry = p, maximum, sums, factor, key_scale(min(1, blocks - 1))
        carry = lax.fori_loop(0, (blocks - 1) // 2, pair, carry)
        if blocks % 2 == 0:
            carry = step(blocks - 1, carry)
        p, _, sums, factor, _ = carry
        plgpu.barrier_arrive(q_free.at[warpgroup])
        slot = slot_of(first + blocks - 1)
        plgpu.barrier_wait(v_full.at[slot])
        y = last_product(p, values(slot), sums, factor)
        plgpu.barrier_arrive(v_free.at[slot])
        return y

    def multiply(batch, head, row, first, number):
        del number
        row, kv_head = row + warpgroup * ROWS, head // (heads // kv_heads)
        scales = q_scale.at[batch, head, pl.ds(row, ROWS)]
        unit = compat.gpu_load(scales, layout=ROW, optimized=False) * octaves
        plgpu.barrier_wait(q_full.at[warpgroup])
        y = attend(first, unit, lambda block: k_scale[batch, kv_head, block])
        if v_scale is not None:
            layout = plgpu.Layout.WGMMA.reduce(0)
            scales = compat.gpu_load(v_scale.at[batch, kv_head], layout=layout, optimized=False)
            y = y * lax.broadcast_in_dim(scales, (ROWS, d), [1])
        write(y, batch, row, pl.ds(head * d, d))

    def write(y, batch, row, columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tiles[warpgroup] = y.astype(jnp.bfloat16)
        plgpu.commit_smem()
        start = 0
        for i, out in enumerate(outs):
            # Rows of padding, behind the last stream, are dropped.
            here = row >= start
            if i < len(outs) - 1:
                here &= row < start + out.shape[1]
            target = out.at[batch, pl.ds(row - start, ROWS), columns]
            store = functools.partial(plgpu.copy_smem_to_gmem, out_tiles.at[warpgroup], target)
            pl.when(here)(store) if len(outs) > 1 else store()
            start += out.shape[1]

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        walk(fill)
        drain()

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        pl.when(warpgroup == WARPGROUPS - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        walk(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
