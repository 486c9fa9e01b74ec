"""What lets a pipeline hold one model at a time, and tell what each stage took."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
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
