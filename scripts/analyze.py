"""The command `quartz analyze`, from a checkout."""

import sys

from quartz_jax.cli import start
from quartz_jax.cli.analyze import main

if __name__ == "__main__":
    sys.exit(start(main))
