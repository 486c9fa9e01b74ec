"""Device times from profiles that are made up; wall time where there are none."""

import contextlib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import timing


@pytest.fixture
def profile(monkeypatch):
    """Planes of the next profile: {plane: {line: [(kernel, nanoseconds)]}}."""
    planes = {}

    @contextlib.contextmanager
    def trace(folder):
        yield
        (Path(folder) / "x.xplane.pb").write_text("")

    def read(file):
        space = types.SimpleNamespace
        return space(
            planes=[
                space(
                    name=plane,
                    lines=[
                        space(name=line, events=[space(name=n, duration_ns=ns) for n, ns in events])
                        for line, events in lines.items()
                    ],
                )
                for plane, lines in planes.items()
            ]
        )

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", read)
    return planes


def test_kernels_of_all_streams_count_and_nothing_else(profile):
    profile["/device:GPU:0"] = {
        "Stream #1": [("a", 1000), ("b", 5000), ("a", 1000)],
        "Stream #2": [("a", 2000)],
        "XLA Ops": [("a", 7000)],
    }
    profile["/host:CPU"] = {"Stream #1": [("c", 9000)]}
    times = timing.kernel_times(lambda: jnp.zeros(1), calls=2)
    assert list(times) == ["b", "a"]
    assert times == pytest.approx({"a": 2e-6, "b": 2.5e-6})


def test_a_measurement_is_the_mean_of_a_call_over_sets_and_rounds(profile):
    profile["/device:GPU:0"] = {"Stream #1": [("a", 12_000)]}
    seconds = timing.measure(lambda x: x, [(1,), (2,)], batches=4, rounds=3)
    assert seconds == pytest.approx([12e-6 / (2 * 3)] * 4)


def test_every_set_is_used_in_turn_and_wall_time_counts_without_a_profile(profile, monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seen = []
    assert timing.measure(seen.append, [(1,), (2,)], batches=1, rounds=3) == [1.0]
    assert seen == [1, 2] * (1 + 3 + 3)  # the first to warm up, then the profile, then the clock
