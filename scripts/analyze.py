"""Reproduce the QuaRTZ paper's analyses on a model's own activations: a page and its figures.

    python scripts/analyze.py --count 16 --out outputs/report.analyses.html
    python scripts/analyze.py --recorded outputs/evaluation.rows.npz

The second form takes the inputs that evaluate.py recorded.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import evaluate
import jax
from tqdm import tqdm

from models import load_pipeline
from quartz_jax import get_recipe
from quartz_jax import pipelines as common
from quartz_jax.cli import arguments as cli
from quartz_jax.evaluation import analysis, paired
from quartz_jax.evaluation.pages import html as pages
from quartz_jax.evaluation.pages.analysis import analysis_page
from quartz_jax.io.files import atomic_file, check_output
from quartz_jax.methods import LayerStatistics, get_method, load_statistics, record


def main(argv: Sequence[str] | None = None) -> None:
    """Record, analyse and write the page and, beside it, the figures as JSON."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=common.EMBEDDED_MODEL, help="16-bit model folder")
    add("--recorded", type=Path, help="take inputs from this file of evaluate.py; no sampling")
    add("--prompts", type=Path, help="file with one a line; default: the model's prompts.txt")
    add("--count", type=cli.positive, default=16, help="prompts")
    add("--batch", type=cli.positive, default=8, help="images at a time")
    add("--rows", type=cli.positive, default=64, help="tokens kept a call of a layer")
    cli.add_sampling(parser)
    add("--out", type=Path, default=Path("outputs/report.analyses.html"), help="the page")
    args = parser.parse_args(argv)
    size = cli.parse_size(args.size)
    check_output(args.out)
    seen = load_statistics(args.recorded) if args.recorded else sampled(args, size)
    chosen = [path for path in seen if path in quantized_inputs(seen)]
    bar = tqdm(chosen, desc="analysing", unit="layer")
    layers = [analysis.analyse_layer(path, seen[path].flat) for path in bar]
    date = datetime.datetime.now(datetime.UTC).date()
    tokens = len(seen[chosen[0]].flat)
    made = (
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {date}, {tokens} tokens a layer."
    )
    command = " ".join(["python", *sys.argv])
    title = f"The QuaRTZ paper's analyses on {args.model.resolve().name}"
    with atomic_file(args.out.with_suffix(".json")) as partial:
        figures = {"made": made, "command": command}
        figures["layers"] = [dataclasses.asdict(layer) for layer in layers]
        partial.write_text(json.dumps(figures, indent=1) + "\n")
    pages.write_page(args.out, analysis_page(layers, title, made, command))
    for claim, held, figures in analysis.findings(layers):
        print("held:  " if held else "didn't:", f"{claim}: {figures}")


def sampled(args, size: tuple[int, int] | tuple[None, None]) -> dict[str, LayerStatistics]:
    """Return what the linears are given while the 16-bit model samples the prompts."""
    prompts = evaluate.read_prompts(args.prompts or args.model / "prompts.txt", args.count)
    original = load_pipeline(args.model, dtype=common.compute_dtype())
    base, _ = common.apply_recipe(original, get_recipe("bf16"))
    options = paired.SamplingOptions.of(base, size, args.steps, args.guidance, args.true_cfg)
    noise = base.initial_noise(jax.random.key(0), len(prompts), options.height, options.width)
    run = paired.run_for_recording(base, prompts, noise, options, args.batch)
    return record(base.transformer, run, rows_per_call=args.rows)


def quantized_inputs(paths) -> set[str]:
    """Return the linears whose inputs the methods quantize."""
    method = get_method("quartz")
    return {path for path, rule in method.assign(paths).items() if rule.activation is not None}


if __name__ == "__main__":
    sys.exit(cli.run(main))
