r"""Compare recipes and checkpoints with bf16 over many prompts, from the same noise, resumable.

    quartz evaluate --recipes w4a8x,w4a4,nvfp4,svdquant+int4-g64
    quartz evaluate --recipes w4a8x,w4a4,bench --count 512 --batch 64 --calibration 128 --jobs 10
    quartz evaluate --recipes w4a8x --checkpoint QUANTIZED

Recipes are built-in names, .json files, or methods by their parts (quartz_jax/recipes/names.py);
"bench" is the whole comparison, and bf16 is added by itself. Rows say whether this library's
kernels execute a recipe or only its arithmetic is simulated. Run the same command again to go on
where it stopped. Most of the time goes into compiling a program a recipe: --jobs spreads the
recipes over processes, which share the device (or several) and the compiled programs on disk.

FID, CLIP score and LPIPS as they are published for such models, with their real networks:

    pip install -e '.[published]'
    quartz evaluate --model FLUX.1-dev --recipes w4a8x,w4a4 --count 5000 \
        --prompts MJHQ-30K/meta_data.json --real MJHQ-30K --inception weights-inception.pth \
        --clip clip-vit-large-patch14 --lpips alexnet.pth

Images are kept beside the results: 5000 of 1024x1024 take 16 GB a recipe, and 63 GB for the 16-bit
model's in float32, which all recipes and processes are compared with.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quartz_jax import pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import cache as compilation_cache
from quartz_jax.evaluation import bench, results, shards
from quartz_jax.io.files import check_output, locked

_RECIPES = "w8a8,w4a16,w4a8x,w4a8,w4a4x,w4a4,w4a4-paper,int4"


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, keep the results in a file and print a table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    pipelines.compile_quickly()
    rows = bench.open_rows(args.recipes, args.checkpoint, simulated=args.simulated)
    if args.jobs > 1:  # before the device is asked for its memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    compilation_cache.enable()
    check_output(args.out)
    lock = args.out.with_name(f".{args.out.name}.lock")
    with locked(lock, args.out) if args.shard is None else contextlib.nullcontext():
        compared = bench.Bench(options(args), rows)
        evaluate(compared, args, argv)
    found = compared.results["recipes"]
    summaries = [found.get(row.name, {}).get("summary") for row in rows]
    print(results.markdown_table([summary for summary in summaries if summary]))


def evaluate(compared: bench.Bench, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure all rows, or those that are this process's."""
    index, count = args.shard or (0, 1)
    try:
        if args.jobs > 1:
            shards.spread(compared, args.jobs, argv)
        for row in compared.rows[index::count]:
            compared.evaluate(row)
    except bench.OutOfTime:
        print(f"{args.minutes} minutes are over; the same command goes on from here")


def options(args: argparse.Namespace) -> bench.Options:
    """Return what the bench wants of the command line."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(bench.Options)}
    return bench.Options(**given | {"size": cli.parse_size(args.size)})


def parse_shard(text: str) -> tuple[int, int]:
    """Return (index, count) from text such as "2/8", for argparse."""
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise ValueError
    return index, count


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      ValueError: arguments that don't go together.
    """
    parser = cli.ArgumentParser(prog="quartz evaluate", description=__doc__.splitlines()[0])
    _add_compared(parser)
    _add_judges(parser)
    args = parser.parse_args(argv)
    cli.parse_size(args.size)  # refuse it before any work
    if args.shard is not None and (args.jobs > 1 or not args.out.exists()):
        raise ValueError("--shard is what --jobs starts; give --jobs and no --shard")
    if args.real is not None and args.real.is_dir() and args.inception is None:
        raise ValueError(f"--real {args.real} is a folder, which is for FID; give --inception too")
    args.prompts = args.prompts or args.model / "prompts.txt"
    args.calibration_prompts = args.calibration_prompts or _calibration_prompts(args.model)
    return args


def _calibration_prompts(model: Path) -> Path | None:
    own = model / "calibration_prompts.txt"
    return own if own.exists() else None


def _add_compared(parser: argparse.ArgumentParser) -> None:
    """Add what is compared, on what, and how it runs."""
    add = parser.add_argument
    add("--model", type=Path, default=pipelines.EMBEDDED_MODEL, help="16-bit model folder")
    add("--recipes", default=_RECIPES, help='names or .json files, with commas; or "bench"')
    add("--checkpoint", type=Path, action="append", default=[], help="of quantize; one more row")
    add("--simulated", action="store_true", help="each recipe once more, computed in float32")
    add("--prompts", type=Path, help="one a line, or MJHQ-30K's .json; default: the model's own")
    add("--count", type=cli.positive, default=128, help="images a recipe")
    add("--batch", type=cli.positive, default=16, help="images at a time")
    cli.add_sampling(parser)
    add("--seed0", type=cli.seed, default=0, help="of the noise of all images")
    add("--calibration-prompts", type=Path, help="default: the model's own, or the shipped ones")
    add("--calibration", type=cli.positive, default=32, help="prompts to calibrate on")
    add("--calibration-rows", type=cli.positive, default=128, help="tokens kept a call of a layer")
    add("--minutes", type=cli.amount, help="stop after so long; the same command goes on")
    add("--jobs", type=cli.positive, default=1, help="processes that share the recipes")
    add("--shard", type=parse_shard, metavar="I/N", help="only every N-th recipe, from number I on")
    add("--out", type=Path, default=Path("outputs/evaluation.json"), help="results, resumed from")


def _add_judges(parser: argparse.ArgumentParser) -> None:
    """Add what images are judged by."""
    add = parser.add_argument
    add("--networks", type=Path, default=Path("outputs/metric_networks"), help="converted ones")
    add("--real", type=Path, help=".npz of real images, for KID; or a folder, for FID")
    add("--real-count", type=cli.positive, default=2048, help="of the .npz, drawn at random")
    add("--inception", type=Path, help="torch-fidelity's weights-inception-*.pth, for FID")
    add("--clip", type=Path, help="folder of a CLIP model in transformers' layout, for CLIP score")
    add("--lpips", type=Path, help="torchvision's alexnet-*.pth, for LPIPS")
    add("--classes", type=Path, help="JSON list of classes (name, in1k), for class agreement")
