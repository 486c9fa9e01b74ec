"""Floats to quantized tensors and back.

The format is that of "Post-Training Quantization via Residual Truncation and Zero Suppression for
Diffusion Models" (arXiv 2509.26436); `pallas_kernels.codec` defines it exactly.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from quartz_jax.config import QuartzConfig
from quartz_jax.formats.tensors import IntTensor, QuartzTensor


def quantize(
    x: jax.Array,  # [..., k, ...], floating
    config: QuartzConfig = QuartzConfig(),  # noqa: B008 (frozen)
    axis: int = -1,
    search: bool = False,
) -> QuartzTensor:
    """Quantize along one axis, the contraction axis of the matmul to come.

    Args:
      x: any number of other axes, none included.
      config: the format's variant.
      axis: the contraction axis, of k >= 1 elements.
      search: choose each integer step by least squared error (for weights, offline) instead of by
        the group's maximum; only with config.step="integer".

    Returns:
      The tensor. A row (or scale block) with a NaN or an infinity has scale NaN, so that
      everything computed from it is NaN.

    Raises:
      ValueError: x isn't floating, has no such axis or an empty one, or search with a power step.
    """
    _check_floating(x, axis)
    if search and config.step != "integer":
        raise ValueError(
            f"search is True with step={config.step!r}; only step='integer' has steps to search"
        )
    return _quantize(x, config, axis % x.ndim - x.ndim, search)


class WeightError(ValueError):
    """A weight that no format can hold, as it isn't finite; the message names it."""


def quantize_weight(
    name: str,
    w: jax.Array,  # [..., k, ...], floating
    config: QuartzConfig = QuartzConfig(),  # noqa: B008 (frozen)
    axis: int = -1,
    search: bool = False,
) -> QuartzTensor:
    """Quantize a concrete weight; as `quantize`, but a NaN or an infinity is refused.

    Raises:
      WeightError: w holds a NaN or an infinity; it is named.
      ValueError: what `quantize` refuses.
    """
    check_finite(name, w)
    return quantize(w, config, axis, search)


def check_finite(name: str, w: jax.Array) -> None:
    """Raise WeightError, with the weight's name, if it holds a NaN or an infinity."""
    if not _all_finite(w):
        raise WeightError(
            f"weight of {name} holds NaN or infinity; check the checkpoint it came from"
        )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def quantize_int(
    x: jax.Array,  # [..., k], floating
    bits: int = 8,
    range: str = "absmax",
) -> IntTensor:
    """Quantize to plain integers, one scale a row and round to nearest.

    Eight bits are stage 1 of the format; four are the usual baseline:
    clip(round_half_even(x * (7 / a)), -7, 7) with a = max|x| and scale a * float32(1 / 7).

    Raises:
      ValueError: x isn't floating or has no last axis, bits is neither 8 nor 4, range is unknown,
        or range="minmax" with 4 bits.
    """
    _check_floating(x, -1)
    if (bits, range) not in ((8, "absmax"), (8, "minmax"), (4, "absmax")):
        raise ValueError(
            f"bits is {bits!r} with range={range!r}; they must be 8 with 'absmax' or 'minmax', or "
            "4 with 'absmax'"
        )
    return _quantize_int(x, bits, range)


@jax.jit
def decode(
    q: QuartzTensor | IntTensor,
) -> jax.Array:
    """Return the stored 8-bit values, exact: int8 of q's shape, asymmetric ones minus 128."""
    return jnp.moveaxis(decode_rows(q), -1, getattr(q, "axis", -1))


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(
    q: QuartzTensor | IntTensor,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Return decoded values times scale, plus lo if asymmetric, in float32, cast to `dtype`.

    The result has q's shape. Rows with a NaN or infinite input are NaN.
    """
    values = decode_rows(q).astype(jnp.float32)
    scale = _per_element(q.scale, q)
    y = values * scale if q.lo is None else (values + 128) * scale + _per_element(q.lo, q)
    return jnp.moveaxis(y.astype(dtype), -1, getattr(q, "axis", -1))


def decode_rows(q: QuartzTensor | IntTensor) -> jax.Array:
    """Return the stored 8-bit values as int8 [..., k], the contraction axis last."""
    if isinstance(q, IntTensor):
        return q.values if q.bits == 8 else codec.unpack(q.values, signed=True)[..., : q.k]
    values = codec.decode_packed(
        q.codes,
        q.shifts,
        group_size=q.config.group_size,
        step=q.config.step,
        signed=q.config.range == "absmax",
    )
    return values[..., : q.k]


@functools.partial(jax.jit, static_argnames=("config", "axis", "search"))
def _quantize(x: jax.Array, config: QuartzConfig, axis: int, search: bool) -> QuartzTensor:
    x = jnp.moveaxis(x, axis, -1)
    values, scale, lo = codec.quantize_8bit(x, range=config.range, scale_block=config.scale_block)
    codes, shifts = codec.encode(
        values,
        group_size=config.group_size,
        step=config.step,
        rounding=config.rounding,
        search=search,
    )
    return QuartzTensor(
        codes=codec.pack(codes),
        shifts=codec.pack(shifts),
        scale=scale,
        lo=lo,
        config=config,
        axis=axis,
        padding=-x.shape[-1] % config.group_size,
    )


@functools.partial(jax.jit, static_argnames=("bits", "range"))
def _quantize_int(x: jax.Array, bits: int, range: str) -> IntTensor:
    if bits == 4:
        values, scale = codec.quantize_absmax(x, limit=codec.NIBBLE_MAX)
        return IntTensor(values=codec.pack(values), scale=scale, bits=4, padding=x.shape[-1] % 2)
    values, scale, lo = codec.quantize_8bit(x, range=range)
    return IntTensor(values=codec.to_operand(values), scale=scale, lo=lo)


def _per_element(scale: jax.Array, q: QuartzTensor | IntTensor) -> jax.Array:
    """Repeat one scale a block to one an element, [..., k]; one a row broadcasts as it is."""
    if scale.shape[-1] == 1:
        return scale
    return jnp.repeat(scale, q.config.scale_block, axis=-1)[..., : q.k]


def _check_floating(x: jax.Array, axis: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; it must be floating, such as bfloat16")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}; x has shape {list(x.shape)} and no such axis")
    if x.shape[axis] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; axis {axis} must not be empty")
