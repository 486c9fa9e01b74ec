"""What every simulated number format shares: cutting rows into blocks, scales, rounding."""

import abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels import codec

Scales = Any  # a pytree of arrays whose last axis has length 1


class NumberFormat(abc.ABC):
    """A number format as three pure steps in float32 along the last axis.

    `outer` finds what whole rows (or the tensor) share, `inner` what a block of `block` elements
    shares, and `round` maps values to the nearest ones that can be stored. They are apart so that
    a method may round column by column with scales that are already fixed (GPTQ does).
    Subclasses are frozen dataclasses: hashable, so that they are static under jax.jit.
    """

    block: int | None  # elements along the row that share the inner scales; None: the whole row
    scale_block: ClassVar[int | None] = None  # elements that count as a row of their own

    @abc.abstractmethod
    def bits(self, k: int) -> float:
        """Stored bits an element, scales included, of rows of k elements."""

    @abc.abstractmethod
    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return what each block shares; blocks float32 [..., block], leaves [..., 1]."""

    @abc.abstractmethod
    def round(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return the stored values nearest to float32 [..., any number], as float32."""

    def outer(self, rows: jax.Array) -> Scales:
        """Return what each row shares; rows float32 [..., k], leaves [..., 1]."""
        return ()

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(
        self,
        x: jax.Array,  # [..., k], floating
    ) -> jax.Array:
        """Return what x is after storing it, float32 [..., k].

        A last block that is short repeats its last element, which changes no extreme.
        """
        k = x.shape[-1]
        rows = x.astype(jnp.float32)
        if self.scale_block:
            rows = split(pad_edge(rows, self.scale_block), self.scale_block)
        outer = jax.tree.map(lambda leaf: leaf[..., None], self.outer(rows))
        block = self.block or rows.shape[-1]
        blocks = split(pad_edge(rows, block), block)
        y = self.round(blocks, outer, self.inner(blocks, outer))
        y = y.reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]]
        return y.reshape(*x.shape[:-1], -1)[..., :k]


def pad_edge(x: jax.Array, multiple: int) -> jax.Array:
    """Repeat the last element of the last axis up to a multiple of `multiple`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)], mode="edge")


def split(x: jax.Array, size: int) -> jax.Array:
    """Cut the last axis into pieces, [..., k] to [..., k / size, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def absmax(x: jax.Array) -> jax.Array:
    """Return max|x| over the last axis, [..., 1]."""
    return jnp.max(jnp.abs(x), axis=-1, keepdims=True)


def multiplier_and_scale(
    extent: jax.Array,  # float32: max|x|, or max - min
    levels: int,  # integer steps in it
) -> tuple[jax.Array, jax.Array]:
    """Return levels / extent and its inverse as the QuaRTZ spec rounds them; 0, 0 if it is tiny."""
    live = extent >= codec.TINY_RANGE
    multiplier = levels / jnp.where(live, extent, 1)
    # XLA's own division may be off by two units in the last place; the correction is for 8 bits
    if levels < 256:
        multiplier = codec.correct_quotient(multiplier, levels, jnp.where(live, extent, 1))
    scale = extent * jnp.float32(1 / levels)
    return jnp.where(live, multiplier, 0), jnp.where(live, scale, 0)


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise ValueError unless a field has one of the listed values."""
    if isinstance(value, bool) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}; it must be one of {listed}")


def check_block(name: str, value: int | None, optional: bool = False) -> None:
    """Raise ValueError unless a field is a whole number of at least 1 (or None, if optional)."""
    if (value is None and optional) or (type(value) is int and value >= 1):
        return
    raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
