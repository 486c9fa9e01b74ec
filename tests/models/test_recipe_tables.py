"""The layers that recipes touch are those that each family's README lists, with role and size."""

import re
from pathlib import Path

import pytest
from flax import nnx

from models.families import FAMILIES
from quartz_jax import get_recipe
from quartz_jax.recipes.sites import sites

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"\| `(\S+)` \| (\w+) \| \[(\d+), (\d+)\] \|")
FOLDERS = {family.denoiser.__module__.split(".")[1]: family for family in reversed(FAMILIES)}


def listed(folder):
    """Return pattern of paths, role, inputs and outputs of each row."""
    text = (ROOT / "models" / folder / "README.md").read_text()
    return [(x[1], x[2], int(x[3]), int(x[4])) for x in _ROW.finditer(text)]


def touched(family, recipe):
    """Return the layers of the first published model that a recipe quantizes."""
    component = family.components[family.main]
    config = next(iter(family.sizes.values()))[family.main]
    found = sites(nnx.eval_shape(lambda: component.build(config)))
    assigned = get_recipe(recipe).assign(found)
    return [site for site in found if site.path in assigned]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8x", "w4a4"])
def test_a_recipe_touches_the_layers_that_the_readme_lists(folder, recipe):
    rows, used = listed(folder), set()
    for site in touched(FOLDERS[folder], recipe):
        same = [row for row in rows if row[1:] == (site.role, site.k, site.n)]
        found = [row for row in same if is_of(row[0], site.path)]
        assert len(found) == 1, site
        used.add(found[0])
    assert used == set(rows)


def is_of(pattern, path):
    """Return whether a path is what a pattern stands for; * are one letter or more."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), path) is not None
