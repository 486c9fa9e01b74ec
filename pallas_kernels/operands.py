"""What the kernels multiply, and what happens to the product: pytrees of plain arrays."""

import dataclasses
import functools
import math
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from pallas_kernels import codec

T = TypeVar("T")


def _static(default: Any) -> Any:
    """Return a field that is part of the type under jit."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, kw_only_default=True)
def rows_dataclass(cls: type[T]) -> type[T]:
    """Make a class of `Rows` a frozen keyword-only dataclass and a pytree without its source."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = [field for field in dataclasses.fields(made) if field.name != "source"]  # type: ignore[arg-type]
    meta = [field.name for field in fields if field.metadata.get("static")]
    data = [field.name for field in fields if field.name not in meta]
    return jax.tree_util.register_dataclass(made, data, meta, drop_fields=["source"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What follows from the stored arrays alone, so also under vmap and shard_map."""

    # The floats that the rows were made of, [..., k], while they are traced: what gradients go to,
    # see `pallas_kernels.gradients`. It is no part of the pytree.
    source: jax.Array | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def bits_per_element(self) -> float:
        """Stored bits, scales and padding included, for each logical element."""
        return 8 * self.nbytes / self.size


@rows_dataclass
class Int8Rows(Rows):
    """int8 rows under one scale a row; the contraction axis is last."""

    values: jax.Array  # [..., k], int8; asymmetric ones minus 128
    scale: jax.Array  # [..., 1], float32
    lo: jax.Array | None = None  # [..., 1], float32: of asymmetric rows
    # 4 if the values, before any 128 is taken off, are 4-bit codes times powers of two: float8
    # holds those exactly, which serves a device without int8 units. It changes no integer.
    value_bits: int = _static(8)

    @property
    def k(self) -> int:
        """Length of the contraction axis."""
        return self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.values.shape


@rows_dataclass
class PackedRows(Rows):
    """Rows in the QuaRTZ format, `pallas_kernels.codec`, the contraction axis last in storage.

    Invariants: codes hold whole groups, the last one padded with zeros; `axis` is negative, so
    that it stays true when leading axes come or go; the logical shape follows from the arrays.
    """

    codes: jax.Array  # [..., (k + padding) / 2], uint8: two 4-bit codes a byte, low nibble first
    shifts: jax.Array  # [..., ceil(groups / 2)], uint8: likewise; step - 1 for the integer step
    scale: jax.Array  # [..., 1 or ceil(k / scale_block)], float32
    lo: jax.Array | None = None  # of the scale's shape, float32: only for range="minmax"
    group_size: int = _static(16)  # elements that share a shift: 8, 16, 32 or 64
    step: str = _static("power")  # of a group: a power of two, or "integer"
    levels: str = _static("uniform")  # what codes stand for: themselves, or "stretched"
    range: str = _static("absmax")  # "absmax" is symmetric, "minmax" asymmetric
    scale_block: int | None = _static(None)  # elements that share a scale; None for the whole row
    axis: int = _static(-1)  # the contraction axis of the logical shape, negative
    padding: int = _static(0)  # elements past k

    @property
    def k(self) -> int:
        """Length of the contraction axis."""
        return 2 * self.codes.shape[-1] - self.padding

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, that of the array that was quantized."""
        leading = self.codes.shape[:-1]
        at = len(leading) + 1 + self.axis
        return (*leading[:at], self.k, *leading[at:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """A product in 16 bits that is added to the dot before the bias: input times up^T."""

    input: jax.Array  # [m, r], floating
    up: jax.Array  # [n, r], floating


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias", "gate", "residual", "branch"],
    meta_fields=["activation", "out_dtype"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What becomes of the scaled dot y, in float32 and in this order, then cast to out_dtype.

    residual + gate * activation(y + branch + bias), each where given.
    """

    bias: jax.Array | None = None  # [n], any float
    # [n], any float: multiplies the columns; or [images, n], each for as many rows
    gate: jax.Array | None = None
    residual: jax.Array | None = None  # [m, n], any float
    branch: Branch | None = None
    activation: str | None = None  # "gelu": its tanh form
    out_dtype: Any = jnp.bfloat16  # floating, of 16 bits or more

    @property
    def images(self) -> int:
        """How many images have gates of their own, 1 if all rows share one or there's none."""
        return 1 if self.gate is None or self.gate.ndim < 2 else self.gate.shape[0]


def int8_values(
    rows: Int8Rows | PackedRows,  # [..., k]
) -> jax.Array:
    """Return the 8-bit values, exact: int8 [..., k], asymmetric ones minus 128."""
    if isinstance(rows, Int8Rows):
        return rows.values
    values = codec.decode_packed(
        rows.codes,
        rows.shifts,
        group_size=rows.group_size,
        step=rows.step,
        levels=rows.levels,
        signed=rows.range == "absmax",
    )
    return values[..., : rows.k]
