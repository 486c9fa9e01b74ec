"""QuaRTZ 4-bit quantization (arXiv 2509.26436) for diffusion transformers in JAX."""

from quartz_jax.conversion.checkpoint import load as load_model
from quartz_jax.conversion.checkpoint import save_model
from quartz_jax.conversion.model import abstract_quantized, quantize_model
from quartz_jax.conversion.report import Report
from quartz_jax.engine.linear import QuantizedLinear
from quartz_jax.engine.matmul import quartz_matmul
from quartz_jax.engine.observe import observe
from quartz_jax.engine.place import place
from quartz_jax.formats import (
    BlockRows,
    Format,
    Int,
    Int8Rows,
    PackedRows,
    Quartz,
)
from quartz_jax.formats.storage import decode, dequantize, quantize
from quartz_jax.recipes import LayerRecipe, Match, Recipe, Rule, get_recipe, sites

__all__ = [
    "BlockRows",
    "Format",
    "Int",
    "Int8Rows",
    "LayerRecipe",
    "Match",
    "PackedRows",
    "QuantizedLinear",
    "Quartz",
    "Recipe",
    "Report",
    "Rule",
    "abstract_quantized",
    "decode",
    "dequantize",
    "get_recipe",
    "load_model",
    "observe",
    "place",
    "quantize",
    "quantize_model",
    "quartz_matmul",
    "save_model",
    "sites",
]
