"""The command `quartz inspect`, from a checkout.

A folder, because a file of that name would stand before the standard library's `inspect` for every
script beside it.
"""

import sys

from quartz_jax.cli import start
from quartz_jax.cli.inspect import main

if __name__ == "__main__":
    sys.exit(start(main))
