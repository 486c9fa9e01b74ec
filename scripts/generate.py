"""Make images from text with a quantized transformer, beside the 16-bit ones if asked."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np

from models import load_pipeline
from models.pipeline import FluxPipeline
from quartz_jax import checkpoint, cli, get_recipe, images
from quartz_jax.files import check_output
from quartz_jax.metrics import psnr, ssim
from quartz_jax.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    """Generate, save a PNG and print what was done."""
    args = parse(argv)
    size = cli.parse_size(args.size)
    cli.check_prompts(args.prompt)
    check_output(args.out)
    pipeline, report, base = open_model(args)
    start = time.perf_counter()
    pictures = sample(pipeline, args, size)
    result = {"recipe": report.recipe, "seed": args.seed, "seconds": time.perf_counter() - start}
    result |= {"transformer_bytes": report.bytes, "transformer_bytes_bf16": report.bytes_bf16}
    result |= {"psnr": None, "ssim": None, "out": str(args.out)}
    if base is None:
        rows, labels = images.square([[picture] for picture in pictures]), []
    else:
        originals = sample(base, args, size)
        result["psnr"] = float(np.mean(psnr(pictures, originals)))
        result["ssim"] = float(np.mean(ssim(pictures, originals)))
        rows = images.square(list(zip(originals, pictures, strict=True)))
        labels = ["bf16", report.recipe] * (len(rows[0]) // 2)
    images.save_png(images.grid(rows, labels), args.out)
    show(result)
    if args.json:
        print(json.dumps(result))


def open_model(args: argparse.Namespace) -> tuple[FluxPipeline, Report, FluxPipeline | None]:
    """Return the quantized pipeline, its report and, to compare with, the one in bf16."""
    if checkpoint.is_checkpoint(args.model):
        own = checkpoint.read_manifest(args.model).recipe
        if args.recipe and get_recipe(args.recipe) != own:
            raise ValueError(f"{args.model} is quantized as {own.name!r}; leave out --recipe")
        if args.compare:
            raise ValueError(f"--compare needs a 16-bit model, and {args.model} is quantized")
        return *common.open_checkpoint(args.model), None
    recipe = get_recipe(args.recipe or "w4a4")
    original = load_pipeline(args.model, dtype=common.compute_dtype())
    pipeline, report = common.apply_recipe(original, recipe)
    base = common.apply_recipe(original, get_recipe("bf16"))[0] if args.compare else None
    return pipeline, report, base


def sample(
    pipeline: FluxPipeline, args: argparse.Namespace, size: tuple[int | None, int | None]
) -> np.ndarray:
    """Return one image a prompt, [prompts, height, width, 3], floats in 0..1."""
    width, height = size
    return np.asarray(
        pipeline(
            args.prompt,
            width=width,
            height=height,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            true_cfg_scale=args.true_cfg,
            seed=args.seed,
            output_type="np",
        )
    )


def show(result: dict) -> None:
    """Print the result for people."""
    ratio = result["transformer_bytes"] / result["transformer_bytes_bf16"]
    megabytes = result["transformer_bytes"] / 1e6
    print(f"{result['out']}: {result['recipe']}, seed {result['seed']}, {result['seconds']:.1f} s")
    print(f"transformer {megabytes:.1f} MB, {ratio:.3f} of bf16")
    if result["psnr"] is not None:
        print(f"to bf16: PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.4f}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=common.EMBEDDED_MODEL, help="model or quantized checkpoint")
    add("--recipe", help="built-in recipe or .json file; default w4a4, or the checkpoint's own")
    add("--prompt", nargs="*", default=[], metavar="TEXT", help="one image for each")
    cli.add_sampling(parser)
    add("--seed", type=int, default=0, help="of the noise")
    add("--out", type=Path, default=Path("outputs/image.png"), help="PNG to write")
    add("--compare", action="store_true", help="also run bf16 from the same noise")
    add("--json", action="store_true", help="print one JSON object on the last line")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
