"""Print what a quantized checkpoint is: recipe, layers, bytes, base hash, versions.

Run as `python scripts/inspect.py FOLDER`. That is a folder because a file of that name would stand
before the standard library's `inspect` for every script beside it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from quartz_jax.cli import arguments as cli
from quartz_jax.conversion import checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Print the description."""
    parser = cli.ArgumentParser(prog="inspect.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder that quantize.py made")
    parser.add_argument("--layers", action="store_true", help="also a line a layer")
    args = parser.parse_args(argv)
    print(checkpoint.describe(args.checkpoint, layers=args.layers))


if __name__ == "__main__":
    sys.exit(cli.run(main))
