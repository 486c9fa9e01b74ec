"""Quantize a model while it is read, into a folder that `quartz generate` can use.

The model is a diffusers folder, or a single file such as flux1-dev.safetensors in its makers'
naming with --text-encoders. Calibrated recipes see what the 16-bit transformer is given while it
draws the calibration prompts. Run the same command again after an interruption and it goes on where
it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from quartz_jax import pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.conversion import checkpoint
from quartz_jax.evaluation.prompts import read_lines


def main(argv: Sequence[str] | None = None) -> None:
    """Quantize, save and print the reports; or print what would be done."""
    args = parse(argv)
    recipes = cli.component_recipes(args.recipe)
    checkpoint.check_target(args.out, overwrite=args.overwrite)
    if checkpoint.is_checkpoint(args.model):
        raise ValueError(f"{args.model} is quantized already; give the 16-bit model as --model")
    size = cli.parse_size(args.calibration_size)
    prompts = read_lines(args.calibration) if args.calibration else []
    calibration = None
    if any(recipe.calibrated for recipe in recipes.values()):
        opened = pipelines.open_16_bit(
            args.model, {}, text_encoders=args.text_encoders, schedule=args.schedule
        )
        prompts = prompts or pipelines.calibration_prompts(opened.pipeline)
        calibration = pipelines.calibrate(
            opened.pipeline,
            prompts[: args.calibration_samples],
            seed=args.seed,
            steps=args.calibration_steps,
            size=size,
            propagate=args.propagate,
        )
    conversion = pipelines.plan_conversion(
        args.model,
        recipes,
        text_encoders=args.text_encoders,
        schedule=args.schedule,
        calibration=calibration,
    )
    if args.dry_run:
        print(conversion.plan())
        return
    manifest = conversion.run(args.out, overwrite=args.overwrite, progress=True)
    for component in manifest.components.values():
        print(component.report.table())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="quartz quantize", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=pipelines.EMBEDDED_MODEL,
        help="16-bit model: folder or single file",
    )
    add("--recipe", default="w4a8x", help=cli.COMPONENT_RECIPES)
    add("--text-encoders", type=Path, help="diffusers folder with what a single file lacks")
    cli.add_schedule(parser)
    add("--out", type=Path, required=True, help="folder to make")
    add("--overwrite", action="store_true", help="replace the checkpoint at --out; start anew")
    add("--dry-run", action="store_true", help="print layers, formats and bytes; write nothing")
    calibration = parser.add_argument_group("for calibrated recipes")
    add = calibration.add_argument
    add("--calibration", type=Path, help="prompts, one a line; default: ours")
    add("--calibration-samples", type=cli.positive, default=64, help="images to draw, at most")
    add("--calibration-steps", type=cli.positive, default=4, help="steps to look at, of each image")
    add("--calibration-size", metavar="WxH", help="multiples of 16; default: the model's")
    add("--seed", type=cli.seed, default=0, help="of their noise")
    add("--propagate", action="store_true", help="let layers see what quantized ones before give")
    return parser.parse_args(argv)
