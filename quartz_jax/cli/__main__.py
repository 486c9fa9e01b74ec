"""`python -m quartz_jax.cli`: the command `quartz` without an installation."""

import sys

from quartz_jax.cli import main

sys.exit(main())
