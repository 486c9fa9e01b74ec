"""Activation quantization in one pass: floats to the int8 operand of `pallas_kernels.matmul`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import check_array, check_choices, check_k, check_tuple
from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.functions import Part, join
from pallas_kernels.quantize import mosaic_tpu, reference, triton

__all__ = ["QUANTIZE", "Part", "quantize"]


def _joined(run: Callable) -> Callable:
    """Give a backend that takes one array its parts side by side."""
    return lambda x, **options: run(join(x), **options)


# The first that can run does.
QUANTIZE = Operation(
    name="quantize",
    backends=(
        Backend(name="mosaic_tpu", run=_joined(mosaic_tpu.quantize), why_not=mosaic_tpu.why_not),
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
    rounding: str = "nearest",
    norm: tuple[jax.Array, jax.Array] | None = None,  # shift [k] and scale [k]
    packed: bool = False,
    implementation: Implementation = None,
) -> tuple[jax.Array | None, ...]:
    """Quantize each row to 8 bits, or on to 4 bits, in one pass over memory.

    Args:
      x: the activations; or parts of them, which a kernel reads from where they are. Their
        activation is computed in float32 and rounded to their dtype, which they must share.
      bits: 8 for stage 1 of the format alone, 4 for both stages.
      group_size: elements that share a shift, for 4 bits.
      range: "absmax" or "minmax".
      step: "power" or "integer", for 4 bits.
      rounding: "nearest" or "truncate", for 4 bits.
      norm: quantize layer_norm(x) * (1 + scale) + shift instead, which is `functions.modulate`:
        computed in float32 and rounded to the dtype of x. Backends sum a row in orders of their
        own, so that values at a rounding boundary may differ.
      packed: return the 4-bit form instead of the decoded values.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      values int8 [m, k], decoded, minus 128 for "minmax"; scale float32 [m, 1]; lo float32
      [m, 1], or None for "absmax". A row with a NaN or an infinity has scale NaN. If packed, codes
      uint8 [m, k_padded / 2] and shifts uint8 [m, ceil(groups / 2)] in place of the values.

    Raises:
      ValueError: x isn't floating or has no [m, k] with k >= 1, a value that the format lacks, an
        integer step with "minmax" or "truncate", packed with 8 bits, norm isn't two arrays of k
        elements, parts don't fit together, or a named implementation can't run here.
    """
    check_choices(bits=bits, group_size=group_size, range=range, step=step, rounding=rounding)
    if packed and bits == 8:
        raise ValueError("packed is True with bits=8; only 4-bit codes are packed")
    if isinstance(x, list | tuple):
        _check_parts(x)
        k = sum(part.size for part in x)
    else:
        check_array("x", x, ("m", "k"), jnp.floating)
        k = x.shape[1]
    check_k(k)
    if norm is not None and [a.shape for a in norm] != [(k,)] * 2:
        shapes = ", ".join(str(list(a.shape)) for a in norm)
        raise ValueError(f"norm has shapes {shapes}; it must be shift and scale of [{k}]")
    return QUANTIZE(
        x,
        bits=bits,
        group_size=group_size,
        range=range,
        step=step,
        rounding=rounding,
        norm=norm,
        packed=packed,
        implementation=implementation,
    )


def _check_parts(parts: tuple[Part, ...]) -> None:
    check_tuple("x", parts, Part, otherwise="an array, or ")
    for part in parts:
        check_array("a part of x", part.array, ("m", "k"), jnp.floating)
        check_choices(activation=part.activation)
        if part.start < 0 or part.size < 1 or part.start + part.size > part.array.shape[1]:
            raise ValueError(
                f"x has a part of columns {part.start} to {part.start + part.size} of an array of "
                f"{part.array.shape[1]}; they must lie inside"
            )
    if len({(part.array.shape[0], part.dtype) for part in parts}) != 1:
        kinds = ", ".join(f"{part.dtype}{list(part.array.shape)}" for part in parts)
        raise ValueError(f"x has parts {kinds}; they must have the same rows and dtype")
