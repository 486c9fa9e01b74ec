"""Activation quantization in one pass: floats to the int8 operand of `pallas_kernels.matmul`."""

import jax

from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.quantize import mosaic_tpu, reference, triton

# The first that can run does; the kernels wait for their check on hardware, as in `matmul`.
QUANTIZE = Operation(
    name="quantize",
    backends=(
        Backend(name="reference", run=reference.quantize),
        Backend(name="mosaic_tpu", run=mosaic_tpu.quantize, why_not=mosaic_tpu.why_not),
        Backend(name="triton", run=triton.quantize, why_not=triton.why_not),
    ),
)


def quantize(
    x: jax.Array,  # [m, k], floating
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
      x: the activations.
      bits: 8 for stage 1 of the format alone, 4 for both stages.
      group_size: elements that share a shift, for 4 bits.
      range: "absmax" or "minmax".
      step: "power" or "integer", for 4 bits.
      rounding: "nearest" or "truncate", for 4 bits.
      norm: quantize layer_norm(x) * (1 + scale) + shift instead, which is `reference.modulate`:
        computed in float32 and rounded to the dtype of x. Backends sum a row in orders of their
        own, so that values at a rounding boundary may differ.
      packed: return the 4-bit form instead of the decoded values.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      values int8 [m, k], decoded, minus 128 for "minmax"; scale float32 [m, 1]; lo float32
      [m, 1], or None for "absmax". A row with a NaN or an infinity has scale NaN. If packed, codes
      uint8 [m, k_padded / 2] and shifts uint8 [m, ceil(groups / 2)] in place of the values.

    Raises:
      ValueError: bits is neither 4 nor 8, packed with 8 bits, norm isn't two arrays of k elements,
        or a named implementation can't run here.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits!r}; it must be 4 or 8")
    if packed and bits == 8:
        raise ValueError("packed is True with bits=8; only 4-bit codes are packed")
    if norm is not None and [a.shape for a in norm] != [x.shape[1:]] * 2:
        shapes = ", ".join(str(list(a.shape)) for a in norm)
        raise ValueError(f"norm has shapes {shapes}; it must be shift and scale of [{x.shape[1]}]")
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
