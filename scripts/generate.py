"""The command `quartz generate`, from a checkout."""

import sys

from quartz_jax.cli import start
from quartz_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(start(main))
