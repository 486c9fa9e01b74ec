"""The quantized drop-in for nnx.Linear, and how its two operands are made."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.quantize import quantize as quantize_and_decode
from quartz_jax.codec import decode, dequantize, quantize, quantize_int
from quartz_jax.matmul import quartz_matmul
from quartz_jax.recipe import Format
from quartz_jax.tensor import IntTensor, QuartzTensor

_BITS = {"int8": 8, "int4": 4}


class QuantizedWeight(nnx.Variable):
    """Holds a QuartzTensor or an IntTensor; no nnx.Param, so that optimizers leave it alone."""


class QuartzLinear(nnx.Module):
    """y = x W^T + b with a quantized W and, unless the layer is weight-only, a quantized x."""

    def __init__(
        self,
        weight: QuartzTensor | IntTensor,  # [n, k], symmetric
        bias: nnx.Param | None,  # [n]
        activation: Format,  # of the input; bf16 makes the layer weight-only
    ):
        self.weight = QuantizedWeight(weight)
        self.bias = bias
        self.activation = activation

    def __call__(
        self,
        x: jax.Array,  # [..., k], floating
    ) -> jax.Array:
        """Return [..., n] in the dtype of x."""
        weight = self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        if self.activation.kind == "bf16":
            return _weight_only(x, weight, bias)
        rows = encode_activation(x.reshape(-1, x.shape[-1]), self.activation)
        y = quartz_matmul(rows, weight, bias=bias, out_dtype=x.dtype)
        return y.reshape(*x.shape[:-1], -1)


def encode_weight(
    path: str,
    kernel: jax.Array,  # [k, n]: an nnx.Linear's, transposed here
    format: Format,
) -> QuartzTensor | IntTensor:
    """Quantize the weight of a layer from its bfloat16 values.

    Raises:
      ValueError: it holds a NaN or an infinity; names the layer.
    """
    if not jnp.isfinite(kernel).all():
        raise ValueError(f"weight of {path} holds NaN or infinity; check the base checkpoint")
    return _encode_weight(kernel, format)


def abstract_weight(
    kernel: jax.ShapeDtypeStruct,  # [k, n]
    format: Format,
) -> QuartzTensor | IntTensor:
    """Return what `encode_weight` would, with shapes in place of arrays."""
    return jax.eval_shape(lambda kernel: _encode_weight(kernel, format), kernel)


def encode_activation(
    x: jax.Array,  # [m, k], floating
    format: Format,
) -> QuartzTensor | IntTensor:
    """Quantize the input of a layer; 4-bit codes come decoded, as the matmul wants them."""
    if format.kind == "int4":
        return quantize_int(x, bits=4)
    config = format.config
    if config is None:
        values, scale, lo = quantize_and_decode(x, bits=8, range=format.range)
    elif config.scale_block:
        return quantize(x, config)
    else:
        values, scale, lo = quantize_and_decode(
            x,
            bits=4,
            group_size=config.group_size,
            range=config.range,
            step=config.step,
            rounding=config.rounding,
        )
    return IntTensor(values=values, scale=scale, lo=lo)


def round_to_bf16(x: jax.Array) -> jax.Array:
    """Return floating values rounded to bfloat16, in the dtype they have."""
    return x.astype(jnp.bfloat16).astype(x.dtype)


def _encode_weight(kernel: jax.Array, format: Format) -> QuartzTensor | IntTensor:
    weight = round_to_bf16(kernel).T
    if format.config:
        return quantize(weight, format.config, search=format.search)
    return quantize_int(weight, bits=_BITS[format.kind])


def _weight_only(
    x: jax.Array,  # [..., k]
    weight: QuartzTensor | IntTensor,  # [n, k]
    bias: jax.Array | None,  # [n]
) -> jax.Array:
    """Multiply in the dtype of x; with one scale a row the codes go in exact, the scale after."""
    if weight.scale.shape[-1] == 1:
        operand, scale = decode(weight).astype(x.dtype), weight.scale[:, 0]
    else:
        operand, scale = dequantize(weight, x.dtype), 1
    y = jnp.einsum("...k,nk->...n", x, operand, preferred_element_type=jnp.float32) * scale
    return (y if bias is None else y + bias).astype(x.dtype)
