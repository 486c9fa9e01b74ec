"""Write a FLUX.1-dev or -schnell checkpoint of full size with random weights, for tests.

Names, shapes, dtypes, shards and configs are those of the published files. The tokenizers are the
embedded model's, with the published lengths; their vocabularies are smaller than the encoders'.
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from models.synthetic import FLUX_DEV, LAYOUTS, is_random_flux, write_random_flux
from quartz_jax.cli import arguments as cli
from quartz_jax.io.files import check_output
from quartz_jax.pipelines import EMBEDDED_MODEL


def main(argv: Sequence[str] | None = None) -> None:
    """Write the model and print its size."""
    args = parse(argv)
    check_output(args.out, folder=True, overwrite=args.overwrite, is_ours=is_random_flux)
    if args.overwrite:
        shutil.rmtree(args.out, ignore_errors=True)
    sizes = FLUX_DEV
    if args.variant == "schnell":
        schnell = dataclasses.replace(sizes.transformer, guidance_embeds=False)
        sizes = dataclasses.replace(sizes, transformer=schnell)
    write_random_flux(
        args.out,
        sizes,
        tokenizers=EMBEDDED_MODEL,
        layout=args.layout,
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
    add("--variant", choices=("dev", "schnell"), default="dev", help="with guidance or without")
    add("--layout", choices=LAYOUTS, default="diffusers", help="folder layout or BFL's files")
    add("--seed", type=cli.seed, default=0, help="of the weights")
    add("--overwrite", action="store_true", help="replace what this made at --out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
