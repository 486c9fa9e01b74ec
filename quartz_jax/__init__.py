"""QuaRTZ 4-bit quantization (arXiv 2509.26436) for diffusion transformers in JAX."""

from quartz_jax.codec import decode, dequantize, quantize, quantize_int, quantize_weight
from quartz_jax.config import QuartzConfig
from quartz_jax.matmul import quartz_matmul
from quartz_jax.tensor import IntTensor, QuartzTensor

__all__ = [
    "IntTensor",
    "QuartzConfig",
    "QuartzTensor",
    "decode",
    "dequantize",
    "quantize",
    "quantize_int",
    "quantize_weight",
    "quartz_matmul",
]
