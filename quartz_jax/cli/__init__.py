"""The command `quartz`: one file a subcommand, and what they share."""

import gc
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from quartz_jax.cli.arguments import run

# Of transformers: that there is no PyTorch, which nothing here needs. Before a command imports it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

COMMANDS = {
    "generate": "make images from text",
    "quantize": "make a quantized checkpoint of a 16-bit model",
    "evaluate": "compare recipes and checkpoints with bf16",
    "inspect": "say what a checkpoint or model is, and check a checkpoint's files",
    "report": "make a page of what evaluate measured",
    "analyze": "make a page of the QuaRTZ paper's own analyses",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 2 after one line on stderr for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: quartz COMMAND ... (quartz COMMAND --help says more)\n")
        print("\n".join(f"  {name:10} {words}" for name, words in COMMANDS.items()))
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {name!r}; it must be one of {known}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"quartz_jax.cli.{name}")
    return start(module.main, rest)


def start(
    command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> int:
    """Run a command as a process of its own and return its exit code; see `run`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack a letter of a path
            stream.reconfigure(errors="backslashreplace")
    # One line, without the place in the code that says it.
    warnings.formatwarning = lambda message, *_, **__: (
        f"warning: {' '.join(str(message).split())}\n"
    )
    gc.freeze()  # modules are no garbage, so the collections between models needn't look at them
    return run(command, argv)
