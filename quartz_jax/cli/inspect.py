"""Print what a quantized checkpoint is: recipe, layers, bytes, base hash, versions."""

from collections.abc import Sequence
from pathlib import Path

from quartz_jax.cli import arguments as cli
from quartz_jax.conversion import checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Print the description."""
    parser = cli.ArgumentParser(prog="quartz inspect", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder that quantize made")
    parser.add_argument("--layers", action="store_true", help="also a line a layer")
    args = parser.parse_args(argv)
    print(checkpoint.describe(args.checkpoint, layers=args.layers))
