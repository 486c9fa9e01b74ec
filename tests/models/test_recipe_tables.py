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
        of_path = [
            row for row in rows if re.fullmatch(re.escape(row[0]).replace(r"\*", ".+"), site.path)
        ]
        assert [row[1:] for row in of_path] == [(site.role, site.k, site.n)], site
        used.add(of_path[0])
    assert used == set(rows)
