"""QuaRTZ 4-bit quantization (arXiv 2509.26436) for diffusion transformers in JAX."""

from quartz_jax.codec import decode, dequantize, quantize, quantize_int, quantize_weight
from quartz_jax.config import QuartzConfig
from quartz_jax.convert import quantize_model
from quartz_jax.linear import QuartzLinear
from quartz_jax.matmul import quartz_matmul
from quartz_jax.placement import place
from quartz_jax.recipe import Format, Recipe, Rule, get_recipe
from quartz_jax.report import Report
from quartz_jax.tensor import IntTensor, QuartzTensor

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
