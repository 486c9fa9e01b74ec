"""The command `quartz evaluate`, from a checkout."""

import sys

from quartz_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
