"""Reading the TPU compiler's dumps.

golden/tpu_schedule: v5e's dump of `quartz_matmul`, 832x128x1664 in groups of 16, by JAX 0.10.2 and
libtpu 0.0.42.1; of the bundles only those that jump, are jumped to or begin the loop.
"""

from pathlib import Path

import pytest

from pallas_kernels import aot

FOLDER = Path(__file__).parents[1] / "golden" / "tpu_schedule"


@pytest.fixture
def dump():
    return [(FOLDER / f"{name}.txt").read_text() for name in ("final_bundles", "utilization")]


def test_the_branches_before_and_after_the_dot_are_apart_from_the_loop(dump):
    # The loop is 0x8 to 0x33c; the epilogue is jumped over from 0x27e to 0x325.
    schedule = aot.read_schedule(*dump)
    assert schedule == aot.Schedule(every_step=549, first=105, last=167, matrix=285)
    assert schedule.every_step + schedule.first + schedule.last == 0x33C - 0x8 + 1


def test_a_branch_counts_once_a_tile_of_rows_or_of_k(dump):
    schedule = aot.read_schedule(*dump)
    assert schedule.per_step(m_tiles=1, k_tiles=1) == 549 + 105 + 167
    assert schedule.per_step(m_tiles=5, k_tiles=2) == 549 + 21 + 83.5


def test_a_dump_without_a_loop_is_refused(dump):
    bundles, utilization = dump
    with pytest.raises(ValueError, match="no grid loop"):
        aot.read_schedule(bundles.replace("LB:", "  :"), utilization)
