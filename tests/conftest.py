"""Settings that must be in place before JAX starts, for all tests."""

import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Scripts keep compiled programs in the user's cache folder; the tests of that turn it on again.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Several devices on the host, so that shard_map has something to split over.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

settings.register_profile("quartz", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("quartz")
