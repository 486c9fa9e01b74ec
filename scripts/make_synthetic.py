"""Write a checkpoint of full size with random weights, for tests.

Names, shapes, dtypes, shards and configs are those of the published files. Tokenizers have the
published lengths and smaller vocabularies than the encoders: of bytes, or the embedded model's.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from models.families import FAMILIES
from models.synthetic import LAYOUTS, is_random_model, write_random_model
from quartz_jax.cli import arguments as cli
from quartz_jax.io.files import check_output
from quartz_jax.pipelines import EMBEDDED_MODEL

MODELS = {name: family for family in FAMILIES for name in family.sizes}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the model and print its size."""
    args = parse(argv)
    check_output(args.out, folder=True, overwrite=args.overwrite, is_ours=is_random_model)
    if args.overwrite:
        shutil.rmtree(args.out, ignore_errors=True)
    family = MODELS[args.model]
    write_random_model(
        args.out,
        family,
        family.sizes[args.model],
        tokenizers=EMBEDDED_MODEL,
        layout=args.layout,
        schedule=args.schedule,
        name=args.model,
        seed=args.seed,
        progress=True,
    )
    total = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {total / 1e9:.2f} GB")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make")
    add("--model", choices=MODELS, default="flux1-dev", help="whose sizes to take")
    add("--layout", choices=LAYOUTS, default="diffusers", help="folder or single files")
    add("--schedule", metavar="NAME", help="what it is sampled by, as quartz generate has it")
    add("--seed", type=cli.seed, default=0, help="of the weights")
    add("--overwrite", action="store_true", help="replace what this made at --out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
