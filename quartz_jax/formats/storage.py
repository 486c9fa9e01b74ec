"""Floats to stored tensors and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import CHOICES
from pallas_kernels.gradients import straight_through
from pallas_kernels.operands import int8_values
from pallas_kernels.sharding import axes_of, partitioned
from quartz_jax.formats.base import Format, join
from quartz_jax.formats.quartz import Quartz
from quartz_jax.formats.tensors import BlockRows, Int8Rows, PackedRows, Stored


def quantize(
    x: jax.Array,  # [..., k, ...], floating
    format: Format = Quartz(),  # noqa: B008 (frozen)
    axis: int = -1,
) -> Stored:
    """Quantize along one axis, the contraction axis of the matmul to come.

    Args:
      x: any number of other axes, none included.
      format: such as `Quartz()`, `Int(width=8)` or `NVFP4()`.
      axis: the contraction axis, of k >= 1 elements; the last one but for `Quartz`.

    Returns:
      `PackedRows` for `Quartz`, `Int8Rows` for eight bits under one scale a row, else `BlockRows`.
      Of `Quartz` and eight bits a row (or scale block) with a NaN or an infinity has scale NaN, so
      that everything computed from it is NaN.

      Where x is traced they remember it: what is computed from them within the same function has
      the gradient of the same computation on x, see `pallas_kernels.gradients`.

    Raises:
      ValueError: x isn't floating, has no such axis or an empty one, or another axis than the last
        with a format that lacks it.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; it must be floating, such as bfloat16")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}; x has shape {list(x.shape)} and no such axis")
    if x.shape[axis] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; axis {axis} must not be empty")
    axis = axis % x.ndim - x.ndim
    if axis != -1 and not isinstance(format, Quartz):
        raise ValueError(f"axis is {axis} with {format}; only Quartz has other axes than the last")
    stored = format.store(jnp.moveaxis(x, axis, -1))
    return dataclasses.replace(stored, axis=axis) if isinstance(stored, PackedRows) else stored


class WeightError(ValueError):
    """A weight that no format can hold, as it isn't finite; the message names it."""


def check_finite(name: str, w: jax.Array) -> None:
    """Raise WeightError, with the weight's name, if it holds a NaN or an infinity."""
    if not _all_finite(w):
        raise WeightError(
            f"weight of {name} holds NaN or infinity; check the checkpoint it came from"
        )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def decode(q: PackedRows | Int8Rows) -> jax.Array:
    """Return the stored 8-bit values, exact: int8 of q's shape, asymmetric ones minus 128."""
    values = partitioned(jax.jit(int8_values), lambda: axes_of_rows(q), q)
    return jnp.moveaxis(values, -1, getattr(q, "axis", -1))


def dequantize(q: Stored, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Return what a stored tensor stands for, computed in float32 and cast to `dtype`.

    The result has q's shape. Rows with a NaN or infinite input are NaN. The gradient goes straight
    through to what was quantized in the same function, else to the scales.
    """
    run = functools.partial(_dequantize, dtype=dtype)
    value = straight_through(partitioned(run, lambda: axes_of_rows(q), q), q.source)
    return jnp.moveaxis(value, -1, getattr(q, "axis", -1))


def axes_of_rows(q: Stored) -> tuple:
    """Return the explicit mesh axes of rows [..., k]: those of the codes or values."""
    return axes_of(q.values if isinstance(q, Int8Rows) else q.codes)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(q: Stored, dtype: jnp.dtype) -> jax.Array:
    if isinstance(q, BlockRows):
        return _rows(q.format.decode(*q.format.disassemble(q)), q).astype(dtype)
    values = int8_values(q).astype(jnp.float32)
    scale = _per_element(q.scale, q)
    y = values * scale if q.lo is None else (values + 128) * scale + _per_element(q.lo, q)
    return y.astype(dtype)


def row_operand(stored: Stored) -> PackedRows | Int8Rows | None:
    """Return what kernels multiply of a stored tensor, or None where it has no such form.

    Groups of a size that kernels lack are decoded. Integers of up to 8 bits with one symmetric
    scale a row are int8 rows whatever their width; other formats are if they decode to such
    integers, `Format.exact_8`.
    """
    if isinstance(stored, PackedRows) and not (
        stored.scale_block or stored.group_size in CHOICES["group_size"]
    ):
        return Int8Rows(values=int8_values(stored), scale=stored.scale, lo=stored.lo)
    if not isinstance(stored, BlockRows):
        return stored
    found = stored.format.exact_8(*stored.format.disassemble(stored))
    return found and Int8Rows(values=_rows(found[0], stored), scale=found[1][..., 0])


def exact_16(stored: BlockRows) -> tuple[jax.Array, jax.Array] | None:
    """Return a tensor as bfloat16 [..., k], exact, and float32 [..., 1] that scales its rows.

    None where the format has no such form.
    """
    found = stored.format.exact_16(*stored.format.disassemble(stored))
    if found is None:
        return None
    values, scale = found
    return _rows(values, stored), scale[..., 0]


def _rows(blocks: jax.Array, stored: BlockRows) -> jax.Array:
    """Join blocks [..., blocks, block] to the rows of a tensor, [..., k]."""
    return join(blocks)[..., : stored.k]


def _per_element(scale: jax.Array, q: PackedRows | Int8Rows) -> jax.Array:
    """Repeat one scale a block to one an element, [..., k]; one a row broadcasts as it is."""
    if scale.shape[-1] == 1 or isinstance(q, Int8Rows):
        return scale
    assert q.scale_block is not None
    return jnp.repeat(scale, q.scale_block, axis=-1)[..., : q.k]
