"""The command `quartz analyze`, from a checkout."""

import sys

from quartz_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
