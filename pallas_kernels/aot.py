"""Compiling for a TPU that isn't there: libtpu holds the whole compiler."""

import os

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

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
    topology, kind = TPU_CHIPS[chip]
    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    described = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=described)):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return lowered.compile()
