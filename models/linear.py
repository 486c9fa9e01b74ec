"""The linear layer of the transformers here: what surrounds a matmul comes as arguments.

A plain matmul gains nothing from that; a quantized one, which takes this layer's place, does the
norm while it quantizes its input and the rest while it writes its output.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-6  # of the layer norm, in most models


def modulate(
    x: jax.Array,  # [b, t, c]
    shift: jax.Array,  # [b, 1, c]
    scale: jax.Array,  # [b, 1, c]
    epsilon: float = EPSILON,
) -> jax.Array:
    """Return layer_norm(x) * (1 + scale) + shift, computed in float32, in the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return (wide * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Columns of an array, through an activation: a part of a linear's input."""

    array: jax.Array  # [..., at least start + size]
    start: int = 0  # first column
    size: int  # columns
    activation: str | None = None  # "gelu": its tanh form

    def value(self) -> jax.Array:
        """Return the part itself, [..., size]."""
        columns = self.array[..., self.start : self.start + self.size]
        return columns if self.activation is None else nnx.gelu(columns, approximate=True)


class Linear(nnx.Linear):
    """y = x W + b, with what comes before and after it in a transformer block."""

    quantizable = True  # a quantized linear can take its place: it computes what is said here

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        # what it is in its model: embed, modulation, attention_in, attention_out, mlp_in, mlp_out,
        # mixed_in, mixed_out (attention and MLP in one), outlier_out (last of an MLP whose inputs
        # are known to overflow 16-bit floats) or head
        role: str | None = None,
        norm_epsilon: float = EPSILON,  # of the layer norm before the modulation
        **options,  # of nnx.Linear
    ):
        super().__init__(in_features, out_features, **options)
        self.role = role
        self.norm_epsilon = norm_epsilon

    def __call__(
        self,
        x: jax.Array | tuple[Part, ...],  # [..., k], or parts that lie side by side
        *,
        modulation: tuple[jax.Array, jax.Array] | None = None,  # shift and scale, [b, 1, k]
        activation: str | None = None,  # "gelu": its tanh form
        gate: jax.Array | None = None,  # [b, 1, n]
        residual: jax.Array | None = None,  # [..., n]
    ) -> jax.Array:
        """Return residual + gate * activation(modulate(x) W + b), [..., n]; each optional."""
        if isinstance(x, tuple):
            x = jnp.concatenate([part.value() for part in x], axis=-1)
        if modulation is not None:
            x = modulate(x, *modulation, self.norm_epsilon)
        y = super().__call__(x)
        if activation == "gelu":
            y = nnx.gelu(y, approximate=True)
        if gate is not None:
            y = gate * y
        return y if residual is None else residual + y
