"""The command `quartz report`, from a checkout."""

import sys

from quartz_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
