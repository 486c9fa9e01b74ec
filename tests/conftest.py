"""Settings that must be in place before JAX starts, for all tests."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept for this run only, for all of its processes: many tests call scripts
# that compile the same ones. Workers inherit the folder from the process that starts them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="quartz-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
# Several devices on the host, so that shard_map has something to split over.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

settings.register_profile("quartz", max_examples=100, deadline=None, derandomize=True)
settings.load_profile("quartz")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Keep what earlier files left in a worker out of the garbage collector's way.

    Pipelines collect before and after each model that they load. Torch, JAX and their caches are
    millions of objects, seconds a collection, and none of them is ever garbage.
    """
    gc.collect()
    gc.freeze()
