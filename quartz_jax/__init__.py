"""QuaRTZ 4-bit quantization (arXiv 2509.26436) for diffusion transformers in JAX."""

from quartz_jax.config import QuartzConfig
from quartz_jax.conversion.model import quantize_model
from quartz_jax.conversion.report import Report
from quartz_jax.engine.linear import QuartzLinear
from quartz_jax.engine.matmul import quartz_matmul
from quartz_jax.engine.place import place
from quartz_jax.formats.storage import decode, dequantize, quantize, quantize_int, quantize_weight
from quartz_jax.formats.tensors import IntTensor, QuartzTensor
from quartz_jax.recipes.recipe import Format, Recipe, Rule, get_recipe

__all__ = [
    "Format",
    "IntTensor",
    "QuartzConfig",
    "QuartzLinear",
    "QuartzTensor",
    "Recipe",
    "Report",
    "Rule",
    "decode",
    "dequantize",
    "get_recipe",
    "place",
    "quantize",
    "quantize_int",
    "quantize_model",
    "quantize_weight",
    "quartz_matmul",
]
