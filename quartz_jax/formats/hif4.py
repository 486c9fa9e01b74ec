"""HiF4: three levels of exponents above codes of three bits and a sign."""

import jax
import jax.numpy as jnp

from quartz_jax.formats.base import Format, Kept, Scales, absmax, join, pad, split
from quartz_jax.formats.floating import floor_log2, power_of_two
from quartz_jax.schema import part

_SHARED = 64  # elements under a scale
_FOURS = 16  # pieces of 4 elements in them
_CODE_MAX = 7  # in quarters
_LARGEST = 7.0  # 1.75 with both exponent bits
_EXPONENTS = (-48, 15)  # of E6M2
_E6M2_MAX = 1.5 * 2.0**15  # 1.75 * 2**15 is NaN


@part()
class HiF4(Format):
    """64 elements share a scale, 8 and 4 of them an exponent bit each (arXiv 2602.11287).

    scale = E6M2(max|64| / 7), 6 bits of exponent and 2 of mantissa, 2**-48 to 1.5 * 2**15;
    e8 = max|8| >= 4 scale; e4 = max|4| >= 2 scale 2**e8; element = clip(round(4 t), -7, 7) / 4
    with t = x / (scale 2**(e8 + e4)). As in ARCQuant's code (model/quantize.py), ties apart: they
    go to even here. Codes share both bits in fours, so the block is 4 and its scales depend on
    the others of its 64.
    """

    block = 4
    blocks_apart = False

    def bits(self, k: int) -> float:
        """Four, and for 64 elements eight of scale and 8 + 16 exponent bits."""
        return 4 + 32 / _SHARED

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return scale, e8 and e4 of each four; blocks [..., all of a row, 4]."""
        count = blocks.shape[-2]
        peaks = pad(absmax(blocks)[..., 0], _FOURS, "constant")
        by_4 = split(peaks, _FOURS)
        by_8 = jnp.repeat(jnp.max(split(by_4, 2), axis=-1), 2, axis=-1)
        scale = _round_e6m2(jnp.max(by_4, axis=-1, keepdims=True) / _LARGEST)
        e8 = by_8 >= 4 * scale
        e4 = by_4 >= 2 * scale * jnp.where(e8, 2, 1)
        scale = jnp.broadcast_to(scale, by_4.shape)
        return tuple(join(leaf)[..., :count, None] for leaf in (scale, e8, e4))

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return quarters in two's complement, int32."""
        scale, e8, e4 = inner
        quarter = scale * _exponents(e8, e4) / 4
        return jnp.clip(jnp.round(values / quarter), -_CODE_MAX, _CODE_MAX).astype(jnp.int32)

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return E6M2 scales, and exponent bits."""
        scale, e8, e4 = inner
        return {
            "scale": _store_e6m2(scale),
            "by_8": e8.astype(jnp.uint8),
            "by_4": e4.astype(jnp.uint8),
        }

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return quarters times scale and exponents."""
        step = _load_e6m2(kept["scale"]) * _exponents(kept["by_8"], kept["by_4"])
        return codes * (step / 4)

    def exact_16(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Return all of it, six significant bits, and a row scale of one."""
        values = self.decode(codes, kept)
        return values.astype(jnp.bfloat16), jnp.ones_like(values[..., :1, :1])

    def pack_scales(self, scales: Kept) -> Kept:
        """Return a scale for 64 elements, a bit for 8 and one for 4, eight to a byte."""
        by_8, by_4 = (pad(scales[name], _FOURS, "constant") for name in ("by_8", "by_4"))
        return {
            "scale": scales["scale"][..., ::_FOURS],
            "by_8": _pack_bits(by_8[..., ::2]),
            "by_4": _pack_bits(by_4),
        }

    def unpack_scales(self, stored: Kept, blocks: int) -> Kept:
        """Undo `pack_scales`."""
        scales = {
            "scale": jnp.repeat(stored["scale"], _FOURS, axis=-1),
            "by_8": jnp.repeat(_unpack_bits(stored["by_8"]), 2, axis=-1),
            "by_4": _unpack_bits(stored["by_4"]),
        }
        return {name: leaf[..., :blocks] for name, leaf in scales.items()}

    def __str__(self):
        return "hif4"


def _pack_bits(bits: jax.Array) -> jax.Array:  # uint8 [..., 8 n]
    """Return eight bits a byte, the lowest first, uint8 [..., n]."""
    return jnp.sum(split(bits, 8) << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)


def _unpack_bits(packed: jax.Array) -> jax.Array:  # uint8 [..., n]
    """Undo `_pack_bits`."""
    return join((packed[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1)


def _exponents(e8: jax.Array, e4: jax.Array) -> jax.Array:
    """Return 2**(e8 + e4), float32."""
    return power_of_two(e8.astype(jnp.int32) + e4.astype(jnp.int32))


def _round_e6m2(x: jax.Array) -> jax.Array:  # float32, at least 0
    """Return the nearest E6M2 value, ties to the even mantissa, never zero."""
    step = power_of_two(jnp.maximum(floor_log2(x), _EXPONENTS[0]) - 2)
    return jnp.clip(jnp.round(x / step) * step, 2.0 ** _EXPONENTS[0], _E6M2_MAX)


def _store_e6m2(x: jax.Array) -> jax.Array:  # float32 values that E6M2 holds
    """Return exponent and mantissa, uint8."""
    exponent = floor_log2(x)
    mantissa = (x * power_of_two(2 - exponent)).astype(jnp.int32) - 4
    return ((exponent - _EXPONENTS[0]) << 2 | mantissa).astype(jnp.uint8)


def _load_e6m2(bits: jax.Array) -> jax.Array:  # uint8
    """Undo `_store_e6m2`."""
    wide = bits.astype(jnp.int32)
    return (4 + (wide & 3)) * power_of_two((wide >> 2) + _EXPONENTS[0] - 2)
