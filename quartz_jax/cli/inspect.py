"""Check a quantized checkpoint's files, and print what it is: recipe, layers, bytes, versions."""

from collections.abc import Sequence
from pathlib import Path

from quartz_jax.cli import arguments as cli
from quartz_jax.conversion import checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Check all hashes and print the description."""
    parser = cli.ArgumentParser(prog="quartz inspect", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder that quantize made")
    parser.add_argument("--layers", action="store_true", help="also a line a layer")
    args = parser.parse_args(argv)
    checkpoint.check_contents(args.checkpoint)
    print(checkpoint.describe(args.checkpoint, layers=args.layers))
    print("every file is as it was written")
