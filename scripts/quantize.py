"""Quantize a FLUX.1 model while it is read, into a folder that generate.py can use.

The model is a diffusers folder, or flux1-dev.safetensors or flux1-schnell.safetensors in Black
Forest Labs' naming with --text-encoders. Run the same command again after an interruption and it
goes on where it was.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from common import EMBEDDED_MODEL

import models
from quartz_jax import checkpoint, cli, get_recipe
from quartz_jax.conversion import Carried, Conversion, Source
from quartz_jax.recipe import Recipe
from quartz_jax.t5_recipe import T5_RECIPES

T5 = "text_encoder_2"


def main(argv: Sequence[str] | None = None) -> None:
    """Quantize, save and print the report; or print what would be done."""
    args = parse(argv)
    recipes = {"transformer": get_recipe(args.recipe)}
    if args.t5 != "bf16":
        recipes[T5] = T5_RECIPES[args.t5]
    checkpoint.check_target(args.out, overwrite=args.overwrite)
    if checkpoint.is_checkpoint(args.model):
        raise ValueError(f"{args.model} is quantized already; give the 16-bit model as --model")
    conversion = plan(args.model, args.text_encoders, recipes)
    if args.dry_run:
        print(conversion.plan())
        return
    manifest = conversion.run(args.out, overwrite=args.overwrite, progress=True)
    for component in manifest.components.values():
        print(component.report.table())


def plan(model: Path, text_encoders: Path | None, recipes: dict[str, Recipe]) -> Conversion:
    """Open every component, and return what is quantized and what is carried along."""
    files = models.find_model(model, text_encoders)
    opened = {
        name: files.open(name, check_values=True)
        for name in files.paths
        if name in ("transformer", "vae", "text_encoder", T5)
    }
    files.load_scheduler()  # what is only carried must load too
    files.load_tokenizers()
    sources = [
        Source(
            name=name,
            recipe=recipe,
            model=opened[name].abstract,
            read=opened[name].read,
            config=opened[name].config,
            files=tuple(sorted(set(opened[name].checkpoint.files.values()))),
        )
        for name, recipe in recipes.items()
    ]
    carried = [
        carry(name, path, opened.get(name))
        for name, path in files.paths.items()
        if name not in recipes
    ]
    carried += texts(files)
    return Conversion(
        base_name=models.model_name(model), sources=tuple(sources), carried=tuple(carried)
    )


def carry(name: str, path: Path, component: models.StoredModule | None) -> Carried:
    """Carry a component's folder as it is, or a single file as the folder diffusers would write."""
    if not path.is_file():
        if not path.is_dir():
            raise ValueError(f"{path} does not exist; expected a component of the model")
        return Carried.copy(path, name)
    wide = component.checkpoint.stored_dtype(next(iter(component.checkpoint.files))) == "F32"
    dtype = jnp.float32 if wide else jnp.bfloat16

    def write(folder: Path) -> None:
        models.export_component(component.load(dtype), folder, dtype)

    return Carried(name=name, bytes=component.checkpoint.bytes, write=write, source=path)


def texts(files: models.ModelFiles) -> list[Carried]:
    """Carry licences and the like of a model's folder; make what single files lack."""
    if files.scheduler is None:
        folder = files.paths["transformer"].parent
        found = {file for pattern in checkpoint.TEXTS for file in folder.glob(pattern)}
        return [Carried.copy(file) for file in sorted(found)]
    made = {
        "scheduler": ("scheduler_config.json", files.scheduler),
        "model_index.json": (None, files.index),
    }
    return [
        Carried(name=name, bytes=1000, write=functools.partial(write_json, *content))
        for name, content in made.items()
    ]


def write_json(inside: str | None, value: dict, path: Path) -> None:
    """Write a JSON file at a path, or inside a folder that is made there."""
    if inside:
        path.mkdir()
        path /= inside
    path.write_text(json.dumps(value, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=EMBEDDED_MODEL, help="16-bit model: folder or single file")
    add("--recipe", default="w4a4", help="built-in recipe or .json file, for the transformer")
    add("--t5", choices=tuple(T5_RECIPES), default="bf16", help="recipe for the T5 text encoder")
    add("--text-encoders", type=Path, help="diffusers folder with what a single file lacks")
    add("--out", type=Path, required=True, help="folder to make")
    add("--overwrite", action="store_true", help="replace the checkpoint at --out; start anew")
    add("--dry-run", action="store_true", help="print layers, formats and bytes; write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
