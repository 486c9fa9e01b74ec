"""What kernels and models compute around a matmul, in plain jnp: GELU, norm and parts of rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gradients import with_derivative

SQRT_2_PI = 0.7978845608028654
NORM_EPSILON = 1e-6  # of a norm that states none


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["shift", "scale"], meta_fields=["epsilon"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """A layer norm and what modulates its result: layer_norm(x) * scale + shift."""

    shift: jax.Array  # [k] or [..., k]
    # [k] or [..., k], float32: one plus what a model calls its scale, added in float32, since near
    # -1 a 16-bit sum would lose up to 8 % of it
    scale: jax.Array
    epsilon: float = NORM_EPSILON  # added to the variance


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["array"],
    meta_fields=["start", "size", "activation"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Columns of an array, through an activation: a part of the rows to quantize."""

    array: jax.Array  # [m, at least start + size], floating
    start: int  # first column
    size: int  # columns
    activation: str | None = None  # "gelu": its tanh form

    @property
    def dtype(self) -> jnp.dtype:
        """That of the array."""
        return self.array.dtype


def gelu(
    y: jax.Array,  # floating, of any shape
) -> jax.Array:
    """Return the tanh form of GELU (arXiv 1606.08415), y * (1 + tanh(z)) / 2, elementwise.

    With z = sqrt(2 / pi) (y + 0.044715 y**3) it is written y / (1 + exp(-2 z)), which keeps its
    relative precision for negative y and takes no tanh.
    """
    return y / (1 + jnp.exp(y * (-2 * SQRT_2_PI - 2 * SQRT_2_PI * 0.044715 * (y * y))))


def gelu_of_tanh(
    y: jax.Array,  # floating, of any shape
) -> jax.Array:
    """Return the same by a tanh, whose derivative is finite where exp(-2 z) isn't."""
    return jax.nn.gelu(y, approximate=True)


def join(x: jax.Array | tuple[Part, ...]) -> jax.Array:
    """Return the parts side by side, [m, k]; an array is returned as it is.

    Activations are computed in float32 and rounded to the dtype of their array.
    """
    return x if not isinstance(x, tuple) else jnp.concatenate([_value(p) for p in x], axis=1)


def modulate(
    x: jax.Array,  # [..., k]
    norm: Norm,
) -> jax.Array:
    """Return layer_norm(x) * scale + shift, from float32 rounded to the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + norm.epsilon)
    y = wide * norm.scale.astype(jnp.float32) + norm.shift.astype(jnp.float32)
    return round_to(y, x.dtype)


def round_to(
    y: jax.Array,  # float32
    dtype: jnp.dtype,
) -> jax.Array:
    """Cast float32 so that XLA keeps the rounding: a cast there and back it may leave out."""
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(y, bits.nexp, bits.nmant).astype(dtype)


def _value(part: Part) -> jax.Array:
    columns = part.array[:, part.start : part.start + part.size]
    if part.activation is None:
        return columns
    wide = with_derivative(gelu, gelu_of_tanh, columns.astype(jnp.float32))
    return round_to(wide, columns.dtype)
