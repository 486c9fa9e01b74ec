"""Time quantized convolutions against bfloat16's at the shapes of SDXL's UNet.

    python scripts/benchmark_convolutions.py --out convolutions.json

Every row is a whole layer under jit, from bfloat16 images to bfloat16 images: quantizing,
unfolding, the product with its scales, bias. "matmul" unfolds int8 windows for the kernels of
linears, with weights in the order that they read; "xla" is XLA's int8 convolution with weights
decoded in the call; "window" quantizes unfolded floats. Results of "xla" are compared with those
of "matmul", which are of the same integers. `of bf16` is the speed relative to XLA's bfloat16
convolution.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.convolution import Conv
from pallas_kernels import timing
from quartz_jax import LayerRecipe, Match, Recipe, Rule, get_recipe, place, quantize_model
from quartz_jax.cli import arguments as cli
from quartz_jax.io import provenance
from quartz_jax.io.files import check_output

# (height and width, channels, outputs, pixels of a window along a side, stride): of SDXL at 1024
# pixels, each with the times that a step runs it
SHAPES = {
    (128, 320, 320, 3, 1): 7,
    (128, 320, 320, 3, 2): 1,
    (128, 640, 320, 3, 1): 2,
    (128, 960, 320, 3, 1): 1,
    (128, 640, 640, 3, 1): 1,  # behind doubled sides
    (64, 320, 640, 3, 1): 1,
    (64, 640, 640, 3, 1): 6,
    (64, 640, 640, 3, 2): 1,
    (64, 1280, 1280, 3, 1): 1,  # behind doubled sides
    (64, 960, 640, 3, 1): 1,
    (64, 1280, 640, 3, 1): 1,
    (64, 1920, 640, 3, 1): 1,
    (32, 640, 1280, 3, 1): 1,
    (32, 1280, 1280, 3, 1): 10,
    (32, 1920, 1280, 3, 1): 1,
    (32, 2560, 1280, 3, 1): 2,
}
RECIPES = ("w8a8", "w4a8x", "w4a4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    shape: tuple[int, ...]  # a key of `SHAPES`
    count: int  # layers of that shape in a step
    recipe: str
    way: str  # "bf16", "matmul", "xla" or "window"
    runs: str  # what `place` says of it
    ms: float | None = None  # median time of a call
    times_ms: tuple[float, ...] = ()  # of each batch, a call
    of_bf16: float | None = None  # speed over the bfloat16 convolution's
    same: bool | None = None  # whether the results are those of "matmul"
    error: str | None = None  # why it did not run


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status is 1 if something failed."""
    options = _parse(argv)
    if options.out:
        check_output(options.out)
    rows: list[Row] = []
    for shape, count in list(SHAPES.items())[: options.shapes]:
        rows += _time_shape(shape, count, options)
    _print_totals(rows)
    if options.out:
        found = [dataclasses.asdict(row) for row in rows]
        result = {"environment": provenance.environment(), "batch": options.batch, "rows": found}
        provenance.write_results(options.out, result)
    bad = [f"{row.shape} {row.recipe} {row.way}" for row in rows if row.error or row.same is False]
    if bad:
        print("error: wrong or failed:", "; ".join(bad), file=sys.stderr)
    return int(bool(bad))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file for the results")
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    add("--batch", type=cli.positive, default=1, help="images")
    add("--batches", type=cli.positive, default=5, help="batches whose median counts")
    add("--shapes", type=cli.positive, help="only so many of the shapes, the first")
    add("--scale", type=cli.positive, default=1, help="divide sides and channels, for a trial")
    return parser.parse_args(argv)


def _time_shape(shape: tuple[int, ...], count: int, options: argparse.Namespace) -> list[Row]:
    """Time every way to run a shape."""
    side, channels, outputs, size, stride = shape
    side, channels, outputs = (x // options.scale for x in (side, channels, outputs))
    model = nnx.Sequential(
        Conv(
            channels,
            outputs,
            size,
            strides=stride,
            role="conv",
            dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
    )
    keys = jax.random.split(jax.random.key(0), 4)
    given = (options.batch, side, side, channels)
    normal = (jax.random.normal(key, given, jnp.float32) for key in keys)
    images = [(nnx.silu(x).astype(jnp.bfloat16),) for x in normal]
    make: dict[str, Any] = {"shape": shape, "count": count}
    plain = _timed(Row(**make, recipe="bf16", way="bf16", runs="XLA"), model, images, options)[0]
    rows = [plain]
    for recipe in options.recipes:
        made, _ = quantize_model(model, _of_convolutions(recipe))
        expected = None
        for way in ("matmul", "xla", "window"):
            placed, placement = place(made, convolutions="xla" if way == "xla" else "matmul")
            runs = placement.layers["layers.0"]
            row = Row(**make, recipe=recipe, way=way, runs=runs)
            row, result = _timed(row, placed, images, options, plain.ms)
            expected = result if way == "matmul" else expected
            if way == "xla" and result is not None and expected is not None:
                row = dataclasses.replace(row, same=bool(np.array_equal(result, expected)))
            rows.append(row)
    return rows


def _of_convolutions(name: str) -> Recipe:
    """Return what a recipe does to convolutions of residual blocks."""
    rule = next(r for r in get_recipe(name).rules if r.match.roles and "conv" in r.match.roles)
    layer: LayerRecipe = rule.layer
    return Recipe(name=name, rules=(Rule(match=Match(kind="conv"), layer=layer),))


def _timed(
    row: Row,
    model: nnx.Sequential,
    images: Sequence[tuple],
    options: argparse.Namespace,
    bf16: float | None = None,
) -> tuple[Row, Any]:
    """Return a row with its times, and the result for the first image."""
    try:
        graphdef, state = nnx.split(model)

        @jax.jit
        def run(state, x):  # weights as arguments, so that no decoding is done while compiling
            layer = nnx.merge(graphdef, state).layers[0]
            return layer.by_window(x) if row.way == "window" else layer(x)

        sets = [(state, *image) for image in images]
        result = np.asarray(run(*sets[0]))
        seconds = timing.measure(run, sets, batches=options.batches)
        ms = 1e3 * statistics.median(seconds)
        times = tuple(1e3 * x for x in seconds)
        speed = None if bf16 is None else bf16 / ms
        row = dataclasses.replace(row, ms=ms, times_ms=times, of_bf16=speed)
    except Exception as error:
        row, result = dataclasses.replace(row, error=f"{type(error).__name__}: {error}"[:300]), None
    shown = "failed" if row.ms is None else f"{row.ms:8.4f} ms"
    speed = "" if row.of_bf16 is None else f"{row.of_bf16:6.2f} of bf16"
    print(f"{row.shape!s:26} {row.recipe:6} {row.way:7} {shown} {speed}  {row.runs}", flush=True)
    return row, result


def _print_totals(rows: Sequence[Row]) -> None:
    """Print the time of all convolutions of a step in each way."""
    ways = dict.fromkeys((row.recipe, row.way) for row in rows)
    for recipe, way in ways:
        mine = [row for row in rows if (row.recipe, row.way) == (recipe, way)]
        if all(row.ms is not None for row in mine):
            total = sum(row.count * (row.ms or 0) for row in mine)
            print(f"all of a step: {recipe:6} {way:7} {total:8.3f} ms")


if __name__ == "__main__":
    sys.exit(cli.run(main))
