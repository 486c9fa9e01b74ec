"""Compare recipes with bf16 over many prompts: PSNR and SSIM from the same noise, resumable."""

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from tqdm import tqdm

from models import load_pipeline
from models.pipeline import FluxPipeline
from quartz_jax import cli, evaluation, get_recipe
from quartz_jax.files import check_output, hash_files

_RECIPES = "w8a8,w4a16,w4a8x,w4a8,w4a4x,w4a4,w4a4-paper,int4"
_SETTINGS = ("steps", "guidance", "true_cfg", "size", "seed0")  # arguments that shape the images


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, keep the results in a file and print a table."""
    args = parse(argv)
    recipes = [get_recipe(name) for name in args.recipes.split(",")]
    prompts = read_prompts(args.prompts, args.count)
    cli.parse_size(args.size)  # refuse it before any work
    check_output(args.out)
    original = load_pipeline(args.model, dtype=common.compute_dtype())
    weights = hash_files(args.model / "transformer", "*.safetensors")
    settings = {name: getattr(args, name) for name in _SETTINGS}
    settings |= {"model": args.model.resolve().name, "sha256": weights, "prompts": prompts}
    results = evaluation.open_results(args.out, settings)
    base, _ = common.apply_recipe(original, get_recipe("bf16"))
    reference = functools.cache(sampler(base, prompts, args))
    for recipe in recipes:
        entry = evaluation.open_scores(results, recipe)
        pipeline, report = common.apply_recipe(original, recipe)
        samples = (sampler(pipeline, prompts, args), reference)
        batches = evaluation.score(*samples, len(prompts), args.batch, entry["scores"])
        done = len(entry["scores"]["psnr"])
        with tqdm(total=len(prompts), initial=done, desc=recipe.name, unit="image") as bar:
            for images in batches:
                evaluation.write_results(args.out, results)
                bar.update(images)
        entry["summary"] = evaluation.summarize(recipe, report, entry["scores"])
        evaluation.write_results(args.out, results)
    print(evaluation.markdown_table([results["recipes"][x.name]["summary"] for x in recipes]))


def sampler(
    pipeline: FluxPipeline, prompts: list[str], args: argparse.Namespace
) -> evaluation.Sample:
    """Return a function that makes images start..stop; noise i depends on --seed0 and i alone."""
    defaults = pipeline.defaults
    width, height = cli.parse_size(args.size)
    width, height = width or defaults.width, height or defaults.height
    options: dict[str, Any] = {"width": width, "height": height}
    noise = pipeline.initial_noise(jax.random.key(args.seed0), len(prompts), height, width)
    options |= {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    options |= {"true_cfg_scale": args.true_cfg, "progress": False, "output_type": "np"}

    def sample(start: int, stop: int) -> np.ndarray:
        return pipeline(prompts[start:stop], latents=noise[start:stop], **options)

    return sample


def read_prompts(path: Path, count: int) -> list[str]:
    """Return `count` prompts from a file with one a line, from its start again at its end."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    return list(itertools.islice(itertools.cycle(cli.check_prompts(lines)), count))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    model = common.EMBEDDED_MODEL
    add("--model", type=Path, default=model, help="16-bit model folder")
    add("--recipes", default=_RECIPES, help="built-in recipes or .json files, with commas")
    add("--prompts", type=Path, default=model / "prompts.txt", help="file with one a line")
    add("--count", type=cli.positive, default=128, help="images a recipe")
    add("--batch", type=cli.positive, default=16, help="images at a time")
    cli.add_sampling(parser)
    add("--seed0", type=int, default=0, help="of the noise of all images")
    add("--out", type=Path, default=Path("outputs/evaluation.json"), help="results, resumed from")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
