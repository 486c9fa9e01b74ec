"""The number format a second time, for comparison: NumPy floats and Python integers, no JAX.

Written from the format's rules one element at a time; shares no code with the library.
"""

import dataclasses

import numpy as np

F32 = np.float32


STRETCHED = (0, 1, 2, 3, 4, 5, 7, 9)  # what the magnitudes of stretched codes stand for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A variant of the format."""

    group_size: int = 16
    rounding: str = "nearest"
    range: str = "absmax"
    step: str = "power"
    levels: str = "uniform"
    scale_block: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """What the format stores for an array whose last axis is the contraction axis."""

    codes: np.ndarray  # [..., k_padded / 2], uint8
    shifts: np.ndarray  # [..., ceil(groups / 2)], uint8
    scale: np.ndarray  # [..., blocks], float32
    lo: np.ndarray | None  # [..., blocks], float32
    decoded: np.ndarray  # [..., k], int8, minus 128 if asymmetric


def quantize(x, config, search=False):
    """Quantize an array of any leading shape, row by row."""
    rows = np.asarray(x).astype(F32).reshape(-1, x.shape[-1])
    encoded = [_row(row, config, search) for row in rows]
    lead = x.shape[:-1]

    def stack(part, dtype):
        values = np.array([getattr(row, part) for row in encoded], dtype)
        return values.reshape(*lead, -1)

    return Encoded(
        codes=stack("codes", np.uint8),
        shifts=stack("shifts", np.uint8),
        scale=stack("scale", F32),
        lo=stack("lo", F32) if config.range == "minmax" else None,
        decoded=stack("decoded", np.int8),
    )


def matmul_int(x, w):
    """Integer sums over the last axes, exact, as Python integers would give them."""
    return np.einsum("...k,nk->...n", x.astype(np.int64), w.astype(np.int64))


def int8_row(row, *, limit=127):
    """Stage 1, symmetric: integers and scale."""
    a = np.max(np.abs(row))
    if not np.isfinite(a):
        return [0] * len(row), F32(np.nan)
    if a < F32(2.0**-100):
        return [0] * len(row), F32(0)
    r, scale = F32(limit) / a, a * F32(1 / limit)
    return [int(min(max(np.rint(v * r), -limit), limit)) for v in row], scale


def uint8_row(row):
    """Stage 1, asymmetric: integers, scale and lo."""
    row = np.where(np.abs(row) < F32(2.0**-126), F32(0), row)
    lo = np.min(row)
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.max(row) - lo
    if not np.isfinite(d):
        return [0] * len(row), F32(np.nan), lo
    if d < F32(2.0**-100):
        return [0] * len(row), F32(0), lo
    r, scale = F32(255) / d, d * F32(1 / 255)
    return [int(min(max(np.rint((v - lo) * r), 0), 255)) for v in row], scale, lo


def encode_group(values, config, search=False):
    """Stage 2 of one group of integers: codes and shift (or step - 1)."""
    signed = config.range == "absmax"
    magnitudes = [abs(v) for v in values]
    bits = 0
    for m in magnitudes:
        bits |= m
    if config.step == "integer":
        stretched = _stretched(config)
        if search:
            p = _searched_step(magnitudes, stretched)
        elif stretched:
            p = min(max((4 * max(magnitudes) + 18) // 37, 1), 14)
        else:
            p = min(max((2 * max(magnitudes) + 7) // 15, 1), 16)
        quotients, shift = [_integer_code(m, p, stretched) for m in magnitudes], p - 1
    else:
        shift = max(bits.bit_length() - (3 if signed else 4), 0)
        half = (1 << shift) // 2 if config.rounding == "nearest" else 0
        quotients = [min((m + half) >> shift, 7 if signed else 15) for m in magnitudes]
    return [-t if v < 0 else t for v, t in zip(values, quotients, strict=True)], shift


def decode_group(codes, shift, config):
    """Stage 2 backwards of one group."""
    step = shift + 1 if config.step == "integer" else 1 << shift
    levels = STRETCHED if _stretched(config) else range(16)
    return [(-1 if code < 0 else 1) * levels[abs(code)] * step for code in codes]


def _stretched(config):
    return getattr(config, "levels", "uniform") == "stretched"


def _integer_code(m, p, stretched):
    code = (2 * m + p) // (2 * p)
    if not stretched:
        return min(code, 7)
    return min(code, 5) if m < 6 * p else 6 if m < 8 * p else 7


def _searched_step(magnitudes, stretched):
    def error(p):
        codes = [_integer_code(m, p, stretched) for m in magnitudes]
        levels = STRETCHED if stretched else range(8)
        return sum((m - p * levels[c]) ** 2 for m, c in zip(magnitudes, codes, strict=True))

    return min(range(1, 15 if stretched else 17), key=lambda p: (error(p), p))


def _row(row, config, search):
    block = config.scale_block or len(row)
    values, scales, los = [], [], []
    for start in range(0, len(row), block):
        if config.range == "absmax":
            part, scale = int8_row(row[start : start + block])
        else:
            part, scale, lo = uint8_row(row[start : start + block])
            los.append(lo)
        values += part
        scales.append(scale)
    values += [0] * (-len(values) % config.group_size)
    codes, shifts, decoded = [], [], []
    for start in range(0, len(values), config.group_size):
        group, shift = encode_group(values[start : start + config.group_size], config, search)
        codes += group
        shifts.append(shift)
        decoded += decode_group(group, shift, config)
    offset = 0 if config.range == "absmax" else 128
    return Encoded(
        codes=_pack(codes),
        shifts=_pack(shifts),
        scale=scales,
        lo=los,
        decoded=[v - offset for v in decoded[: len(row)]],
    )


def _pack(nibbles):
    nibbles = nibbles + [0] * (len(nibbles) % 2)
    return [
        low % 16 + 16 * (high % 16) for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)
    ]
