"""Device time of computations, for benchmarks and the search for tile sizes."""

import collections
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax


def kernel_times(function: Callable[[], Any], calls: int = 1) -> dict[str, float]:
    """Return the seconds that a GPU spends in each kernel of one call, by kernel name.

    The profiler's own record of the streams: launches and gaps between kernels don't count.

    Args:
      function: enqueues the work and returns arrays to wait for; it has run before.
      calls: enqueued back to back; the result is a mean.

    Returns:
      Seconds by name, the longest first; empty where the profiler shows no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = function()
            jax.block_until_ready(result)
        files = list(Path(folder).rglob("*.xplane.pb"))
        totals: dict[str, float] = collections.defaultdict(float)
        for file in files:
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if "/device:GPU" in plane.name:
                    for line in plane.lines:
                        if line.name.startswith("Stream"):
                            for event in line.events:
                                totals[event.name] += event.duration_ns * 1e-9 / calls
    return dict(sorted(totals.items(), key=lambda item: item[1], reverse=True))


def measure(
    function: Callable[..., Any], sets: Sequence[tuple], *, batches: int = 5, rounds: int = 3
) -> list[float]:
    """Time a compiled function on sets of arguments in turn, so that no cache keeps them.

    Args:
      function: compiled; called with each set.
      sets: of arguments.
      batches: measurements.
      rounds: passes over the sets in each.

    Returns:
      Seconds a call of each batch: device time where the profiler gives it, else wall time.
    """

    def once():
        return [function(*arguments) for arguments in sets][-1]

    jax.block_until_ready(once())
    seconds = []
    for _ in range(batches):
        total = sum(kernel_times(once, rounds).values()) / len(sets)
        if not total:
            start = time.perf_counter()
            for _ in range(rounds):
                result = once()
            jax.block_until_ready(result)
            total = (time.perf_counter() - start) / (rounds * len(sets))
        seconds.append(total)
    return seconds
