"""Make images from text, and perhaps an image, with a quantized transformer; tell what it took."""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quartz_jax import pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import cache as compilation_cache
from quartz_jax.conversion import checkpoint
from quartz_jax.evaluation.metrics import psnr, ssim
from quartz_jax.evaluation.prompts import check_prompts
from quartz_jax.io import images
from quartz_jax.io.files import check_apart, check_output
from quartz_jax.recipes import MAIN

IMAGE = "image file that the model looks at: what it edits, paints in or follows; may be repeated"
SCALE = "how much an --image counts, one each; default 1; only of models that vary pictures"
_ITSELF = Path()  # what --compare without a model stands for


def main(argv: Sequence[str] | None = None) -> None:
    """Generate, save a PNG or one a prompt, and print what was done."""
    args = parse(argv)
    start = time.perf_counter()
    options = sampling_options(args)
    files = output_files(args)
    compilation_cache.enable(not args.no_cache)
    opened, base = open_model(args)
    check_negative(args, opened.pipeline)
    pictures = sample(opened.pipeline, args, options)
    seconds, report = time.perf_counter() - start, opened.report
    result = {"recipe": report.recipe, "seed": args.seed, "seconds": seconds}
    result |= {"transformer_bytes": report.bytes, "transformer_bytes_bf16": report.bytes_bf16}
    names = [str(file) for file in files]
    result |= {"psnr": None, "ssim": None, "out": names if args.separate else names[0]}
    result |= {"stages": stages(opened.pipeline.times, seconds)}
    result |= {"peak_bytes": opened.pipeline.times.peak_bytes or None}
    result |= {"programs": compilation_cache.counts() or None}
    items, labels = [[picture] for picture in pictures], []
    if base is not None:
        originals = sample(base.pipeline, args, options)
        result["psnr"] = float(np.mean(psnr(pictures, originals)))
        result["ssim"] = float(np.mean(ssim(pictures, originals)))
        items = [list(pair) for pair in zip(originals, pictures, strict=True)]
        labels = ["bf16", report.recipe]
    for file, shown in zip(files, [[x] for x in items] if args.separate else [items], strict=True):
        rows = images.square(shown)
        images.save_png(images.grid(rows, labels * (len(rows[0]) // 2)), file)
    show(result)
    if args.json:
        print(json.dumps(result))


def output_files(args: argparse.Namespace) -> list[Path]:
    """Return the PNGs to write, which can be written: one, or x-1.png and such for x.png."""
    check_output(args.out)
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {args.out}, and a PNG is written; give a name ending in .png")
    count = len(args.prompt)
    numbers = [f"-{i:0{len(str(count))}}" for i in range(1, count + 1)] if args.separate else [""]
    files = [args.out.with_name(f"{args.out.stem}{x}{args.out.suffix}") for x in numbers]
    given = [file for file in (args.init_image, *args.image, args.mask) if file]
    for file in files:
        check_output(file)
        check_apart(file, given)
    return files


def check_negative(args: argparse.Namespace, pipeline: Any) -> None:
    """Raise ValueError for a negative prompt that nothing would look at."""
    scale = pipeline.defaults.true_cfg_scale if args.true_cfg is None else args.true_cfg
    if args.negative_prompt and scale == 1:
        raise ValueError(
            "--negative-prompt only counts with classifier-free guidance; add --true-cfg, such as 4"
        )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Check what shapes the images, and return it as arguments of a pipeline."""
    width, height = cli.parse_size(args.size)
    check_prompts(args.prompt)
    cli.check_strength(args.strength, args.init_image)
    image = images.read_image(args.init_image) if args.init_image else None
    looked: dict[str, Any] = {"references": [images.read_image(file) for file in args.image]}
    looked |= {"reference_scales": args.image_scale}
    looked |= {"mask": images.read_image(args.mask) if args.mask else None}
    options = {"width": width, "height": height, "num_inference_steps": args.steps}
    options |= {"guidance_scale": args.guidance, "true_cfg_scale": args.true_cfg}
    options |= {"negative_prompt": args.negative_prompt}
    return options | looked | {"image": image, "strength": args.strength, "seed": args.seed}


def open_model(args: argparse.Namespace) -> tuple[pipelines.Opened, pipelines.Opened | None]:
    """Return the quantized pipeline and, to compare with, the one in bf16."""
    loras = cli.lora_scales(args.lora, args.lora_scale)
    options: dict[str, Any] = {"loras": loras, "expand": args.expand}
    options |= {"lora_transformer_only": args.lora_transformer_only}
    options |= {"text_encoders": args.text_encoders}
    if checkpoint.is_checkpoint(args.model):
        _check_checkpoint(args)
        opened = pipelines.open_checkpoint(args.model, **options)
        if not args.compare:
            return opened, None
        pipelines.warn_of_other_base(args.model, args.compare)
        if args.compare.is_file():  # which lacks what the checkpoint has
            options["text_encoders"] = args.text_encoders or args.model
        else:
            options["text_encoders"] = None
        return opened, pipelines.open_16_bit(args.compare, {}, **options)
    if args.compare not in (None, _ITSELF):
        raise ValueError(f"{args.model} is a 16-bit model; leave out what --compare names")
    options |= {"schedule": args.schedule}
    recipes = cli.component_recipes(args.recipe or "w4a8x")
    opened = pipelines.open_16_bit(args.model, recipes, **options)
    return opened, pipelines.open_16_bit(args.model, {}, **options) if args.compare else None


def _check_checkpoint(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that don't go with a checkpoint."""
    manifest = checkpoint.read_manifest(args.model)
    own = {name: component.recipe for name, component in manifest.components.items()}
    own[MAIN] = manifest.recipe
    if args.recipe and any(
        own.get(name) != recipe for name, recipe in cli.component_recipes(args.recipe).items()
    ):
        names = " and ".join(repr(x.recipe.name) for x in manifest.components.values())
        raise ValueError(f"{args.model} is quantized as {names}; leave out --recipe")
    if args.compare == _ITSELF:
        raise ValueError(
            f"{args.model} is quantized; name the 16-bit model to compare it with: --compare MODEL"
        )
    if args.schedule:
        raise ValueError(f"{args.model} has a schedule; leave out --schedule")


def sample(pipeline: Any, args: argparse.Namespace, options: dict[str, Any]) -> np.ndarray:
    """Return one image a prompt, [prompts, height, width, 3], floats in 0..1."""
    pipeline = pipeline.load() if args.keep_loaded else pipeline
    return np.asarray(pipeline(args.prompt, output_type="np", **options))


def stages(times: Any, total: float) -> dict[str, float]:
    """Return the seconds of each stage; the first step, which compiles, apart from the others."""
    seconds = {name: sum(several) for name, several in times.seconds.items() if name != "step"}
    first, *others = times.seconds["step"]
    seconds |= {"first step": first, "other steps": sum(others)}
    seconds["rest"] = total - sum(seconds.values())
    return seconds | {"median step": statistics.median(others) if others else None}


def show(result: dict) -> None:
    """Print the result for people."""
    ratio = result["transformer_bytes"] / result["transformer_bytes_bf16"]
    megabytes = result["transformer_bytes"] / 1e6
    out = result["out"]
    out = out if isinstance(out, str) else f"{out[0]} to {out[-1]}"
    print(f"{out}: {result['recipe']}, seed {result['seed']}, {result['seconds']:.1f} s")
    print(f"transformer {megabytes:.1f} MB, {ratio:.3f} of bf16")
    for name, seconds in result["stages"].items():
        if name != "median step":
            print(f"{name:>22} {seconds:8.2f} s {seconds / result['seconds']:6.1%}")
    if (step := result["stages"]["median step"]) is not None:
        print(f"{'a step':>22} {1e3 * step:8.1f} ms, the median after the first")
    if result["peak_bytes"]:
        gigabytes = max(result["peak_bytes"].values()) / 1e9
        print(f"{'device memory':>22} {gigabytes:8.2f} GB at most")
    if result["programs"]:
        print(
            f"{'programs':>22} {result['programs']['compiled']} compiled, "
            f"{result['programs']['from_cache']} from the cache"
        )
    if result["psnr"] is not None:
        print(f"to bf16: PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.4f}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="quartz generate", description=__doc__)
    add = parser.add_argument
    add(
        "--model", type=Path, default=pipelines.EMBEDDED_MODEL, help="model or quantized checkpoint"
    )
    add("--text-encoders", type=Path, help="diffusers folder that gives what --model lacks")
    add("--recipe", help=f"{cli.COMPONENT_RECIPES}; default w4a8x, or the checkpoint's own")
    cli.add_schedule(parser)
    add("--prompt", nargs="*", default=[], metavar="TEXT", help="one image for each")
    add("--negative-prompt", default="", metavar="TEXT", help="to steer away from; with --true-cfg")
    add("--init-image", type=Path, help="image file to start from, resized to --size")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help=IMAGE)
    add("--image-scale", type=cli.finite, action="append", default=[], metavar="S", help=SCALE)
    add("--mask", type=Path, help="image file, white where --image is painted anew")
    add("--strength", type=float, help="how far it is replaced, 0 to 1; default: the model's")
    add("--lora", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    add("--lora-scale", type=cli.finite, action="append", default=[], metavar="S", help="default 1")
    add(
        "--lora-transformer-only",
        action="store_true",
        help="leave out what the files hold for text encoders, which take no adapter here",
    )
    cli.add_sampling(parser)
    add("--seed", type=cli.seed, default=0, help="of the noise")
    add("--out", type=Path, default=Path("outputs/image.png"), help="PNG to write")
    add("--separate", action="store_true", help="one PNG a prompt, x-1.png and such for x.png")
    add(
        "--compare",
        type=Path,
        nargs="?",
        const=_ITSELF,
        metavar="MODEL",
        help="also run bf16 from the same noise; of a checkpoint, name its 16-bit model",
    )
    add("--expand", action="store_true", help="keep 4-bit weights as int8: twice the memory")
    add("--keep-loaded", action="store_true", help="load all models first and keep them")
    add("--no-cache", action="store_true", help="compile anew, and keep nothing of it on disk")
    add("--json", action="store_true", help="print one JSON object on the last line")
    return parser.parse_args(argv)
