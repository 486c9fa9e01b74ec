"""Quantize the transformer of a model folder and save a folder that generate.py can use."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common import EMBEDDED_MODEL, compute_dtype

import models
from models.checkpoint_io import read_json
from quartz_jax import checkpoint, cli, get_recipe, quantize_model
from quartz_jax.files import check_output


def main(argv: Sequence[str] | None = None) -> None:
    """Quantize, save and print the report."""
    args = parse(argv)
    recipe = get_recipe(args.recipe)
    check_output(args.out, folder=True, overwrite=args.overwrite)
    if checkpoint.is_checkpoint(args.model):
        raise ValueError(f"{args.model} is quantized already; give the 16-bit model as --model")
    read_json(args.model / "model_index.json")
    transformer = models.load_component(args.model / "transformer", dtype=compute_dtype())
    transformer, report = quantize_model(transformer, recipe, progress=True)
    checkpoint.save(
        args.out,
        transformer,
        recipe=recipe,
        report=report,
        base=args.model,
        overwrite=args.overwrite,
    )
    print(report.table())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="16-bit model folder")
    parser.add_argument("--recipe", default="w4a4", help="built-in recipe or .json file")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
