"""Making a model ready for the kernels of a device."""

import functools
from typing import Any

import jax
from flax import nnx

from pallas_kernels import matmul
from pallas_kernels.matmul import PreparedWeights
from pallas_kernels.qk_norm_rope import Stream, qk_norm_rope
from quartz_jax.codec import decode
from quartz_jax.linear import QuartzLinear
from quartz_jax.matmul import operand
from quartz_jax.tensor import IntTensor, QuartzTensor


def place(model: nnx.Module, *, expand: bool = False) -> None:
    """Make a model ready for this device's kernels, in place.

    Quantized weights are brought into the order that the kernels read; the integers stay the same.
    A model works without it too, but then every call reorders them. It can't be saved afterwards:
    save it first. Weight-only layers read the packed order.

    Modules that have a `qk_norm_rope`, as the attention of `models.flux` has, get the one that runs
    in a single pass where the device has a kernel. It has no gradient.

    Args:
      model: as `quantize_model` or `checkpoint.load` returns it.
      expand: decode 4-bit weights to int8 once, for a device with room: nothing is left to decode
        in a call, and the weights take almost twice the memory.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, QuartzLinear) and module.activation.kind != "bf16":
            module.weight.set_value(place_weight(module.weight.get_value(), expand))
        elif hasattr(module, "qk_norm_rope"):
            module.qk_norm_rope = _qk_norm_rope


@functools.partial(jax.jit, static_argnames="expand")
def place_weight(
    weight: QuartzTensor | IntTensor | PreparedWeights,  # [n, k]
    expand: bool,
) -> QuartzTensor | IntTensor | PreparedWeights:
    """Return a weight in the order that this device's kernels read; see `place`."""
    if isinstance(weight, PreparedWeights) or weight.scale.shape[-1] != 1:
        return weight
    if expand or isinstance(weight, IntTensor):
        expanded = IntTensor(values=decode(weight), scale=weight.scale)
        return matmul.prepare(operand(expanded)) or expanded
    return matmul.prepare(operand(weight)) or weight


def _qk_norm_rope(
    streams: tuple[Any, ...],  # `models.flux.modeling.Stream`: qkv, query_norm and key_norm
    rope: jax.Array,  # float32 [2, t, d / 2]
    *,
    heads: int,
) -> tuple[jax.Array, ...]:
    return qk_norm_rope(tuple(_scaled(stream) for stream in streams), rope, heads=heads)


def _scaled(stream: Any) -> Stream:
    """Return a model's stream as the kernel wants it."""
    query_norm, key_norm = stream.query_norm, stream.key_norm
    if query_norm.epsilon != key_norm.epsilon:
        raise ValueError(
            f"query_norm has epsilon {query_norm.epsilon} and key_norm {key_norm.epsilon}; "
            "they must be the same"
        )
    return Stream(
        qkv=stream.qkv,
        query_scale=query_norm.scale.get_value(),
        key_scale=key_norm.scale.get_value(),
        epsilon=query_norm.epsilon,
    )
