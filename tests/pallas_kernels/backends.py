"""The backends of an operation as test parameters: as they are on their hardware, else interpreted.

On the CPU the kernels run in interpret mode. Where JAX sees an accelerator (`JAX_PLATFORMS=cuda
python -m pytest tests/pallas_kernels`) only what is made for it runs, and nothing is interpreted.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.dispatch import Backend, Operation

ON_HARDWARE = jax.default_backend() != "cpu"

# What the kernels are made for, by the start of their names; the other backends run anywhere.
MADE_FOR = {
    "mosaic_tpu": device.describe("tpu", "TPU v6 lite"),
    "mosaic_gpu": device.describe("gpu", "NVIDIA H100 80GB HBM3"),
    "triton": device.describe("gpu", "NVIDIA H100 80GB HBM3"),
    "cudnn": device.describe("gpu", "NVIDIA H100 80GB HBM3"),
}
# What a backend may refuse: nothing else.
MAY_REFUSE = {
    "mosaic_gpu": "writes 16-bit floats only",
    "triton": r"decodes 4-bit weights, not int8|writes bfloat16 and float16, not float32",
    "triton_few_rows": r"serves up to \d+ rows on this device, not \d+",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A backend under test."""

    backend: Backend

    @property
    def made_for(self) -> device.Device | None:
        """The hardware that it needs, or None."""
        starts = (found for start, found in MADE_FOR.items() if self.backend.name.startswith(start))
        return next(starts, None)

    @property
    def interpretable(self) -> bool:
        """Whether it takes `interpret=True`: kernels written register by register don't."""
        parameters = inspect.signature(self.backend.run).parameters.values()
        return any(p.name == "interpret" or p.kind is p.VAR_KEYWORD for p in parameters)

    @property
    def skipped(self) -> str | None:
        """Why it can't run here at all, or None."""
        name, wanted = self.backend.name, self.made_for
        if ON_HARDWARE and wanted:
            here = device.current()
            if here.platform != wanted.platform:
                return f"{name} needs a {wanted.platform}, and is interpreted only on the CPU"
            if name == "mosaic_gpu" and here.generation != wanted.generation:
                return f"{name} needs a Hopper GPU, not {here.kind}"
        elif wanted and wanted.platform == "gpu" and not self.interpretable:
            return f"{name} runs on its hardware only"
        elif name == "mosaic_gpu" and not hasattr(plgpu, "InterpretGPUParams"):
            return "Mosaic GPU kernels run on the CPU only with JAX 0.11 or later"
        return None

    def refuses(self, *args, **kwargs) -> bool:
        """Whether it can't take these arguments, which must be for a reason that is known."""
        target = device.current() if ON_HARDWARE else self.made_for
        reason = self.backend.why_not(target, *args, **kwargs)
        if reason is not None:
            assert re.fullmatch(MAY_REFUSE[self.backend.name], reason), reason
        return reason is not None

    def __call__(self, *args, **kwargs):
        """Run it."""
        # The TPU kernels see by themselves that there is no TPU.
        gpu = self.made_for is not None and self.made_for.platform == "gpu"
        interpret = {"interpret": True} if gpu and not ON_HARDWARE else {}
        return self.backend.run(*args, **kwargs, **interpret)


def is_known(option: str, value: bool | int) -> bool:
    """Return whether XLA has an option: versions drop some."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def quickly() -> dict[str, bool | int]:
    """Return how interpreted kernels are compiled.

    What XLA's CPU compiler makes of the interpreter says nothing of the kernel on its hardware, and
    takes most of these tests' time.
    """
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_llvm_disable_expensive_passes": True,
    }
    return {} if ON_HARDWARE else {x: v for x, v in options.items() if is_known(x, v)}


def jit(subject: Callable, function: Callable | None = None) -> Callable:
    """Return a subject under jit, or a function that calls it, compiled quickly if interpreted."""
    interpreted = isinstance(subject, Subject) and subject.made_for is not None
    return jax.jit(function or subject, compiler_options=quickly() if interpreted else None)


def subjects(operation: Operation, *, without: str = "") -> list:
    """Return all backends but one as parameters, with a skip where one can't run here."""
    found = [Subject(backend=backend) for backend in operation.backends if backend.name != without]
    return [
        pytest.param(
            subject,
            id=subject.backend.name,
            marks=[pytest.mark.skip(reason=subject.skipped)] if subject.skipped else [],
        )
        for subject in found
    ]
