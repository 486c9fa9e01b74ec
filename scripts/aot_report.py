"""Compare the static schedules of the fused and the plain int8 TPU kernels, without a TPU.

    python scripts/aot_report.py --out tpu_schedules.md

Needs the libtpu that matches the installed JAX. Bundles are what the compiler schedules, one a
cycle unless memory stalls; waiting for memory isn't in them.
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import aot
from pallas_kernels.matmul import mosaic_tpu
from pallas_kernels.matmul.shapes import SHAPES, Shape

HEADER = """\
Bundles a step of the grid (one tile of m, n and k), averaged over a whole matmul.

- ratio: the fused kernel's bundles over the plain int8 kernel's, at the shape's own m.
- one tile: the same if m were one tile, so that every step decodes.
- matrix: share of the bundles in which a matrix unit works, plain and fused.

| chip | shape | m, n, k | group | plain | fused | ratio | one tile | matrix |
|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flux = [name for name in SHAPES if name.startswith("flux")]
    parser.add_argument("--chips", nargs="+", choices=aot.TPU_CHIPS, default=["v5e", "v6e"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=flux)
    parser.add_argument("--groups", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    lines = [_title(), "", *HEADER.splitlines()]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        # Read by libtpu when it starts, with the first compilation.
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(
            f"--xla_jf_dump_{key}" for key in (f"to={folder}", "hlo_text=true", "llo_text=true")
        )
        for chip in options.chips:
            for name in options.shapes:
                plain = _schedule(Path(folder), chip, SHAPES[name], None)
                for group_size in options.groups:
                    fused = _schedule(Path(folder), chip, SHAPES[name], group_size)
                    lines.append(_row(chip, name, group_size, plain, fused))
                    print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


def _title() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return f"`python scripts/aot_report.py`, {versions}, {datetime.now(UTC):%Y-%m-%d}."


def _schedule(folder: Path, chip: str, shape: Shape, group_size: int | None) -> aot.Schedule:
    for file in folder.iterdir():
        file.unlink()
    arguments = aot.tpu_matmul_arguments(shape.m, shape.n, shape.k, group_size=group_size)
    aot.compile_for_tpu(chip, mosaic_tpu.matmul_prepared, *arguments)
    kernel = "int8_matmul" if group_size is None else "quartz_matmul"
    endings = "final_bundles", "final_hlo-static-per-bundle-utilization"
    bundles, utilization = (
        max(folder.glob(f"*{kernel}*[0-9]-{ending}.txt")).read_text() for ending in endings
    )
    return aot.read_schedule(bundles, utilization)


def _row(chip: str, name: str, group_size: int, plain: aot.Schedule, fused: aot.Schedule) -> str:
    shape = SHAPES[name]
    tile_m, tile_k, _ = mosaic_tpu.tile_sizes(shape.m, shape.n, shape.k, group_size)
    m_tiles, k_tiles = -(-shape.m // tile_m), -(-shape.k // tile_k)
    whole = [schedule.per_step(m_tiles, k_tiles) for schedule in (plain, fused)]
    single = [schedule.per_step(1, k_tiles) for schedule in (plain, fused)]
    shares = [
        f"{schedule.matrix / steps:.0%}"
        for schedule, steps in zip((plain, fused), whole, strict=True)
    ]
    cells = [
        chip,
        name,
        f"{shape.m}, {shape.n}, {shape.k}",
        str(group_size),
        *(f"{steps:.0f}" for steps in whole),
        f"{whole[1] / whole[0]:.3f}",
        f"{single[1] / single[0]:.3f}",
        ", ".join(shares),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
