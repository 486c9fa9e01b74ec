"""The vocabulary of methods: a layer, the ops around its product, what it has seen.

y = x' weight^T + bias + sum of what the ops add, where x' is x through the ops, in their order.
A transform fits itself to a layer and returns the layer behind one op, by `Layer.then`, which is
the only way to change one: op, weight and statistics change together, so that every op sees the
input as it was where it was fitted.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.channels import rotate, rotate_from

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe

T = TypeVar("T")
# Statistics of a layer's inputs that a method may ask for; fields of `Seen`.
Need = Literal["rows", "absmax", "mean", "gram"]

HIGHEST = jax.lax.Precision.HIGHEST


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen keyword-only dataclass that is a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


def static(default: Any = dataclasses.MISSING) -> Any:
    """Return a field that is part of the type under jit."""
    return dataclasses.field(default=default, metadata={"static": True})


@pytree
class Seen:
    """What is known of a layer's inputs; None where nobody asked for it."""

    rows: jax.Array | None = None  # float32 [calls, rows a call, k]: a sample
    absmax: jax.Array | None = None  # float32 [k], of every input
    mean: jax.Array | None = None  # float32 [k], over every input
    gram: jax.Array | None = None  # float32 [k, k]: mean of x^T x over every input

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that are there."""
        fields = (field.name for field in dataclasses.fields(self))
        return frozenset(name for name in fields if getattr(self, name) is not None)


class Op:
    """What is done to the input of a layer, at run time; a pytree."""

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return x' [..., k] for x [..., k], and what is added to y [..., n], or None."""
        raise NotImplementedError

    def see(self, seen: Seen) -> Seen:
        """Return the statistics of x', given those of x."""
        raise NotImplementedError

    def back(self, weight: jax.Array) -> jax.Array:
        """Return what a weight [n, k] behind the op is in front of it: the op's transpose.

        x' w'^T = x w^T, but for a constant where the op adds one to x.
        """
        return weight

    def behind(self, weight: jax.Array) -> jax.Array | None:
        """Return what a weight [n, k] in front of the op is behind it: x' w'^T = x w^T.

        None where there is none: what the op adds to x or takes from it would be missed.
        """
        return weight

    def after(self, y: jax.Array) -> jax.Array:
        """Return what becomes of the product [..., n], its bias added: itself but for few ops."""
        return y


@pytree
class Scale(Op):
    """Multiplies channels by factors."""

    factor: jax.Array  # float32 [k]

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Return x * factor."""
        return x * self.factor.astype(x.dtype), None

    def back(self, weight: jax.Array) -> jax.Array:
        """Return weight * factor."""
        return weight * self.factor

    def behind(self, weight: jax.Array) -> jax.Array:
        """Return weight / factor."""
        return weight / self.factor

    def see(self, seen: Seen) -> Seen:
        """Return the statistics of x * factor."""
        f = self.factor
        return Seen(
            rows=mapped(lambda rows: rows * f, seen.rows),
            absmax=mapped(lambda a: a * jnp.abs(f), seen.absmax),
            mean=mapped(lambda mean: mean * f, seen.mean),
            gram=mapped(lambda gram: gram * f * f[:, None], seen.gram),
        )


@pytree
class Offset(Op):
    """Adds one number to the input, and to the output what takes it back."""

    amount: jax.Array  # float32 []
    bias: jax.Array  # float32 [n]: minus amount times the sum of each row of the weight

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return x + amount."""
        return x + self.amount.astype(x.dtype), self.bias

    def behind(self, weight: jax.Array) -> None:
        """Return None: the amount would be multiplied too."""

    def see(self, seen: Seen) -> Seen:
        """Return the statistics of x + amount; the Gram matrix needs the mean."""
        amount, gram = self.amount, seen.gram
        if gram is not None:
            assert seen.mean is not None
            gram = gram + amount * (seen.mean + seen.mean[:, None]) + amount**2
        return Seen(
            rows=mapped(lambda rows: rows + amount, seen.rows),
            absmax=mapped(lambda a: a + jnp.abs(amount), seen.absmax),
            mean=mapped(lambda mean: mean + amount, seen.mean),
            gram=gram,
        )


@pytree
class BlockRotation(Op):
    """Rotates blocks of channels by one orthogonal matrix, `hadamard(size)`.

    Channels before `first` come rotated already from the layers that made them, `TurnedRows`:
    nothing is done for them at run time. What the op is to the 16-bit model's input has it all.
    """

    size: int = static()  # channels of a block, from `first` on
    first: int = static(0)
    folded: int | None = static(None)  # channels of a block before `first`

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Return x with its blocks rotated."""
        return self._rotate(x), None

    def back(self, weight: jax.Array) -> jax.Array:
        """Return the weight rotated: the matrix is symmetric, its own inverse."""
        return self._rotate(weight)

    behind = back

    def see(self, seen: Seen) -> Seen:
        """Return the statistics behind the rotation; maxima are bounds unless there are rows."""
        rows = mapped(self._rotate, seen.rows)
        absmax = mapped(self._bound, seen.absmax)
        if rows is not None and absmax is not None:
            absmax = jnp.max(jnp.abs(rows), axis=(0, 1))
        both = mapped(self._rotate, seen.gram)
        return Seen(
            rows=rows,
            absmax=absmax,
            mean=mapped(self._rotate, seen.mean),
            gram=mapped(lambda gram: self._rotate(gram.T).T, both),
        )

    def given(self, x: jax.Array) -> jax.Array:
        """Return x [..., k] of the 16-bit model as the quantized one gives it to the layer."""
        if self.folded is None:
            return x
        front = rotate(x[..., : self.first], self.folded)
        return jnp.concatenate([front, x[..., self.first :]], axis=-1)

    def _rotate(self, x: jax.Array) -> jax.Array:
        return rotate_from(self.given(x), self.size, self.first)

    def _bound(self, absmax: jax.Array) -> jax.Array:
        front, rest = absmax[: self.first], absmax[self.first :]
        front = front if self.folded is None else _block_bound(front, self.folded)
        return jnp.concatenate([front, _block_bound(rest, self.size)])


def _block_bound(absmax: jax.Array, size: int) -> jax.Array:
    """Return the most that a rotation of blocks makes of channels with these maxima, [k]."""
    blocks = absmax.reshape(-1, size)
    total = jnp.sum(blocks, axis=1, keepdims=True) * size**-0.5
    return jnp.broadcast_to(total, blocks.shape).reshape(-1)


@pytree
class TurnedRows(Op):
    """Marks rows of a weight that are rotated in blocks, for the layers that read their outputs.

    Those layers' weights are, too: nothing is done at run time. Else `after` turns them back.
    """

    size: int = static()  # channels of a block, `hadamard(size)`
    first: int = static()  # row
    rows: int = static()

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Return x."""
        return x, None

    def see(self, seen: Seen) -> Seen:
        """Return the statistics as they are."""
        return seen

    def after(self, y: jax.Array) -> jax.Array:
        """Return the product [..., n] as the 16-bit model has it."""
        return self.turned(y)

    def turned(self, y: jax.Array) -> jax.Array:
        """Return y [..., n] with its values rotated: the other way is the same, in float32."""
        parts = jnp.split(y, [self.first, self.first + self.rows], axis=-1)
        return jnp.concatenate([parts[0], rotate(parts[1], self.size), parts[2]], axis=-1)


@pytree
class Permute(Op):
    """Puts channels in another order."""

    index: jax.Array  # int32 [k]: of the channel that comes to each place

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Return x[..., index]."""
        return x[..., self.index], None

    def back(self, weight: jax.Array) -> jax.Array:
        """Return the weight in the order before."""
        return weight[:, jnp.argsort(self.index)]

    def behind(self, weight: jax.Array) -> jax.Array:
        """Return the weight in the new order."""
        return weight[:, self.index]

    def see(self, seen: Seen) -> Seen:
        """Return the statistics in the new order."""
        order = self.index
        return Seen(
            rows=mapped(lambda rows: rows[..., order], seen.rows),
            absmax=mapped(lambda a: a[order], seen.absmax),
            mean=mapped(lambda mean: mean[order], seen.mean),
            gram=mapped(lambda gram: gram[order][:, order], seen.gram),
        )


@pytree
class Product(Op):
    """A branch in 16 bits: adds x down up^T, and leaves x as it is."""

    down: jax.Array  # bfloat16 [k, rank]
    up: jax.Array  # bfloat16 [n, rank]
    # [rank, k], what is multiplied where the branch reads the quantized input; made by `place`
    down_8bit: Any = None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return x, and x down up^T in float32."""
        inner = self.inner(x)
        return x, jnp.matmul(inner, self.up.astype(inner.dtype).T, precision=HIGHEST)

    def inner(self, x: jax.Array) -> jax.Array:
        """Return x down, [..., rank]: in float32 if x is, else rounded to the dtype of x."""
        y = jnp.matmul(
            x, self.down.astype(x.dtype), precision=HIGHEST, preferred_element_type=jnp.float32
        )
        return y.astype(x.dtype)

    def see(self, seen: Seen) -> Seen:
        """Return the statistics as they are."""
        return seen


@pytree
class TakeOut(Op):
    """Multiplies a few channels in 16 bits and takes them out of the quantized product's input."""

    index: jax.Array  # int32 [r]
    weight: jax.Array  # bfloat16 [n, r]

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return x with zeros in those channels, and their product in float32."""
        taken = x[..., self.index]
        added = jnp.matmul(
            taken,
            self.weight.astype(x.dtype).T,
            precision=HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return x.at[..., self.index].set(0), added

    def back(self, weight: jax.Array) -> jax.Array:
        """Return the weight with zeros in those channels, which it isn't given."""
        return weight.at[:, self.index].set(0)

    def behind(self, weight: jax.Array) -> None:
        """Return None: the channels are gone."""

    def see(self, seen: Seen) -> Seen:
        """Return the statistics with zeros in those channels."""

        def without(x: jax.Array) -> jax.Array:
            return x.at[..., self.index].set(0)

        return Seen(
            rows=mapped(without, seen.rows),
            absmax=mapped(without, seen.absmax),
            mean=mapped(without, seen.mean),
            gram=mapped(lambda gram: without(without(gram).T).T, seen.gram),
        )


@pytree
class Wide(Op):
    """Marks groups of channels that keep eight bits; leaves x as it is."""

    groups: jax.Array  # bool [groups of the input's format]

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Return x."""
        return x, None

    def see(self, seen: Seen) -> Seen:
        """Return the statistics as they are."""
        return seen


@pytree
class Layer:
    """A linear on its way through the transforms."""

    weight: jax.Array  # float32 [n, k]
    bias: jax.Array | None = None  # float32 [n]
    ops: tuple[Op, ...] = ()
    seen: Seen = dataclasses.field(default_factory=Seen)

    def then(self, op: Op, weight: jax.Array) -> "Layer":
        """Return the layer behind an op, with the weight [n, k] that belongs behind it."""
        return dataclasses.replace(self, weight=weight, ops=(*self.ops, op), seen=op.see(self.seen))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return y [..., n] for float32 x [..., k]: what the layer computes before rounding."""
        given, added = run_ops(self.ops, x)
        y = jnp.matmul(given, self.weight.T, precision=HIGHEST)
        y = y if self.bias is None else y + self.bias
        y = y if added is None else y + added
        for op in reversed(self.ops):
            y = op.after(y)
        return y


class Transform(abc.ABC):
    """What changes a layer before it is rounded: a frozen dataclass, `schema.part`."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that `fit` reads; a class that always reads the same says so plainly."""
        return frozenset()

    def quick(self) -> "Transform":
        """Return a cheaper form for comparing what comes before it; itself if there is none."""
        return self

    @abc.abstractmethod
    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind one op; traceable, so that `jax.eval_shape` gives its tree.

        Args:
          layer: has the statistics that the transform and those after it need.
          rest: what is still to be done with the layer; `rest.error(candidate)` tells how well.
        """


def run_ops(ops: tuple[Op, ...], x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return x [..., k] through the ops, and the sum of what they add to y, or None."""
    total = None
    for op in ops:
        x, added = op(x)
        if added is not None:
            total = added if total is None else total + added
    return x, total


def mapped(function: Callable[[jax.Array], jax.Array], array: jax.Array | None) -> jax.Array | None:
    """Return function(array), None where there is none."""
    return None if array is None else function(array)
