"""Quantization methods put together from parts, for comparison on one model.

A method is ordered rules; each gives the linears that it matches a format for weights and one for
inputs, transforms of the layer (smoothing, rotation, low-rank branch) and a rounding of the
weights. `simulate_model` applies one to a model, with what `record` saw of its activations.
"""

from quartz_jax.engine.observe import LayerStatistics, load_statistics, record, save_statistics
from quartz_jax.methods.recipe import LayerMethod, Method, MethodRule
from quartz_jax.methods.simulate import SimulatedLinear, simulate_model
from quartz_jax.recipes.names import get_method, split_names
from quartz_jax.rounding.gptq import Gptq, Nearest
from quartz_jax.transforms.transforms import LowRank, ReverseSmooth, Rotate, Shift, Smooth

__all__ = [
    "Gptq",
    "LayerMethod",
    "LayerStatistics",
    "LowRank",
    "Method",
    "MethodRule",
    "Nearest",
    "ReverseSmooth",
    "Rotate",
    "Shift",
    "SimulatedLinear",
    "Smooth",
    "get_method",
    "load_statistics",
    "record",
    "save_statistics",
    "simulate_model",
    "split_names",
]
