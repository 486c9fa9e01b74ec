"""Activation quantization in one pass: floats to the int8 operand of `pallas_kernels.matmul`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.arguments import (
    check_array,
    check_choices,
    check_k,
    check_of_images,
    check_tuple,
)
from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.functions import Norm, Part, join
from pallas_kernels.gradients import remembering
from pallas_kernels.operands import Int8Rows, PackedRows
from pallas_kernels.quantize import channels, mosaic_tpu, reference, triton
from pallas_kernels.sharding import axes_of, partitioned

__all__ = ["QUANTIZE", "Norm", "Part", "quantize"]


def _joined(run: Callable) -> Callable:
    """Give a backend that takes one array its parts side by side."""
    return lambda x, **options: run(join(x), **options)


# The first that can run does.
QUANTIZE = Operation(
    name="quantize",
    backends=(
        Backend(
            name="mosaic_tpu",
            run=_joined(mosaic_tpu.quantize),
            why_not=mosaic_tpu.why_not,
            splits=False,
        ),
        Backend(name="triton", run=triton.quantize, why_not=triton.why_not),
        Backend(name="reference", run=reference.quantize),
    ),
)


def quantize(
    x: jax.Array | tuple[Part, ...],  # [m, k], floating
    *,
    bits: int = 4,
    group_size: int = 16,
    range: str = "absmax",
    step: str = "power",
    levels: str = "uniform",
    rounding: str = "nearest",
    norm: Norm | None = None,  # of [k] or [images, k]
    multiplier: jax.Array | None = None,  # [k], floating
    rotation: int | None = None,
    rotated_from: int = 0,
    wide: Sequence[bool] | np.ndarray | jax.Array | None = None,  # [ceil(k / group_size)]
    packed: bool = False,
    implementation: Implementation = None,
) -> Int8Rows | PackedRows:
    """Quantize each row to 8 bits, or on to 4 bits, in one pass over memory.

    What happens to the rows before comes in this order, in float32 between the steps: activations
    of parts, the norm, the multiplier, the rotation. Gradients go straight through to the result
    of these: see `pallas_kernels.gradients`.

    Args:
      x: the activations; or parts of them, which a kernel reads from where they are. Their
        activation and product is computed in float32 and rounded once to their dtype, which they
        must share.
      bits: 8 for stage 1 of the format alone, 4 for both stages.
      group_size: elements that share a shift, for 4 bits.
      range: "absmax" or "minmax".
      step: "power" or "integer", for 4 bits.
      levels: "uniform" or "stretched", for 4 bits with an integer step.
      rounding: "nearest" or "truncate", for 4 bits.
      norm: take norm(x) * norm.scale + norm.shift, which is `functions.modulate`: computed in
        float32 and rounded to the dtype of x. Backends sum a row in orders of their own, so
        that values at a rounding boundary may differ. Vectors of several images, [images, k], are
        for as many rows each.
      multiplier: of each channel, in float32 and not rounded: `channels.scale_channels`.
      rotation: rotate blocks of 16, 64 or 256 channels by a regular Hadamard matrix, not rounded:
        `channels.rotate`. A row whose sums overflow float32 has scale NaN.
      rotated_from: the first channel that is rotated, of a whole block: those before stay.
      wide: True for the groups that stay at 8 bits, though the others have 4.
      packed: return the 4-bit form instead of the decoded values.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      Int8Rows of [m, k]: values int8, decoded, minus 128 for "minmax"; scale float32 [m, 1]; lo
      float32 [m, 1], or None for "absmax". If packed, PackedRows of [m, k]. A row with a NaN or an
      infinity has scale NaN, whatever its values.

    Raises:
      ValueError: x isn't floating or has no [m, k] with k >= 1, a value that the format lacks, an
        integer step with "minmax" or "truncate", stretched levels without it, packed with 8 bits
        or with wide groups, norm or multiplier or wide of another size than k asks for, k or
        rotated_from no multiple of the rotation, parts don't fit together, or a named
        implementation can't run here.
    """
    check_choices(bits=bits, group_size=group_size, range=range, step=step, rounding=rounding)
    check_choices(levels=levels, step=step)
    if packed and bits == 8:
        raise ValueError("packed is True with bits=8; only 4-bit codes are packed")
    m, k = _check_x(x)
    _check_channels(m, k, norm, multiplier)
    _check_rotation(k, rotation, rotated_from)
    wide = _check_wide(wide, -(-k // group_size), bits, packed)
    given = x, norm, multiplier
    rotated: dict[str, Any] = {"rotation": rotation, "rotated_from": rotated_from}
    run = functools.partial(
        QUANTIZE,
        bits=bits,
        group_size=group_size,
        range=range,
        step=step,
        rounding=rounding,
        levels=levels,
        packed=packed,
        implementation=implementation,
        **rotated,
    )
    arrays = partitioned(
        lambda wide, x, norm, multiplier: run(x, norm=norm, multiplier=multiplier, wide=wide),
        lambda: axes_of(x[0].array if isinstance(x, tuple) else x),
        wide,
        *lax.stop_gradient(given),
    )
    if packed:
        codes, shifts, scale, lo = arrays
        rows: Int8Rows | PackedRows = PackedRows(
            codes=codes,
            shifts=shifts,
            scale=scale,
            lo=lo,
            group_size=group_size,
            step=step,
            levels=levels,
            range=range,
            padding=2 * codes.shape[1] - k,
        )
        return remembering(rows, functools.partial(reference.before, **rotated), *given)
    powers = bits == 4 and step == "power" and wide is None
    values, scale, lo = arrays
    rows = Int8Rows(values=values, scale=scale, lo=lo, value_bits=4 if powers else 8)
    return remembering(rows, functools.partial(reference.before, **rotated), *given)


def _check_x(x: jax.Array | tuple[Part, ...]) -> tuple[int, int]:
    """Refuse what isn't rows or parts of rows; return their shape."""
    if isinstance(x, list | tuple):
        _check_parts(x)
        m, k = x[0].array.shape[0], sum(part.size for part in x)
    else:
        check_array("x", x, ("m", "k"), jnp.floating)
        m, k = x.shape
    check_k(k)
    return m, k


def _check_parts(parts: tuple[Part, ...]) -> None:
    check_tuple("x", parts, Part, otherwise="an array, or ")
    for part in parts:
        check_array("a part of x", part.array, ("m", "k"), jnp.floating)
        check_choices(**{"activation of a part": part.activation})
        for start in (part.start, *([] if part.times is None else [part.times])):
            if start < 0 or part.size < 1 or start + part.size > part.array.shape[1]:
                raise ValueError(
                    f"x has a part of columns {start} to {start + part.size} of an array of "
                    f"{part.array.shape[1]}; they must lie inside"
                )
    if len({(part.array.shape[0], part.dtype) for part in parts}) != 1:
        kinds = ", ".join(f"{part.dtype}{list(part.array.shape)}" for part in parts)
        raise ValueError(f"x has parts {kinds}; they must have the same rows and dtype")


def _check_channels(m: int, k: int, norm: Norm | None, multiplier: jax.Array | None) -> None:
    """Refuse a norm or a multiplier that rows of k channels can't have."""
    if norm is not None:
        if not isinstance(norm, Norm):
            raise ValueError(f"norm is a {type(norm).__name__}; it must be a Norm or None")
        check_choices(**{"norm.kind": norm.kind})
        for name, vectors in (("norm.scale", norm.scale), ("norm.shift", norm.shift)):
            if vectors is not None:
                check_of_images(name, vectors, m, k)
                if vectors.ndim == 2 and vectors.shape[0] not in (1, norm.images):
                    raise ValueError(
                        f"{name} is of {vectors.shape[0]} images and the norm of {norm.images}"
                    )
    if multiplier is not None:
        check_array("multiplier", multiplier, (k,), jnp.floating)


def _check_rotation(k: int, rotation: int | None, first: int) -> None:
    """Refuse a rotation that rows of k channels can't have, of those from `first` on."""
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < k:
        raise ValueError(f"rotated_from is {first!r}; it must be one of the {k} channels")
    if rotation is None:
        if first:
            raise ValueError(f"rotated_from is {first} without a rotation; leave it out")
        return
    if isinstance(rotation, bool) or rotation not in channels.SIZES:
        raise ValueError(f"rotation is {rotation!r}; it must be None, 16, 64 or 256")
    for name, value in (("k", k), ("rotated_from", first)):
        if value % rotation:
            raise ValueError(
                f"{name} is {value} with rotation={rotation}; it must be a multiple of that"
            )


def _check_wide(
    wide: Sequence[bool] | np.ndarray | jax.Array | None, groups: int, bits: int, packed: bool
) -> jax.Array | np.ndarray | None:
    """Return the mask of wide groups, or None where it is known that there are none."""
    if wide is None:
        return None
    mask = wide if isinstance(wide, jax.Array) else np.asarray(wide)
    if mask.dtype != bool or mask.shape != (groups,):
        raise ValueError(
            f"wide is {mask.dtype}{list(mask.shape)}; it must be None or one boolean for each of "
            f"{groups} groups"
        )
    if bits == 8 or (isinstance(mask, np.ndarray) and not mask.any()):
        return None
    if packed:
        raise ValueError("wide is given with packed=True; groups of 8 bits can't be packed")
    return mask
