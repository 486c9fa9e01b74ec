"""The built-in recipes: role rules, which serve every family."""

import dataclasses
from pathlib import Path

from quartz_jax.formats import Format, Int, Quartz
from quartz_jax.recipes.names import INT8, named_recipe, role_recipe
from quartz_jax.recipes.recipe import LayerRecipe, Recipe, read_recipe
from quartz_jax.rounding import Gptq
from quartz_jax.transforms import LowRank, Rotate, Smooth

_ONE_SIDED_INT8 = Int(width=8, range="minmax")
_POWER = Quartz()
_TRUNCATE = Quartz(rounding="truncate")
_STRETCHED = Quartz(step="integer", levels="stretched")
_SEARCHED = dataclasses.replace(_STRETCHED, search=True)
# Modulation is a quarter of FLUX.1's weights, and its errors reach every token alike.
_FINER = dataclasses.replace(_SEARCHED, group_size=8)


def _plain(
    name: str,
    weight: Format,
    activation: Format | None,
    behind_gelu: Format | None = None,
    *,
    modulation: Format | None = None,
) -> Recipe:
    """Weights and inputs in formats; `behind_gelu` is that of inputs that are one-sided."""
    plain = LayerRecipe(weight=weight, activation=activation)
    one_sided = dataclasses.replace(plain, activation=behind_gelu or activation)
    shared = one_sided if isinstance(behind_gelu, Int) else plain
    return role_recipe(name, plain, mlp_out=one_sided, mixed_out=shared, modulation=modulation)


def _fitted(name: str, activation: Format, *transforms) -> Recipe:
    """Stretched weights rounded by GPTQ behind transforms."""
    layer = LayerRecipe(
        weight=_SEARCHED, activation=activation, transforms=transforms, rounding=Gptq()
    )
    return _attention_8bit(role_recipe(name, layer, modulation=_FINER))


def _attention_8bit(recipe: Recipe) -> Recipe:
    """Attention in 8 bits, which costs these recipes less than a tenth of a dB."""
    return dataclasses.replace(recipe, attention="int8_fp8")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="bf16", rules=()),
        # name, weights, inputs, inputs behind GELU
        _plain("w8a8", INT8, INT8, _ONE_SIDED_INT8),
        _plain("w4a16", _POWER, None),
        _plain("w4a8", _POWER, INT8, _ONE_SIDED_INT8),
        _attention_8bit(_plain("w4a4", _POWER, _POWER)),
        _plain("w4a4-paper", _TRUNCATE, _TRUNCATE),
        _plain("int4", Int(width=4), Int(width=4)),
        _attention_8bit(_plain("w4a8x", _SEARCHED, INT8, _ONE_SIDED_INT8, modulation=_FINER)),
        _attention_8bit(_plain("w4a4x", _SEARCHED, _STRETCHED, modulation=_FINER)),
        _fitted("w4a8x-gptq", INT8, Rotate(block=16)),
        _fitted("w4a4x-gptq", _STRETCHED, Rotate(block=16)),
        _fitted("w4a8x-branch", INT8, Smooth(), LowRank()),
    )
}


def get_recipe(name_or_path: str | Path) -> Recipe:
    """Return a recipe: a built-in one, one read from a JSON file, or one by its parts.

    Args:
      name_or_path: such as "w4a8x-gptq", "my_recipe.json" or "gptq+int4-g64" (`recipes.names`).

    Raises:
      ValueError: none of them.
    """
    if name_or_path in RECIPES:
        return RECIPES[str(name_or_path)]
    if Path(name_or_path).suffix == ".json":
        return read_recipe(Path(name_or_path))
    try:
        return named_recipe(str(name_or_path))
    except ValueError as error:
        raise ValueError(
            f"{error}; or use one of {', '.join(RECIPES)}, or the path of a .json file"
        ) from None
