"""Random numbers are drawn in float32: JAX has 128 values of a normal in bfloat16, off centre."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "pallas_kernels", "quartz_jax", "scripts")
DRAWS = {"normal": 2, "truncated_normal": 4, "uniform": 2}  # and where the dtype stands


def dtypes_of_draws(source: str) -> list[str]:
    """Return the dtype of every draw from jax.random, as it is written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        prefix, _, name = ast.unparse(node.func).rpartition(".")
        if prefix == "jax.random" and name in DRAWS:
            given = [x.value for x in node.keywords if x.arg == "dtype"]
            given += node.args[DRAWS[name] : DRAWS[name] + 1]
            found += [ast.unparse(x) for x in given] or ["jnp.float32"]
    return found


def test_a_dtype_is_found_wherever_it_stands():
    source = "jax.random.normal(k, s, x.dtype); jax.random.uniform(k, dtype=jnp.bfloat16)"
    assert dtypes_of_draws(source) == ["x.dtype", "jnp.bfloat16"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_draws_are_in_float32(folder):
    for path in (ROOT / folder).rglob("*.py"):
        if path.is_file():  # scripts/inspect.py is a folder
            assert set(dtypes_of_draws(path.read_text())) <= {"jnp.float32"}, path
