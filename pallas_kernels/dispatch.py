"""Choosing the implementation of an operation: by the device, by name, or from a list of names."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels import device as devices
from pallas_kernels.gradients import with_derivative
from pallas_kernels.sharding import is_split

Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an operation."""

    name: str  # what `implementation=` calls it
    run: Callable[..., Any]  # the implementation itself
    # (device, *args, **kwargs of the call) to the reason why it can't run them, or None
    why_not: Callable[..., str | None] = lambda device, *args, **kwargs: None
    splits: bool = True  # whether XLA can run it on arrays that it splits over a mesh's devices
    # Of weights that are used more than once: to the implementation's own order, and what runs then
    prepare: Callable[..., Any] | None = None
    run_prepared: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation and its backends, the preferred first; one of them must run everywhere."""

    name: str  # such as "matmul", for messages
    backends: tuple[Backend, ...]  # in order of preference
    # What JAX differentiates in the place of any backend, of the same arguments: those by keyword
    # aren't differentiated. None: each backend itself.
    derivative: Callable[..., Any] | None = None

    def __call__(self, *args, implementation: Implementation = None, **kwargs):
        """Run the first backend that can; see `choose` for `implementation` and what is raised."""
        run = functools.partial(self.choose(implementation, *args, **kwargs).run, **kwargs)
        if self.derivative is None:
            return run(*args)
        return with_derivative(run, functools.partial(self.derivative, **kwargs), *args)

    def choose(self, implementation: Implementation, *args, **kwargs) -> Backend:
        """Return the backend that a call would run.

        Args:
          implementation: None for the best that can run here, a name, or names in order of
            preference.
          *args: of the call.
          **kwargs: of the call.

        Raises:
          ValueError: unknown name, or none of the named ones can run; gives each one's reason.
        """
        reasons = self._reasons(implementation, *args, **kwargs)
        for name, reason in reasons.items():
            if reason is None:
                return self.backend(name)
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"{self.name}: implementation={implementation!r} can't run here ({listed}); "
            "pass implementation=None for the best that can"
        )

    def explain(self, *args, implementation: Implementation = None, **kwargs) -> str:
        """Say which backend a call would run, and why each better one doesn't."""
        lines, chosen = [], False
        for name, reason in self._reasons(implementation, *args, **kwargs).items():
            verdict = reason or ("not needed" if chosen else "runs")
            chosen = chosen or reason is None
            lines.append(f"{self.name}/{name}: {verdict}")
        return "\n".join(lines)

    def _reasons(self, implementation: Implementation, *args, **kwargs) -> dict[str, str | None]:
        names = self.names(implementation)
        device = devices.current()
        split = is_split((args, kwargs))

        def reason(backend: Backend) -> str | None:
            if split and not backend.splits:
                return "XLA can't split it over the devices of a mesh; call it under jax.shard_map"
            return backend.why_not(device, *args, **kwargs)

        return {name: reason(self.backend(name)) for name in names}

    def names(self, implementation: Implementation) -> list[str]:
        """Return the backends' names that a call chooses from; raises ValueError for none."""
        if implementation is None:
            return [backend.name for backend in self.backends]
        names = [implementation] if isinstance(implementation, str) else implementation
        if not isinstance(names, list | tuple) or not names:
            known = ", ".join(backend.name for backend in self.backends)
            raise ValueError(
                f"{self.name}: implementation is {implementation!r}; it must be None, a name or a "
                f"list of names; known are {known}"
            )
        return [self.backend(name).name for name in names]

    def backend(self, name: str) -> Backend:
        """Return the backend of a name; raises ValueError for an unknown one."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        raise ValueError(f"{self.name}: unknown implementation {name!r}; known are {known}")
