"""Settings that must be in place before JAX starts, for all tests."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers and the processes that tests start share two cores: threads of torch and of NumPy's BLAS
# would wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled programs are kept for this run only, for all of its processes, however quickly they were
# compiled: reading one takes a third of that, and many tests and scripts compile the same ones.
# Workers inherit the folder from the process that starts them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="quartz-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
# Several devices on the host, so that shard_map has something to split over.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

settings.register_profile("quartz", max_examples=100, deadline=None, derandomize=True)
settings.load_profile("quartz")

# Tests of what whole models and scripts do: they compile many programs and run each a few times,
# so LLVM compiles those with few optimizations. The other tests hold operations to exact numbers,
# which optimizations endanger, or compile for accelerators: theirs are compiled as users' are.
QUICKLY_COMPILED = {
    "docs",
    "models",
    "scripts",
    "quartz_jax/test_activation_ranges.py",
    "quartz_jax/test_analysis.py",
    "quartz_jax/test_calibrated.py",
    "quartz_jax/test_checkpoint.py",
    "quartz_jax/test_conversion.py",
    "quartz_jax/test_convert.py",
    "quartz_jax/test_linear.py",
    "quartz_jax/test_methods.py",
    "quartz_jax/test_networks.py",
    "quartz_jax/test_placement.py",
    "quartz_jax/test_quantized_decoder.py",
    "quartz_jax/test_quantized_lora.py",
    "quartz_jax/test_transforms.py",
}


@pytest.fixture(autouse=True)
def _quick_collections():
    """Keep what earlier tests left in a worker out of the garbage collector's way.

    Pipelines collect before and after each model that they load. Torch, JAX and their caches are
    millions of objects, seconds a collection, and none of them is ever garbage. What is frozen
    after each test costs the next collections nothing, so each sees one test's objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _programs_of_commands():
    """Leave no test the kept programs that another one's command turned on in this process."""
    yield
    if "models.programs" in sys.modules:
        sys.modules["models.programs"].keep(None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compile a test's programs quickly or as usual, those of its fixtures and processes too."""
    import jax

    path = item.path.relative_to(Path(__file__).parent)
    quickly = not QUICKLY_COMPILED.isdisjoint([path.parts[0], path.as_posix()])
    quickly &= os.environ["JAX_PLATFORMS"] == "cpu"
    wanted = str(int(quickly))
    if wanted != os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS"):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = wanted  # of processes that tests start
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()  # of programs compiled the other way


def pytest_collection_modifyitems(items):
    """Start with the files that take longest, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.parent.name != "scripts")
