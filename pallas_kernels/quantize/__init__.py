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
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantize each row to 8 bits, or on to 4 bits and decode again, without packing.

    Args:
      x: the activations.
      bits: 8 for stage 1 of the format alone, 4 for both stages.
      group_size: elements that share a shift, for 4 bits.
      range: "absmax" or "minmax".
      step: "power" or "integer", for 4 bits.
      rounding: "nearest" or "truncate", for 4 bits.
      implementation: a backend's name, several in order of preference, or None for the best.

    Returns:
      values int8 [m, k], decoded, minus 128 for "minmax"; scale float32 [m, 1]; lo float32
      [m, 1], or None for "absmax". A row with a NaN or an infinity has scale NaN.

    Raises:
      ValueError: bits is neither 4 nor 8, or a named implementation can't run here.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits!r}; it must be 4 or 8")
    return QUANTIZE(
        x,
        bits=bits,
        group_size=group_size,
        range=range,
        step=step,
        rounding=rounding,
        implementation=implementation,
    )
