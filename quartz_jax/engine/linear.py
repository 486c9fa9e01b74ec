"""The quantized drop-in for nnx.Linear, and how its two operands are made."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.functions import Norm, Part, gelu, join, modulate
from pallas_kernels.matmul import PreparedWeights
from pallas_kernels.quantize import quantize as quantize_and_decode
from quartz_jax.codec import check_finite, decode, dequantize, quantize, quantize_int
from quartz_jax.matmul import quartz_matmul
from quartz_jax.recipe import Format
from quartz_jax.tensor import IntTensor, QuartzTensor

_BITS = {"int8": 8, "int4": 4}
FEW_ROWS = 8  # rows of x up to which reading the weights is the whole cost of a weight-only layer
_FEW_ROWS_BACKENDS = ("triton_few_rows", "xla")  # those that read the packed order


class QuantizedWeight(nnx.Variable):
    """Holds a quantized tensor or PreparedWeights; no nnx.Param: optimizers leave it alone."""


class QuartzLinear(nnx.Module):
    """y = x W^T + b with a quantized W and, unless the layer is weight-only, a quantized x."""

    def __init__(
        self,
        weight: QuartzTensor | IntTensor | PreparedWeights,  # [n, k], symmetric
        bias: nnx.Param | None,  # [n]
        activation: Format,  # of the input; bf16 makes the layer weight-only
    ):
        self.weight = QuantizedWeight(weight)
        self.bias = bias
        self.activation = activation

    def __call__(
        self,
        x: jax.Array | tuple,  # [..., k], floating; or parts, as `models.linear.Part` has them
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
        rows, leading = _rows(x)
        norm = None
        if modulation is not None:
            if weight_only or modulation[0].size != weight.shape[1]:
                x = modulate(join(rows).reshape(*leading, -1), _norm(*modulation))
                rows, leading = _rows(x)
            else:
                norm = tuple(part.reshape(-1) for part in modulation)
        if weight_only:
            y = _weight_only(join(rows), weight, bias)
            y = y if activation is None else gelu(y.astype(jnp.float32)).astype(y.dtype)
        else:
            n, dtype = weight.shape[0], _dtype(rows)
            inside = {"bias": bias, "activation": activation, "out_dtype": dtype}
            if residual is not None and (gate is None or gate.size == n):
                inside["residual"] = residual.reshape(-1, n).astype(dtype)
                inside["gate"] = None if gate is None else gate.reshape(-1)
                gate = residual = None
            y = quartz_matmul(encode_activation(rows, self.activation, norm), weight, **inside)
        y = y.reshape(*leading, -1)
        y = y if gate is None else gate * y
        return y if residual is None else residual + y


def _rows(x: jax.Array | tuple) -> tuple[jax.Array | tuple[Part, ...], tuple[int, ...]]:
    """Return x or its parts with the leading axes made one, [m, k], and those axes."""
    if not isinstance(x, tuple):
        return x.reshape(-1, x.shape[-1]), x.shape[:-1]
    parts = tuple(
        Part(
            array=part.array.reshape(-1, part.array.shape[-1]),
            start=part.start,
            size=part.size,
            activation=part.activation,
        )
        for part in x
    )
    return parts, x[0].array.shape[:-1]


def _norm(shift: jax.Array, scale: jax.Array) -> Norm:
    return Norm(shift=shift, scale=1 + scale.astype(jnp.float32))


def _dtype(rows: jax.Array | tuple[Part, ...]) -> jnp.dtype:
    return rows[0].dtype if isinstance(rows, tuple) else rows.dtype


def encode_weight(
    path: str,
    kernel: jax.Array,  # [k, n]: an nnx.Linear's, transposed here
    format: Format,
) -> QuartzTensor | IntTensor:
    """Quantize the weight of a layer from its bfloat16 values.

    Raises:
      WeightError: it holds a NaN or an infinity; names the layer.
    """
    check_finite(path, kernel)
    return _encode_weight(kernel, format)


def abstract_weight(
    kernel: jax.ShapeDtypeStruct,  # [k, n]
    format: Format,
) -> QuartzTensor | IntTensor:
    """Return what `encode_weight` would, with shapes in place of arrays."""
    return jax.eval_shape(lambda kernel: _encode_weight(kernel, format), kernel)


def encode_activation(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
    format: Format,
    norm: tuple[jax.Array, jax.Array] | None = None,  # shift and scale, [k]
) -> QuartzTensor | IntTensor:
    """Quantize the input of a layer; 4-bit codes come decoded, as the matmul wants them.

    With a norm, layer_norm(x) * (1 + scale) + shift is quantized instead.
    """
    config = format.config
    if format.kind == "int4" or (config and config.scale_block):
        x = join(x) if norm is None else modulate(join(x), _norm(*norm))
    if format.kind == "int4":
        return quantize_int(x, bits=4)
    value_bits = 4 if config and config.step == "power" else 8
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
    return IntTensor(values=values, scale=scale, lo=lo, value_bits=value_bits)


def round_to_bf16(x: jax.Array) -> jax.Array:
    """Return floating values rounded to bfloat16, in the dtype they have."""
    return x.astype(jnp.bfloat16).astype(x.dtype)


def _encode_weight(kernel: jax.Array, format: Format) -> QuartzTensor | IntTensor:
    weight = round_to_bf16(kernel).T
    if format.config:
        return quantize(weight, format.config, search=format.search)
    return quantize_int(weight, bits=_BITS[format.kind])


def _weight_only(
    x: jax.Array,  # [m, k]
    weight: QuartzTensor | IntTensor,  # [n, k]
    bias: jax.Array | None,  # [n]
) -> jax.Array:
    """Multiply 16-bit x by quantized weights, [m, n].

    Few rows are bound by reading the weights, so those stay packed: x becomes 16-bit integers, two
    int8 rows each. Many rows multiply in the dtype of x; with one scale a row the codes go in
    exact, the scale after.
    """
    row_scale = weight.scale.shape[-1] == 1
    if row_scale and x.shape[0] <= FEW_ROWS and getattr(weight, "bits", 8) == 8:
        high, low = _split_16_bits(x)
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), high, low)
        backends = "xla" if isinstance(weight, IntTensor) else _FEW_ROWS_BACKENDS
        y = quartz_matmul(both, weight, out_dtype=jnp.float32, implementation=backends)
        y = y[: x.shape[0]] + y[x.shape[0] :]
    else:
        operand = decode(weight).astype(x.dtype) if row_scale else dequantize(weight, x.dtype)
        y = jnp.einsum("mk,nk->mn", x, operand, preferred_element_type=jnp.float32)
        y = y * weight.scale[:, 0] if row_scale else y
    return (y if bias is None else y + bias).astype(x.dtype)


def _split_16_bits(x: jax.Array) -> tuple[IntTensor, IntTensor]:
    """Return two int8 tensors that add up to x within 2**-16 of each row's largest magnitude.

    round(x * (32639 / a)) = 256 high + low, with a = max|x|: high in -127..127, low in -128..127.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.where(jnp.isfinite(wide).all(axis=-1, keepdims=True), largest / 32639, jnp.nan)
    levels = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int32)
    high = (levels + 128) >> 8
    parts = (high, 256 * scale), (levels - 256 * high, scale)
    return tuple(IntTensor(values=v.astype(jnp.int8), scale=s) for v, s in parts)
