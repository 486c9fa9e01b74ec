"""Compile a denoising step of a full-size model for a TPU that isn't there; print what it takes.

    python scripts/aot_step.py --model flux-2-klein-4b --recipes w8a8 w4a8x --chips v5e v6e

Needs the libtpu that matches the installed JAX. The compiler refuses what a chip's memory can't
hold; what it plans for the rest is printed as the rows of a table in Markdown.
"""

import argparse
import dataclasses
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.family import Family
from models.sampler import denoising_step
from pallas_kernels import aot, compat
from quartz_jax import get_recipe, place
from quartz_jax.cli import arguments as cli
from quartz_jax.conversion.model import quantize_shapes
from scripts.benchmark_model import MODELS, Step

HEADER = """\
| chip | recipe | weights and inputs, GiB | temporary, GiB | compiling, s |
|---|---|---|---|---|"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What the compiler plans for a step."""

    arguments: int  # bytes of weights and inputs
    temporary: int  # bytes
    seconds: float  # that compiling took
    kernels: frozenset[str]  # names of those that the program calls


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = parse(argv)
    width, height = cli.parse_size(args.size)
    if reason := compat.libtpu_why_not():
        raise ValueError(f"no TPU compiler: {reason}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{args.model}, {args.size}, {versions}, {datetime.now(UTC):%Y-%m-%d}\n\n{HEADER}")
    family = MODELS[args.model]
    for chip in args.chips:
        for name in args.recipes:
            model = quantized(family, family.sizes[args.model][family.main], name)
            step = planned(chip, family, args.model, model, (height, width), args.text_tokens)
            sizes = [f"{size / 2**30:.2f}" for size in (step.arguments, step.temporary)]
            print(f"| {' | '.join([chip, name, *sizes, f'{step.seconds:.0f}'])} |", flush=True)


def quantized(family: Family, config: Any, recipe: str) -> nnx.Module:
    """Return a family's main component as a recipe stores it, with shapes in place of arrays."""
    build = family.components[family.main].build
    model = nnx.eval_shape(lambda: build(config, jnp.bfloat16))
    return quantize_shapes(model, get_recipe(recipe))


def planned(
    chip: str,
    family: Family,
    name: str,
    model: nnx.Module,
    size: tuple[int, int],  # height, width
    text_tokens: int,
) -> Planned:
    """Compile a step of a published model for a chip.

    Raises:
      RuntimeError: what the compiler says, such as that the chip's memory is too small.
    """
    static: dict[str, Any] = {}  # what tracing finds besides arrays

    def prepare(state: nnx.State) -> tuple:
        placed = place(nnx.merge(stored, state), dtype=jnp.bfloat16, in_place=True)[0]
        first = Step.of(family, name, placed, jax.random.key(0), size, text_tokens)
        static["model"], state = nnx.split(placed)
        static["step"] = first.static
        return state, first.arguments

    def step(state: nnx.State, *inputs: Any) -> Any:
        return denoising_step(nnx.merge(static["model"], state), *static["step"], *inputs)

    stored, state = nnx.split(model)
    with aot.tracing_for_tpu(chip):
        state, inputs = jax.eval_shape(prepare, state)
    start = time.perf_counter()
    compiled = aot.compile_for_tpu(chip, step, state, *inputs)
    memory = compiled.memory_analysis()
    return Planned(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        seconds=time.perf_counter() - start,
        kernels=aot.kernels(compiled),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=MODELS, default="flux1-dev", help="whose sizes to take")
    add("--recipes", nargs="+", metavar="RECIPE", default=["w8a8", "w4a8x"])
    add("--chips", nargs="+", choices=aot.TPU_CHIPS, default=["v5e", "v6e"])
    add("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels, multiples of 16")
    add("--text-tokens", type=cli.positive, default=512)
    return parser.parse_args(argv)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.run(main))
