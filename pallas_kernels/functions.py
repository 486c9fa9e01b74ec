"""What kernels compute around a matmul, in plain jnp: activations, norms and parts of rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gradients import with_derivative

SQRT_2_PI = 0.7978845608028654
NORM_EPSILON = 1e-6  # of a norm that states none


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "shift"],
    meta_fields=["epsilon", "kind"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm over the channels and what modulates its result: norm(x) * scale + shift."""

    # [k] or [..., k], float32: all that multiplies, so the norm's own weights times one plus what a
    # model calls its scale, added in float32, since near -1 a 16-bit sum would lose up to 8 % of it
    scale: jax.Array
    shift: jax.Array | None = None  # [k] or [..., k]; None adds nothing
    epsilon: float = NORM_EPSILON  # added to the variance, or to the mean of squares
    kind: str = "layer"  # "layer" takes off the mean first; "rms" doesn't (arXiv 1910.07467)

    @property
    def images(self) -> int:
        """How many images of a batch have vectors of their own, [images, k]; else 1."""
        vectors = (v for v in (self.scale, self.shift) if v is not None)
        return max(v.shape[0] if v.ndim > 1 else 1 for v in vectors)


def as_norm(
    given: Any,  # what has a norm's fields
) -> Norm:
    """Return a norm of another package as one of these, its vectors float32."""
    shift = None if given.shift is None else given.shift.astype(jnp.float32)
    scale = given.scale.astype(jnp.float32)
    return Norm(scale=scale, shift=shift, epsilon=given.epsilon, kind=given.kind)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["array"],
    meta_fields=["start", "size", "activation", "times"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Columns of an array, through an activation: a part of the rows to quantize.

    With `times`, a gated unit (arXiv 2002.05202): activation(columns) * other columns.
    """

    array: jax.Array  # [m, at least start + size and times + size], floating
    start: int  # first column
    size: int  # columns
    activation: str | None = None  # "gelu": its tanh form; "silu"
    times: int | None = None  # first of as many columns that multiply; None for no product

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


def silu(
    y: jax.Array,  # floating, of any shape
) -> jax.Array:
    """Return y / (1 + exp(-y)), elementwise (SiLU: arXiv 1606.08415, section 4)."""
    return y / (1 + jnp.exp(-y))


ACTIVATIONS = {"gelu": gelu, "silu": silu}
# The same functions in a form whose derivative is finite everywhere.
DIFFERENTIABLE = {"gelu": gelu_of_tanh, "silu": jax.nn.silu}


def join(x: jax.Array | tuple[Part, ...]) -> jax.Array:
    """Return the parts side by side, [m, k]; an array is returned as it is.

    Activations and products are computed in float32 and rounded once, to the dtype of their array.
    """
    return x if not isinstance(x, tuple) else jnp.concatenate([_value(p) for p in x], axis=1)


def modulate(
    x: jax.Array,  # [..., k]
    norm: Norm,
) -> jax.Array:
    """Return norm(x) * scale + shift, from float32 rounded to the dtype of x."""
    wide = x.astype(jnp.float32)
    if norm.kind == "layer":
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + norm.epsilon)
    y = wide * norm.scale.astype(jnp.float32)
    return round_to(y if norm.shift is None else y + norm.shift.astype(jnp.float32), x.dtype)


def modulate_images(
    x: jax.Array,  # [m, k], as many rows of each image
    norm: Norm,  # of [k] or [images, k]
) -> jax.Array:
    """Return `modulate` of each image's rows with its vectors, [m, k]."""
    images = norm.images
    norm = jax.tree.map(lambda v: v.reshape(-1, 1, v.shape[-1]), norm)
    return modulate(x.reshape(images, -1, x.shape[-1]), norm).reshape(x.shape)


def round_to(
    y: jax.Array,  # float32
    dtype: jnp.dtype,
) -> jax.Array:
    """Cast float32 so that XLA keeps the rounding: a cast there and back it may leave out."""
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(y, bits.nexp, bits.nmant).astype(dtype)


def _value(part: Part) -> jax.Array:
    columns = part.array[:, part.start : part.start + part.size]
    if part.activation is None and part.times is None:
        return columns
    y = columns.astype(jnp.float32)
    if part.activation is not None:
        name = part.activation
        y = with_derivative(ACTIVATIONS[name], DIFFERENTIABLE[name], y)
    if part.times is not None:
        y = y * part.array[:, part.times : part.times + part.size].astype(jnp.float32)
    return round_to(y, columns.dtype)
