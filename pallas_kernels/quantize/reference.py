"""Activations to decoded 8-bit operands, in plain jnp."""

import jax

from pallas_kernels import codec


def quantize(
    x: jax.Array,  # [m, k], floating
    *,
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantize each row; see `pallas_kernels.quantize.quantize`."""
    values, scale, lo = codec.quantize_8bit(x, range=range)
    if bits == 4:
        codes, shifts = codec.encode(values, group_size=group_size, step=step, rounding=rounding)
        values = codec.decode(codes, shifts, step=step)[:, : x.shape[1]]
    return codec.to_operand(values), scale, lo
