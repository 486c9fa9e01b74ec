"""Compiling for a TPU that isn't there: libtpu holds the whole compiler."""

import contextlib
import dataclasses
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from pallas_kernels.matmul import mosaic_tpu
from pallas_kernels.operands import Int8Rows, PackedRows

# Chip to the smallest topology that libtpu describes, and what the chip calls itself.
TPU_CHIPS = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", "TPU v5p"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
    "v7x": ("tpu7x:2x2x1", "TPU7x"),
}


def compile_for_tpu(
    chip: str,
    function,
    *arguments: jax.ShapeDtypeStruct,
) -> jax.stages.Compiled:
    """Compile a function of arrays for one core of a chip, with the installed libtpu.

    Args:
      chip: one of `TPU_CHIPS`.
      function: takes arrays; traced as on that chip, so that dispatch sees it.
      *arguments: shapes and dtypes, in any pytree.

    Raises:
      RuntimeError: libtpu isn't installed or doesn't match this JAX; or what the compiler says.
    """
    # Without these libtpu asks a metadata server, for minutes, which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No device is held, so that other processes may compile too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology, _ = TPU_CHIPS[chip]
    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with tracing_for_tpu(chip):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return lowered.compile()


def kernels(compiled: jax.stages.Compiled) -> frozenset[str]:
    """Return the names of the Pallas kernels that a program of `compile_for_tpu` calls."""
    call = r'%([\w.-]+?)(?:\.\d+)* = [^\n]*custom_call_target="tpu_custom_call"'
    return frozenset(re.findall(call, compiled.as_text() or ""))


def tracing_for_tpu(chip: str) -> contextlib.AbstractContextManager:
    """Return a context in which dispatch takes what is traced to run on a chip of `TPU_CHIPS`."""
    _, kind = TPU_CHIPS[chip]
    described = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=described)
    return jax.sharding.use_abstract_mesh(mesh)


def abstract_rows(
    m: int,
    k: int,
) -> Int8Rows:
    """Return shapes of int8 rows [m, k]."""
    shape: Any = jax.ShapeDtypeStruct  # stands where an array would
    return Int8Rows(values=shape((m, k), jnp.int8), scale=shape((m, 1), jnp.float32))


def abstract_packed(
    n: int, k: int, *, group_size: int = 16, step: str = "power", levels: str = "uniform"
) -> PackedRows:
    """Return shapes of packed rows [n, k]."""
    shape: Any = jax.ShapeDtypeStruct
    groups = -(-k // group_size)
    return PackedRows(
        codes=shape((n, groups * group_size // 2), jnp.uint8),
        shifts=shape((n, -(-groups // 2)), jnp.uint8),
        scale=shape((n, 1), jnp.float32),
        group_size=group_size,
        step=step,
        levels=levels,
        padding=groups * group_size - k,
    )


def tpu_matmul_arguments(
    m: int, n: int, k: int, *, group_size: int | None = None, **kind: str
) -> tuple[Int8Rows, mosaic_tpu.TpuWeights]:
    """Return shapes of x and weights for `mosaic_tpu.matmul_prepared`.

    The weights are packed, of a kind that `abstract_packed` takes, or int8 if `group_size` is None.
    """
    w: Int8Rows | PackedRows = abstract_rows(n, k)
    if group_size is not None:
        w = abstract_packed(n, k, group_size=group_size, **kind)
    return abstract_rows(m, k), jax.eval_shape(mosaic_tpu.prepare, w)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Static schedule of a kernel's innermost grid loop, in bundles (instruction words)."""

    every_step: int  # bundles that every grid step runs
    first: int  # in the branch before the dot: decoding, where it isn't done at every step
    last: int  # in the branch after the dot: the epilogue
    matrix: int  # of `every_step`, those in which a matrix unit works

    def per_step(self, m_tiles: int, k_tiles: int) -> float:
        """Return the mean over a grid whose first m tile takes `first`, last k tile `last`."""
        return self.every_step + self.first / m_tiles + self.last / k_tiles


def read_schedule(bundles: str, utilization: str) -> Schedule:
    """Read the compiler's dump of a kernel.

    Args:
      bundles: text of its `*-final_bundles.txt`.
      utilization: text of its `*-final_hlo-static-per-bundle-utilization.txt`.

    Raises:
      ValueError: no loop is found; this libtpu writes another format.
    """
    table = utilization.split("UTILIZATION:")[-1].strip().splitlines()
    busy = [int(line.split()[0]) > 0 for line in table]
    lines = re.findall(r"^ *0x([0-9a-f]+) +([A-Z]*):(.*(?:\n(?! *0x).*)*)", bundles, re.MULTILINE)
    code = [(int(address, 16), label, text) for address, label, text in lines]
    begin = next((address for address, label, _ in code if label == "LB"), None)
    jumps = [(address, text) for address, _, text in code if "sbr.rel" in text]
    if begin is None or not jumps:
        raise ValueError("bundles has no grid loop; expected a dump of libtpu 0.0.42 to 0.0.50")
    end = jumps[-1][0] + 1
    matrix = [address for address in range(begin, end) if busy[address]]
    first = last = 0
    for address, text in jumps[:-1]:
        target = re.search(r"target = \$region(\d+)", text)
        if target is None:
            raise ValueError("bundles has a jump without a target; expected a dump of libtpu's")
        end_words = f"/End empty region {target[1]} "
        stop = next((a for a, _, t in code if a > address and end_words in t), address)
        # Branches around the whole step hold the dot as well; the others are short or its sides.
        if stop <= matrix[0]:
            first = max(first, stop - address)
        elif address >= matrix[-1]:
            last = max(last, stop - address)
    return Schedule(
        every_step=end - begin - first - last, first=first, last=last, matrix=len(matrix)
    )
