"""Recipes for the T5 encoder of `models.text_encoders`, the largest component but the transformer.

Embedding, norms and position bias stay 16-bit in all of them.
"""

from quartz_jax.config import QuartzConfig
from quartz_jax.recipes.recipe import Format, Recipe, Rule

# The input of an MLP's last linear is not quantized: trained T5s have outliers there that overflow
# float16 (transformers keeps that weight in float32 for them: `_keep_in_fp32_modules` of T5).
_MLP_OUT = r"blocks\.\d+\.mlp\.wo"
_OTHERS = r"blocks\.\d+\.(attention\.[qkvo]|mlp\.wi(_[01])?)"

_BF16 = Format(kind="bf16")
_INT8 = Format(kind="int8")
_QUARTZ = Format(kind="quartz", config=QuartzConfig())


def _t5(name: str, weight: Format, activation: Format) -> Recipe:
    rules = (
        Rule(pattern=_MLP_OUT, weight=weight, activation=_BF16),
        Rule(pattern=_OTHERS, weight=weight, activation=activation),
    )
    return Recipe(name=name, rules=rules)


T5_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="bf16", rules=()),
        _t5("w4a16", _QUARTZ, _BF16),
        _t5("w8a8", _INT8, _INT8),
    )
}
