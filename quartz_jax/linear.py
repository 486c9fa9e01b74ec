"""The quantized drop-in for nnx.Linear, and how its two operands are made."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.matmul.reference import gelu
from pallas_kernels.quantize import quantize as quantize_and_decode
from pallas_kernels.quantize.reference import modulate
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
        *,
        modulation: tuple[jax.Array, jax.Array] | None = None,  # shift and scale, [b, 1, k]
        activation: str | None = None,  # "gelu": its tanh form
        gate: jax.Array | None = None,  # [b, 1, n]
        residual: jax.Array | None = None,  # [..., n]
    ) -> jax.Array:
        """Return [..., n] in the dtype of x: what `models.linear.Linear` does, quantized.

        One batch element does all of it in the kernels; of several, each has a modulation and a
        gate of its own, which are left to XLA.
        """
        weight = self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        weight_only = self.activation.kind == "bf16"
        norm = None
        if modulation is not None:
            if weight_only or modulation[0].size != x.shape[-1]:
                x = modulate(x, *modulation)
            else:
                norm = tuple(part.reshape(-1) for part in modulation)
        rows = x.reshape(-1, x.shape[-1])
        inside = {"bias": bias, "activation": activation}
        if weight_only:
            y = _weight_only(rows, weight, bias)
            y = y if activation is None else gelu(y.astype(jnp.float32)).astype(y.dtype)
        else:
            n = weight.scale.shape[0]
            if residual is not None and (gate is None or gate.size == n):
                inside["residual"] = residual.reshape(-1, n)
                inside["gate"] = None if gate is None else gate.reshape(-1)
                gate = residual = None
            operand = encode_activation(rows, self.activation, norm)
            y = quartz_matmul(operand, weight, out_dtype=x.dtype, **inside)
        y = y.reshape(*x.shape[:-1], -1)
        y = y if gate is None else gate * y
        return y if residual is None else residual + y


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
    norm: tuple[jax.Array, jax.Array] | None = None,  # shift and scale, [k]
) -> QuartzTensor | IntTensor:
    """Quantize the input of a layer; 4-bit codes come decoded, as the matmul wants them.

    With a norm, layer_norm(x) * (1 + scale) + shift is quantized instead.
    """
    config = format.config
    if norm is not None and (format.kind == "int4" or (config and config.scale_block)):
        x, norm = modulate(x, *norm), None
    if format.kind == "int4":
        return quantize_int(x, bits=4)
    if config is None:
        values, scale, lo = quantize_and_decode(x, bits=8, range=format.range, norm=norm)
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
            norm=norm,
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
