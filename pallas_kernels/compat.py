"""Every shim for differences between JAX versions; no other file checks the version."""

import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def gpu_interpret_params() -> Any:
    """Return what makes a Mosaic GPU kernel run on the CPU; public since JAX 0.11."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError("Mosaic GPU kernels run on the CPU only with JAX 0.11 or later")
    return plgpu.InterpretGPUParams()


def gpu_load(ref: Any, *, layout: Any, optimized: bool = True) -> jax.Array:
    """Load an indexed reference into registers; until JAX 0.11 an index had to be passed too."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    required = index is not None and index.default is inspect.Parameter.empty
    return plgpu.load(ref, *(((),) if required else ()), layout=layout, optimized=optimized)
