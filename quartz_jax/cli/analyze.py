"""Reproduce the QuaRTZ paper's analyses on a model's own activations: a page and its figures.

    quartz analyze --count 16 --out outputs/report.analyses.html
    quartz analyze --recorded outputs/evaluation.rows.npz

The second form takes the inputs that evaluate recorded.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from quartz_jax import pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.engine.observe import load_statistics, observe
from quartz_jax.evaluation import analysis, paired
from quartz_jax.evaluation.pages import html as pages
from quartz_jax.evaluation.pages.analysis import analysis_page
from quartz_jax.evaluation.prompts import read_lines
from quartz_jax.io.files import atomic_file, check_output
from quartz_jax.recipes import get_recipe, sites
from quartz_jax.transforms.base import Need


def main(argv: Sequence[str] | None = None) -> None:
    """Record, analyse and write the page and, beside it, the figures as JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    size = cli.parse_size(args.size)
    check_output(args.out)
    pages.check_plots()
    rows = recorded(args) if args.recorded else sampled(args, size)
    bar = tqdm(rows.items(), desc="analysing", unit="layer")
    layers = [analysis.analyse_layer(path, flat) for path, flat in bar]
    tokens = len(next(iter(rows.values())))
    date = datetime.datetime.now(datetime.UTC).date()
    made = (
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {date}, {tokens} tokens a layer."
    )
    command = " ".join(["quartz analyze", *argv])
    title = f"The QuaRTZ paper's analyses on {args.model.resolve().name}"
    with atomic_file(args.out.with_suffix(".json")) as partial:
        figures: dict[str, Any] = {"made": made, "command": command}
        figures["layers"] = [dataclasses.asdict(layer) for layer in layers]
        partial.write_text(json.dumps(figures, indent=1) + "\n")
    pages.write_page(args.out, analysis_page(layers, title, made, command))
    for claim, held, words in analysis.findings(layers):
        print("held:  " if held else "didn't:", f"{claim}: {words}")


def recorded(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return the rows of a file of evaluate, [tokens, k] by path.

    Raises:
      ValueError: it holds none.
    """
    chosen = quantized_inputs(pipelines.abstract_main(args.model))
    seen = load_statistics(args.recorded)
    rows = {name: _flat(seen[name].rows) for name in chosen if name in seen}
    if not rows:
        raise ValueError(f"{args.recorded} holds no inputs of {args.model}'s linears")
    return rows


def sampled(
    args: argparse.Namespace, size: tuple[int, int] | tuple[None, None]
) -> dict[str, np.ndarray]:
    """Return what the linears are given while the 16-bit model samples, [tokens, k] by path."""
    prompts = read_lines(args.prompts or args.model / "prompts.txt")
    prompts = [prompts[i % len(prompts)] for i in range(args.count)]
    original = pipelines.load_16_bit(args.model)
    base, _ = pipelines.apply_recipe(original, get_recipe("bf16"))
    options = paired.SamplingOptions.of(base, size, args.steps, args.guidance, args.true_cfg)
    noise = base.initial_noise(jax.random.key(0), len(prompts), options.height, options.width)
    samples = paired.calibration_samples(base, prompts, noise, options, args.batch)
    transformer = pipelines.loaded_main(base)
    rows: frozenset[Need] = frozenset({"rows"})
    needs = dict.fromkeys(quantized_inputs(transformer), rows)
    seen = observe(transformer, samples, needs, rows=args.rows * len(samples))
    return {path: _flat(found.rows) for path, found in seen.items()}


def quantized_inputs(transformer) -> list[str]:
    """Return the linears whose inputs the paper's recipe quantizes."""
    assigned = get_recipe("w4a4").assign(sites(transformer))
    return [path for path, layer in assigned.items() if layer.activation is not None]


def _flat(rows) -> np.ndarray:
    """Return rows of calls, [calls, rows, k], as [tokens, k]."""
    return np.asarray(rows).reshape(-1, rows.shape[-1])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="quartz analyze", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=pipelines.EMBEDDED_MODEL, help="16-bit model folder")
    add("--recorded", type=Path, help="take inputs from this file of evaluate; no sampling")
    add("--prompts", type=Path, help="file with one a line; default: the model's prompts.txt")
    add("--count", type=cli.positive, default=16, help="prompts")
    add("--batch", type=cli.positive, default=8, help="images at a time")
    add("--rows", type=cli.positive, default=64, help="tokens kept a call of a layer")
    cli.add_sampling(parser)
    add("--out", type=Path, default=Path("outputs/report.analyses.html"), help="the page")
    return parser.parse_args(argv)
