"""What is done to which layers of a model."""

from quartz_jax.recipes.presets import RECIPES, get_recipe
from quartz_jax.recipes.recipe import MAIN, LayerRecipe, Match, Recipe, Rule
from quartz_jax.recipes.sites import ROLES, Site, sites

__all__ = [
    "MAIN",
    "RECIPES",
    "ROLES",
    "LayerRecipe",
    "Match",
    "Recipe",
    "Rule",
    "Site",
    "get_recipe",
    "sites",
]
