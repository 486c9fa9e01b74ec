"""Every shim for differences between JAX versions; no other file checks the version."""

import contextlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

# JAX release to the libtpu that it is built for.
_LIBTPU = {"0.10": "0.0.42.", "0.11": "0.0.48.", "0.12": "0.0.50."}


def libtpu_why_not() -> str | None:
    """Say why the TPU compiler can't be used on this machine, or return None."""
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "libtpu isn't installed"
    wanted = _LIBTPU.get(".".join(jax.__version__.split(".")[:2]), "")
    if found.startswith(wanted):
        return None
    return f"libtpu {found} doesn't match JAX {jax.__version__}; install libtpu=={wanted}*"


def gpu_interpret_params() -> Any:
    """Return what makes a Mosaic GPU kernel run on the CPU; public since JAX 0.11."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError("Mosaic GPU kernels run on the CPU only with JAX 0.11 or later")
    return plgpu.InterpretGPUParams()


def named(body: Callable[..., None], name: str) -> Callable[..., None]:
    """Return a kernel's body with the name that profilers show: a partial function has none."""

    def run(*refs, **scratch):
        body(*refs, **scratch)

    run.__name__ = name
    return run


def tpu_reciprocal(x: jax.Array) -> jax.Array:
    """Return the TPU's approximate 1 / x; it moved to `pallas.tpu` in JAX 0.11."""
    module = pltpu if hasattr(pltpu, "reciprocal") else pl
    return module.reciprocal(x, approx=True)


def gpu_load(ref: Any, *, layout: Any, optimized: bool = True) -> jax.Array:
    """Load an indexed reference into registers; until JAX 0.11 an index had to be passed too."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    required = index is not None and index.default is inspect.Parameter.empty
    return plgpu.load(ref, *(((),) if required else ()), layout=layout, optimized=optimized)


# What 8-bit attention needs of JAX's private parts: the layout of 32-bit sums as wgmma leaves them
# (with WGMMA's own, LLVM packs registers in pairs of 64 bits), and MLIR's LLVM dialect.
GPU_SUMS_LAYOUT: Any = getattr(plgpu.Layout, "_WGMMA_ACC_32BIT", None)
GPU_SUMS_REGISTERS: Any = getattr(fragmented_array, "WGMMA_LAYOUT_ACC_32BIT", None)
LLVM_DIALECT: Any = None
with contextlib.suppress(ImportError):
    LLVM_DIALECT = importlib.import_module("jaxlib.mlir.dialects.llvm")


def gpu_attention_why_not() -> str | None:
    """Say what this JAX lacks for the 8-bit attention kernel, or return None."""
    if None in (GPU_SUMS_LAYOUT, GPU_SUMS_REGISTERS, LLVM_DIALECT):
        return f"needs private parts of JAX that {jax.__version__} doesn't have"
    return None
