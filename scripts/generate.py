"""The command `quartz generate`, from a checkout."""

import sys

from quartz_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
