"""Compare the static schedules of the fused and the plain int8 TPU kernels, without a TPU.

    python scripts/aot_report.py --out pallas_kernels/matmul/tpu_schedules.md

Needs the libtpu that matches the installed JAX. Bundles are what the compiler schedules, one a
cycle unless memory stalls; waiting for memory isn't in them. Notes that the file holds already,
from the line "## Notes" on, are kept.
"""

import argparse
import importlib.metadata
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import aot, compat
from pallas_kernels.arguments import CHOICES
from pallas_kernels.matmul import mosaic_tpu
from pallas_kernels.matmul.shapes import SHAPES, Shape
from pallas_kernels.operands import Epilogue
from quartz_jax.cli import arguments as cli
from quartz_jax.io.files import atomic_file, check_output

NOTES = "## Notes"
HEADER = """\
## Grid steps

Bundles a step of the grid (one tile of m, n and k), averaged over a whole matmul.

- weights: elements a group, and whether the levels are stretched (with an integer step).
- ratio: the fused kernel's bundles over the plain int8 kernel's, at the shape's own m.
- one tile: the same if m were one tile, so that every step decodes.
- matrix: share of the bundles in which a matrix unit works, plain and fused.

| chip | shape | m, n, k | weights | plain | fused | ratio | one tile | matrix |
|---|---|---|---|---|---|---|---|---|"""
EPILOGUE_HEADER = """\
## Epilogues

What the fused kernel (group 16) runs outside the loop over k, once a tile of m and n: multiplying
by the scales alone, and with what a layer adds.

- bundles: of that branch.
- grid step: bundles a step of the grid as above, the epilogue's share included.
- of scales alone: that over the grid step of the first row.

| chip | shape | epilogue | bundles | grid step | of scales alone |
|---|---|---|---|---|---|"""
# What layers put into the epilogue, by name.
EPILOGUES = {
    "scales": (),
    "scales, bias": ("bias",),
    "scales, bias, GELU": ("bias", "gelu"),
    "scales, bias, gate, residual": ("bias", "gate", "residual"),
}
EPILOGUE_SHAPES = ["flux-mlp-up", "flux-mlp-down"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it where asked."""
    options = parse(argv)
    if options.out:
        check_output(options.out)
    if reason := compat.libtpu_why_not():
        raise ValueError(f"no TPU compiler: {reason}")
    lines = [_title(), "", *HEADER.splitlines()]
    notes = kept_notes(options.out)
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        # Read by libtpu when it starts, with the first compilation.
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(
            f"--xla_jf_dump_{key}" for key in (f"to={folder}", "hlo_text=true", "llo_text=true")
        )
        for line in _tables(Path(folder), options):
            lines.append(line)
            print(line, flush=True)
    if options.out:
        text = "\n".join(["# Static schedules of the TPU matmul kernels", "", *lines])
        with atomic_file(options.out) as partial:
            partial.write_text(f"{text}\n{notes}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    flux = [name for name in SHAPES if name.startswith("flux")]
    add = parser.add_argument
    add("--chips", nargs="+", choices=aot.TPU_CHIPS, default=["v5e", "v6e"])
    add("--shapes", nargs="+", choices=SHAPES, default=flux)
    add("--groups", nargs="+", type=int, choices=CHOICES["group_size"], default=[16, 32])
    add("--levels", nargs="+", choices=CHOICES["levels"], default=list(CHOICES["levels"]))
    add("--out", type=Path, help="Markdown file to write")
    return parser.parse_args(argv)


def kept_notes(path: Path | None) -> str:
    """Return the notes of an earlier report, a blank line before them, or nothing."""
    if path is None or not path.exists():
        return ""
    _, heading, notes = path.read_text().partition(f"\n{NOTES}\n")
    return heading + notes


def _tables(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Compile everything; yield the lines of both tables, the first one's header excepted."""
    for chip in options.chips:
        for name in options.shapes:
            plain = _schedule(folder, chip, SHAPES[name], None)
            for levels, group_size in itertools.product(options.levels, options.groups):
                fused = _schedule(folder, chip, SHAPES[name], group_size, levels)
                yield _row(chip, name, group_size, levels, plain, fused)
    yield from ["", *EPILOGUE_HEADER.splitlines()]
    for chip in options.chips:
        for name in EPILOGUE_SHAPES:
            shape = SHAPES[name]
            alone = _schedule(folder, chip, shape, 16)
            for title, parts in EPILOGUES.items():
                schedule = _schedule(folder, chip, shape, 16, parts=parts) if parts else alone
                steps = [_steps(x, shape, 16) for x in (schedule, alone)]
                cells = [chip, name, title, str(schedule.last), f"{steps[0]:.0f}"]
                yield f"| {' | '.join([*cells, f'{steps[0] / steps[1]:.3f}'])} |"


def _title() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return f"`python scripts/aot_report.py`, {versions}, {datetime.now(UTC):%Y-%m-%d}."


def _schedule(
    folder: Path,
    chip: str,
    shape: Shape,
    group_size: int | None,
    levels: str = "uniform",
    *,
    parts: tuple[str, ...] = (),
) -> aot.Schedule:
    for file in folder.iterdir():
        file.unlink()
    kind = {"levels": levels, "step": "integer" if levels == "stretched" else "power"}
    arguments = aot.tpu_matmul_arguments(shape.m, shape.n, shape.k, group_size=group_size, **kind)
    aot.compile_for_tpu(chip, mosaic_tpu.matmul_prepared, *arguments, _epilogue(shape, parts))
    kernel = "int8_matmul" if group_size is None else "quartz_matmul"
    endings = "final_bundles", "final_hlo-static-per-bundle-utilization"
    bundles, utilization = (
        max(folder.glob(f"*{kernel}*[0-9]-{ending}.txt")).read_text() for ending in endings
    )
    return aot.read_schedule(bundles, utilization)


def _epilogue(shape: Shape, parts: tuple[str, ...]) -> Epilogue:
    """Return shapes of the named parts of an epilogue."""

    def array(*extents):
        return jax.ShapeDtypeStruct(extents, jnp.bfloat16)

    given = {
        "bias": array(shape.n),
        "gate": array(shape.n),
        "residual": array(shape.m, shape.n),
    }
    activation = "gelu" if "gelu" in parts else None
    return Epilogue(activation=activation, **{name: given[name] for name in parts if name in given})


def _steps(schedule: aot.Schedule, shape: Shape, group_size: int | None, m: int = 0) -> float:
    """Return the mean bundles of a grid step, at the shape's own m or another."""
    tile_m, tile_k, _ = mosaic_tpu.tile_sizes(shape.m, shape.n, shape.k, group_size)
    return schedule.per_step(-(-(m or shape.m) // tile_m), -(-shape.k // tile_k))


def _row(
    chip: str,
    name: str,
    group_size: int,
    levels: str,
    plain: aot.Schedule,
    fused: aot.Schedule,
) -> str:
    shape = SHAPES[name]
    both = (plain, fused)
    whole = [_steps(schedule, shape, group_size) for schedule in both]
    single = [_steps(schedule, shape, group_size, m=1) for schedule in both]
    shares = [f"{schedule.matrix / steps:.0%}" for schedule, steps in zip(both, whole, strict=True)]
    cells = [
        chip,
        name,
        f"{shape.m}, {shape.n}, {shape.k}",
        str(group_size) + " stretched" * (levels == "stretched"),
        *(f"{steps:.0f}" for steps in whole),
        f"{whole[1] / whole[0]:.3f}",
        f"{single[1] / single[0]:.3f}",
        ", ".join(shares),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.run(main))
