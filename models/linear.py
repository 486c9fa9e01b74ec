"""The linear layer of the transformers here: what surrounds a matmul comes as arguments.

A plain matmul gains nothing from that; a quantized one, which takes this layer's place, does the
norm while it quantizes its input and the rest while it writes its output.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-6  # of a norm that states none
ACTIVATIONS = {"gelu": partial(nnx.gelu, approximate=True), "silu": nnx.silu}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "shift"],
    meta_fields=["epsilon", "kind"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm over the channels before a linear, and what modulates it: norm(x) * scale + shift."""

    # [k] or [b, 1, k], float32: all that multiplies, so the norm's own weights too
    scale: jax.Array
    shift: jax.Array | None = None  # [k] or [b, 1, k]; None adds nothing
    epsilon: float = EPSILON  # added to the variance, or to the mean of squares
    kind: str = "layer"  # "layer" takes off the mean first; "rms" doesn't


def modulation(
    shift: jax.Array,  # [b, 1, c]
    scale: jax.Array,  # [b, 1, c]
    epsilon: float = EPSILON,
) -> Norm:
    """Return a layer norm times 1 + scale, plus shift, as adaLN has it (arXiv 2212.09748)."""
    return Norm(scale=1 + scale.astype(jnp.float32), shift=shift, epsilon=epsilon)


def rms_norm(
    weight: jax.Array,  # [c]
    scale: jax.Array | None = None,  # [b, 1, c]
    epsilon: float = EPSILON,
) -> Norm:
    """Return an RMS norm (arXiv 1910.07467) with weights, times 1 + scale where that is given."""
    wide = weight.astype(jnp.float32)
    wide = wide if scale is None else wide * (1 + scale.astype(jnp.float32))
    return Norm(scale=wide, epsilon=epsilon, kind="rms")


def layer_norm(norm: nnx.LayerNorm) -> Norm:
    """Return a layer norm with weights and biases of its own (arXiv 1607.06450)."""
    assert norm.scale is not None and norm.bias is not None
    scale, shift = norm.scale.get_value(), norm.bias.get_value()
    return Norm(scale=scale.astype(jnp.float32), shift=shift, epsilon=norm.epsilon)


def normalize(
    x: jax.Array,  # [b, t, c]
    norm: Norm,
) -> jax.Array:
    """Return norm(x) * scale + shift, computed in float32, in the dtype of x."""
    wide = x.astype(jnp.float32)
    if norm.kind == "layer":
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + norm.epsilon)
    y = wide * norm.scale.astype(jnp.float32)
    return (y if norm.shift is None else y + norm.shift.astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Columns of an array, through an activation: a part of a linear's input.

    With `times`, a gated unit (arXiv 2002.05202): activation(columns) * other columns.
    """

    array: jax.Array  # [..., at least start + size, and times + size]
    start: int = 0  # first column
    size: int  # columns
    activation: str | None = None  # of `ACTIVATIONS`
    times: int | None = None  # first of as many columns that multiply; None for no product

    def value(self) -> jax.Array:
        """Return the part itself, [..., size]."""
        columns = self.array[..., self.start : self.start + self.size]
        y = columns if self.activation is None else ACTIVATIONS[self.activation](columns)
        if self.times is None:
            return y
        return y * self.array[..., self.times : self.times + self.size]


def swiglu(
    wide: jax.Array,  # [..., at least start + 2 size]
    start: int = 0,
    size: int | None = None,  # half of what follows `start` if None
) -> Part:
    """Return silu(first columns) * the next, each `size` of them (arXiv 2002.05202, equation 6)."""
    size = (wide.shape[-1] - start) // 2 if size is None else size
    return Part(array=wide, start=start, size=size, activation="silu", times=start + size)


def join(x: jax.Array | tuple[Part, ...]) -> jax.Array:
    """Return parts side by side, [..., k]; an array is returned as it is."""
    return jnp.concatenate([part.value() for part in x], axis=-1) if isinstance(x, tuple) else x


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
        **options,  # of nnx.Linear
    ):
        super().__init__(in_features, out_features, **options)
        self.role = role

    def __call__(
        self,
        x: jax.Array | tuple[Part, ...],  # [..., k], or parts that lie side by side
        *,
        norm: Norm | None = None,  # of [k] or [b, 1, k]
        activation: str | None = None,  # "gelu": its tanh form
        gate: jax.Array | None = None,  # [b, 1, n]
        residual: jax.Array | None = None,  # [..., n]
    ) -> jax.Array:
        """Return residual + gate * activation(norm(x) W + b), [..., n]; each optional."""
        x = join(x)
        y = super().__call__(x if norm is None else normalize(x, norm))
        if activation is not None:
            y = ACTIVATIONS[activation](y)
        if gate is not None:
            y = gate * y
        return y if residual is None else residual + y
