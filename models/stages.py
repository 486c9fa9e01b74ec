"""What lets a pipeline hold one model at a time, and tell what each stage took."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deferred:
    """A model that is loaded for the stage that needs it and released after it.

    It takes a model's place in a pipeline; every use loads it again.
    """

    config: Any  # the model's config, known before loading
    load: Callable[[], nnx.Module]
    bytes: int | None = None  # on the device; None where that isn't known beforehand


# Of a device's memory, what models that are loaded ahead may fill with those before them.
_SHARE = 0.6


class Ahead:
    """Models that a thread loads in the order of their use, while those before them compute.

    Only the first ones are, which fit the device together with room to compute in: then no order
    of loading and releasing can take more. The others are loaded when they are needed.
    """

    def __init__(self, models: Mapping[str, Any]):
        """Take models in the order of their use, by name; what isn't deferred is left alone."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self._started: dict[str, Future[nnx.Module]] = {}
        room = _SHARE * (memory_limit() or 0)
        device: Any = jax.config
        for name, model in models.items():
            if not isinstance(model, Deferred):
                continue
            room -= float("inf") if model.bytes is None else model.bytes
            if room < 0:
                break
            self._started[name] = self._pool.submit(_on, device.jax_default_device, model.load)

    def take(self, name: str) -> nnx.Module | None:
        """Return a model, waited for, and forget it; None where none is loaded ahead."""
        found = self._started.pop(name, None)
        return None if found is None else found.result()

    def close(self) -> None:
        """Load no further ones, and forget those that nobody took."""
        self._pool.shutdown(cancel_futures=True)
        self._started.clear()


def _on(device: Any, load: Callable[[], nnx.Module]) -> nnx.Module:
    with jax.default_device(device):  # which is each thread's own
        return load()


@dataclasses.dataclass
class StageTimes:
    """Seconds that stages took, in the order they ended, and the device's memory peak."""

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    # bytes that were in use at most from the process's start to the end of the stage
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time the body, which must wait for the device itself."""
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Record one run of a stage that has just ended."""
        self.seconds.setdefault(stage, []).append(seconds)
        if (peak := peak_bytes_in_use()) is not None:
            self.peak_bytes[stage] = peak


def peak_bytes_in_use() -> int | None:
    """Return the most bytes the fullest device has held; None where devices don't report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [device["peak_bytes_in_use"] for device in stats if "peak_bytes_in_use" in device]
    return max(peaks, default=None)


def memory_limit() -> int | None:
    """Return the bytes that JAX may take of the default device; None where that isn't reported."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
