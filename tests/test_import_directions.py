"""models and pallas_kernels know nothing of each other or of quartz_jax."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"models": {"models"}, "pallas_kernels": {"pallas_kernels"}}
MAY_IMPORT["quartz_jax"] = {"quartz_jax", "pallas_kernels"}
# Where models and quantization meet.
MEETING = ("quartz_jax/pipelines.py", "quartz_jax/evaluation/paired.py")


def imported(file: Path) -> set[str]:
    """Return the top-level packages of this project that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names & set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_the_design_allows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        if file.relative_to(ROOT).as_posix() in MEETING:
            continue
        assert imported(file) <= MAY_IMPORT[package], file
