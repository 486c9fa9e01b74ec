"""The QuaRTZ paper's own analyses (arXiv 2509.26436) on recorded inputs of linears.

Figures are in 8-bit steps where an error is absolute: what stage 1 calls one.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import codec
from quartz_jax.formats import Int, Quartz
from quartz_jax.formats.base import cut, pad, split

GROUP_SIZES = (8, 16, 32, 64, 128)
_LARGE = 8  # magnitudes from here up lose low bits: three magnitude bits are kept
_OUTLIERS = 0.01  # share of a layer's elements that count as outliers, by magnitude
_BITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """One layer's inputs, symmetric 8-bit stage, one scale a token."""

    path: str
    shift_shares: tuple[float, ...]  # share of groups by shift, 0 to 4
    code_entropy: dict[str, float]  # bits a code, by format
    bit_entropy: dict[str, tuple[float, ...]]  # of sign and magnitude bits, high to low, by format
    near_zero: dict[str, float]  # root mean square error where |m| < 8, in 8-bit steps, by format
    outliers: dict[str, float]  # the same over the largest 1 %, by format
    relative: dict[str, float]  # |x - x'| / |x|, by format
    large: float  # P(|m| >= 8)
    mean_error: dict[str, float]  # mean |error| in 8-bit steps, by format
    bound: float  # 16 P(|m| >= 8), see `analyse_layer`
    shared: float  # share of the small values (0 < |m| < 8) in a group with a large one
    erased: float  # share of the small values that come back as zero
    by_group_size: tuple[float, ...]  # |x - x'|**2 / |x|**2 for GROUP_SIZES


FORMATS = {
    "quartz": Quartz(),
    "quartz-truncate": Quartz(rounding="truncate"),
    "int4": Int(width=4),
    "int4-g64": Int(width=4, block=64, scale="float16"),
}


def analyse_layer(
    path: str,
    rows: np.ndarray,  # float32 [samples, k]
) -> LayerAnalysis:
    """Analyse one layer's inputs.

    The error theorem compares QuaRTZ with INT4 under one scale: dropping up to four bits costs
    less than 16 steps and values below 8 cost nothing, so the mean error is below
    16 P(|m| >= 8); INT4's step is 16, its error up to 8; hence the condition P < 0.5. This is our
    reconstruction of it from its condition. It counts each value by its own leading one; a group
    shares the shift of its largest, which `shared` and `erased` measure.
    """
    x = jnp.asarray(rows, jnp.float32)
    x = x[jnp.max(jnp.abs(x), axis=1) > 0]
    outer = codec.range_scale(x)
    m = np.abs(np.asarray(codec.to_8bit(x, outer)).astype(int))
    step = np.asarray(outer.scale)
    errors = {n: np.abs(np.asarray(f(x)) - np.asarray(x)) for n, f in FORMATS.items()}
    in_steps = {name: error / step for name, error in errors.items()}
    small, top = m < _LARGE, np.abs(x) >= np.quantile(np.abs(x), 1 - _OUTLIERS)
    groups = np.asarray(split(pad(jnp.asarray(m), 16), 16))
    peaks = groups.max(axis=-1)
    companions = np.repeat(peaks >= _LARGE, 16, axis=-1)[:, : m.shape[1]]
    living = small & (m > 0)
    erased = np.asarray(FORMATS["quartz"](x)) == 0
    return LayerAnalysis(
        path=path,
        shift_shares=_shift_shares(peaks),
        code_entropy={n: entropy(_counts(_codes(n, x))) for n in ("quartz", "int4")},
        bit_entropy={n: bit_entropies(_codes(n, x)) for n in ("quartz", "int4")},
        near_zero={n: _rms(e[small]) for n, e in in_steps.items()},
        outliers={n: _rms(e[top]) for n, e in in_steps.items()},
        relative={n: float(np.linalg.norm(e) / np.linalg.norm(x)) for n, e in errors.items()},
        large=float(np.mean(~small)),
        mean_error={n: float(e.mean()) for n, e in in_steps.items()},
        bound=float(16 * np.mean(~small)),
        shared=_share(companions, living),
        erased=_share(erased, living),
        by_group_size=tuple(_relative_square(x, size) for size in GROUP_SIZES),
    )


def entropy(counts: np.ndarray) -> float:
    """Return the Shannon entropy of a histogram in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum() + 0.0)


def bit_entropies(codes: np.ndarray) -> tuple[float, ...]:
    """Return the entropy of the sign, then of magnitude bits 4, 2 and 1, in bits, 0 to 1 each."""
    magnitude = np.abs(codes)
    bits = [codes < 0] + [(magnitude >> i) & 1 for i in reversed(range(_BITS - 1))]
    return tuple(entropy(np.bincount(np.ravel(bit).astype(int), minlength=2)) for bit in bits)


def findings(layers: list[LayerAnalysis]) -> list[tuple[str, bool, str]]:
    """Return claims of the paper, whether they held on these layers, and the figures."""
    return [*_theorem(layers), *_codes_and_errors(layers), _growth(layers)]


def _theorem(layers: list[LayerAnalysis]) -> list[tuple[str, bool, str]]:
    count = len(layers)
    dense = [x for x in layers if x.large < 0.5]
    better = [x for x in layers if x.mean_error["quartz"] < x.mean_error["int4"]]
    both = sum(x.large < 0.5 for x in better)
    truncated = sum(x.mean_error["quartz-truncate"] <= x.bound for x in layers)
    rounded = sum(x.mean_error["quartz"] <= x.bound for x in layers)
    shared, erased = (float(np.mean([getattr(x, n) for x in layers])) for n in ("shared", "erased"))
    return [
        (
            "Most 8-bit values are small: P(|m| >= 8) < 0.5",
            len(dense) == count,
            f"in {len(dense)} of {count} layers",
        ),
        (
            "Where that condition holds, QuaRTZ errs less than INT4 with the same scale",
            both == len(dense),
            f"in {both} of the {len(dense)} layers where it holds; in {len(better)} of all {count}",
        ),
        (
            "The mean error stays below 16 P(|m| >= 8)",
            truncated == count and rounded == count,
            f"in {truncated} of {count} layers truncated, {rounded} of {count} rounded to nearest",
        ),
        (
            "Values below 8 are kept exactly (what the bound counts on)",
            erased == 0,
            f"{100 * shared:.0f} % of them share a group with a larger one, and {100 * erased:.0f} "
            "% come back as zero: the blind spot",
        ),
    ]


def _codes_and_errors(layers: list[LayerAnalysis]) -> list[tuple[str, bool, str]]:
    count = len(layers)
    richer = sum(x.code_entropy["quartz"] > x.code_entropy["int4"] for x in layers)
    near = sum(x.near_zero["quartz"] < x.near_zero["int4"] for x in layers)
    far = sum(x.outliers["quartz"] <= x.outliers["int4"] for x in layers)
    claims = {
        "QuaRTZ's codes carry more information than INT4's": (richer, "entropy is higher in"),
        "Rounding error near zero is smaller than INT4's": (near, "in"),
        "Rounding error of outliers is no larger than INT4's": (far, "in"),
    }
    return [
        (claim, held == count, f"{words} {held} of {count} layers")
        for claim, (held, words) in claims.items()
    ]


def _growth(layers: list[LayerAnalysis]) -> tuple[str, bool, str]:
    sizes = np.mean([x.by_group_size for x in layers], axis=0)
    fit = np.corrcoef(GROUP_SIZES, sizes)[0, 1] ** 2
    log_fit = np.corrcoef(np.log2(GROUP_SIZES), sizes)[0, 1] ** 2
    return (
        "Error grows linearly with the group size",
        bool(fit > 0.95),
        f"mean relative squared error {', '.join(f'{x:.5f}' for x in sizes)} for groups of "
        f"{', '.join(map(str, GROUP_SIZES))}: R2 {fit:.3f} on the size, {log_fit:.3f} on its "
        "logarithm (the paper says so of FID; evaluate measures images: quartz-g8 to -g128)",
    )


def _codes(name: str, x: jnp.ndarray) -> np.ndarray:
    """Return the signed 4-bit codes, int [samples, k]."""
    if name == "int4":
        scale = np.max(np.abs(x), axis=1, keepdims=True) / 7
        return np.clip(np.round(np.asarray(x) / scale), -7, 7).astype(int)
    format_ = FORMATS[name]
    codes = np.asarray(format_.encode(*cut(x, format_)))
    return codes.reshape(len(x), -1)[:, : x.shape[1]]


def _counts(codes: np.ndarray) -> np.ndarray:
    return np.bincount(codes.ravel() + 8, minlength=16)


def _shift_shares(peaks: np.ndarray) -> tuple[float, ...]:
    shifts = np.maximum(np.floor(np.log2(np.maximum(peaks, 1))).astype(int) - 2, 0)
    return tuple((np.bincount(shifts.ravel(), minlength=5) / shifts.size).tolist())


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def _share(hits: np.ndarray, among: np.ndarray) -> float:
    return float(np.mean(hits[among])) if among.any() else 0.0


def _relative_square(x: jnp.ndarray, size: int) -> float:
    return float(jnp.sum((Quartz(group_size=size)(x) - x) ** 2) / jnp.sum(x**2))
