"""Making a model ready for the kernels of a device."""

import dataclasses
import functools
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import matmul
from pallas_kernels.matmul import PreparedWeights
from pallas_kernels.operands import Int8Rows, PackedRows
from quartz_jax.engine.attention import attention_of, is_attention
from quartz_jax.engine.convolution import QuantizedConv
from quartz_jax.engine.linear import QuantizedLinear, apart, down_8bit, how_it_runs
from quartz_jax.formats import Stored
from quartz_jax.formats.storage import decode, row_operand

M = TypeVar("M", bound=nnx.Module)

_SCALES = {"image": ", a scale an image", "window": ", a scale a window"}  # of convolutions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """How each quantized layer of a placed model runs."""

    layers: dict[str, str]  # path to words such as "int8, mosaic_gpu" or "simulated"
    attention: str  # how attention runs, and the norm and rotation before it

    def table(self) -> str:
        """Return a line for each way to run, with the number of layers."""
        ways = dict.fromkeys(self.layers.values(), 0)
        for way in self.layers.values():
            ways[way] += 1
        lines = [f"{count} layers: {way}" for way, count in ways.items()]
        return "\n".join([*lines, f"attention: {self.attention}"])


def place(
    model: M,
    *,
    expand: bool = False,
    dtype: Any = None,
    in_place: bool = False,
    simulate: bool = False,
    convolutions: Literal["matmul", "xla"] = "matmul",
) -> tuple[M, Placement]:
    """Return a copy of a model that is ready for this device's kernels, and how its layers run.

    Quantized weights are brought into the order that the kernels read; the integers stay the same.
    A model works without it too, but then every call reorders them. The copy can't be saved: save
    the given model, which is untouched. Weight-only layers read the packed order.

    Modules that say by `attention_of = "qk_norm_rope"` what their `attend` computes, as that of
    `models.attention` does, get norm and rotation in a single pass where the device has a kernel,
    and attention in 8 bits where the recipe asks for that and the device has it for heads of the
    module's `head_dim`. The latter has no gradient, and neither have weights in a kernel's order;
    both say so.

    Args:
      model: as `quantize_model` or `checkpoint.load` returns it.
      expand: decode 4-bit weights to int8 once, for a device with room: nothing is left to decode
        in a call, and the weights take almost twice the memory.
      dtype: that the model computes in; None for each layer's own, and for layers that state none
        for that of the model's parameters, or bfloat16 without any.
      in_place: change the given model instead of a copy, for a device without room for the weights
        in both orders.
      simulate: compute in float32 what the formats make of weights and inputs, without kernels:
        what executed layers are to be compared with.
      convolutions: how those whose images share a scale run: "matmul" unfolds windows of int8 and
        multiplies them by the kernels of linears, "xla" decodes the weights and takes XLA's own
        int8 convolution. The integers are the same.

    Raises:
      ValueError: convolutions is neither.
    """
    if convolutions not in ("matmul", "xla"):
        raise ValueError(f"convolutions is {convolutions!r}; it must be 'matmul' or 'xla'")
    model = model if in_place else nnx.clone(model)
    layers, attention = {}, "as the model has it"
    usual = _dtype(model)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, QuantizedLinear):
            results = jnp.dtype(dtype or module.dtype or usual)
            by_xla = convolutions == "xla"
            how = "simulated" if simulate else _place_layer(module, expand, results, by_xla)
            module.simulated = simulate
            layers[".".join(map(str, path))] = how
        elif is_attention(module):
            format = getattr(module, "attention_format", "bf16")
            module.attend, attention = attention_of(format, getattr(module, "head_dim", None))
    return model, Placement(layers=layers, attention=attention)


def _place_layer(module: QuantizedLinear, expand: bool, dtype: Any, by_xla: bool) -> str:
    """Bring a layer's weight into the order of the kernels, and return how it runs."""
    how = how_it_runs(module.weight.get_value(), module.activation)
    if how != "int8":
        return how
    scales, weight = "row", module.weight.get_value()
    if isinstance(module, QuantizedConv):
        scales = module.scales
        prepared = isinstance(weight, PreparedWeights)  # for a kernel, which nothing else reads
        module.by_xla = by_xla and scales == "image" and not prepared
        if module.by_xla:
            return f"int8, XLA's convolution{_SCALES[scales]}"
    weight = place_weight(weight, expand, dtype)
    module.weight.set_value(weight)
    _place_branch(module, expand, dtype)
    if module.bias is not None:  # as kernels add it, so that no call converts it
        module.bias.set_value(module.bias.get_value().astype(jnp.float32))
    return f"int8, {_backend(weight)}{_SCALES.get(scales, '')}"


def _place_branch(module: QuantizedLinear, expand: bool, dtype: Any) -> None:
    """Quantize once what a branch multiplies the layer's 8-bit input by."""
    ops, last = apart(module.ops.get_value() if module.ops else (), module.activation)
    if module.ops and last is not None:
        down = place_weight(_store_down(last), expand, dtype)
        module.ops.set_value((*ops, dataclasses.replace(last, down_8bit=down)))


_store_down = jax.jit(down_8bit)


@functools.partial(jax.jit, static_argnames=("expand", "dtype"))
def place_weight(
    weight: Stored | PreparedWeights,  # [n, k]
    expand: bool,
    dtype: Any = jnp.bfloat16,  # of the results to come
) -> Stored | PreparedWeights:
    """Return a weight in the order that this device's kernels read; see `place`."""
    if isinstance(weight, PreparedWeights):
        return weight
    rows = row_operand(weight)
    if rows is None or rows.scale.shape[-1] != 1 or getattr(rows, "scale_block", None):
        return weight
    if expand and isinstance(rows, PackedRows):
        rows = Int8Rows(values=decode(rows), scale=rows.scale)
    return matmul.prepare(rows, out_dtype=dtype) or rows


def _backend(weight: Stored | PreparedWeights) -> str:
    return weight.implementation if isinstance(weight, PreparedWeights) else "as stored"


def _dtype(model: nnx.Module) -> Any:
    """Return the dtype of the parameters that a quantized model still has."""
    floats = [x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    return jnp.result_type(*floats) if floats else jnp.dtype(jnp.bfloat16)
