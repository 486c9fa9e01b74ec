"""The command `quartz quantize`, from a checkout."""

import sys

from quartz_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
