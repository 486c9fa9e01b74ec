"""Say what a quantized checkpoint is, its files checked, or a 16-bit model: bytes, image size."""

from collections.abc import Sequence
from pathlib import Path

from quartz_jax import pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.conversion import checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Check all hashes and print the description."""
    parser = cli.ArgumentParser(prog="quartz inspect", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder that quantize made, or a model's")
    parser.add_argument("--layers", action="store_true", help="also a line a layer")
    args = parser.parse_args(argv)
    folder = args.checkpoint
    if not checkpoint.is_checkpoint(folder) and (folder / "model_index.json").exists():
        print(pipelines.describe_16_bit(folder))
    else:
        checkpoint.check_contents(folder)
        print(checkpoint.describe(folder, layers=args.layers))
        print("every file is as it was written")
    if size := pipelines.only_size(folder):
        print("draws images of {}x{} pixels, and no other size well".format(*size))
