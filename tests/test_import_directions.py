"""models and pallas_kernels know nothing of each other or of quartz_jax."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"models": {"models"}, "pallas_kernels": {"pallas_kernels"}}
MAY_IMPORT["quartz_jax"] = {"quartz_jax", "pallas_kernels"}
# Where models and quantization meet.
MEETING = ("quartz_jax/pipelines.py", "quartz_jax/evaluation/paired.py")


# What trains the embedded models is about their families by nature.
TRAINING = ("models/tiny_", "scripts/train_tiny_")


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


def modules(file: Path) -> set[str]:
    """Return the modules that a file imports, or imports from."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {x.name for node in nodes if isinstance(node, ast.Import) for x in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_a_family_is_named_in_its_folder_and_in_one_other_file_alone():
    from models.families import FAMILIES

    folders = {family.denoiser.__module__.split(".")[1] for family in FAMILIES}
    assert "flux" in folders
    found = (x for top in ("models", "quartz_jax", "scripts") for x in (ROOT / top).rglob("*.py"))
    for file in filter(Path.is_file, found):
        where = file.relative_to(ROOT).as_posix()
        if where == "models/families.py" or where.startswith(TRAINING):
            continue
        own = where.split("/")[1]
        named = {name for name in modules(file) if name.split(".")[1:2] and name[:7] == "models."}
        assert not {x.split(".")[1] for x in named} & (folders - {own}), where


UNIX = {"fcntl", "grp", "pwd", "resource", "termios"}


@pytest.mark.parametrize("package", [*MAY_IMPORT, "scripts"])
def test_nothing_is_imported_that_windows_lacks(package):
    for file in (ROOT / package).rglob("*.py"):
        if file.is_file():  # scripts/inspect.py is a folder
            names = {name.partition(".")[0] for name in modules(file)}
            assert not names & UNIX, file
