"""Similarity of images and its uncertainty, for comparing a quantized model with its original."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from skimage.metrics import structural_similarity

PSNR_OF_EQUAL = 100.0  # dB; stands for infinity, so that means and JSON stay finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float  # of the sample
    low: float  # lower end
    high: float  # upper end


def psnr(
    images: np.ndarray,  # [batch, height, width, 3], floats in 0..1
    reference: np.ndarray,  # the same shape
) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each image in dB, float64 `[batch]`.

    `-10 log10(mean squared error)`, at most `PSNR_OF_EQUAL`. Raises ValueError if shapes differ.
    """
    images, reference = _pair(images, reference)
    error = np.mean((images - reference) ** 2, axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(error, 10 ** (-PSNR_OF_EQUAL / 10)))


def ssim(
    images: np.ndarray,  # [batch, height, width, 3], floats in 0..1
    reference: np.ndarray,  # the same shape
) -> np.ndarray:
    """Return the structural similarity of each image, float64 `[batch]`, at most 1.

    Wang et al. 2004 with their Gaussian window (sigma 1.5, population covariance), averaged over
    the colour channels, from scikit-image. Raises ValueError if shapes differ.
    """
    options = {"channel_axis": -1, "data_range": 1.0, "gaussian_weights": True}
    pairs = zip(*_pair(images, reference), strict=True)
    return np.array(
        [structural_similarity(a, b, use_sample_covariance=False, **options) for a, b in pairs]
    )


def bootstrap_interval(
    values: np.ndarray | Sequence[float],  # [n], one figure an image
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean of a sample with its percentile bootstrap interval (Efron 1979).

    The seed is fixed, so the same values always give the same interval.
    Raises ValueError for an empty sample.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values has shape {values.shape}; give one figure an image, at least one")
    picks = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    means = values[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def kernel_distance(
    features: np.ndarray,  # [n, d] of generated images
    real: np.ndarray,  # [m, d] of real ones
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the kernel inception distance times 1000 with its bootstrap interval.

    The unbiased squared maximum mean discrepancy under (x y / d + 1)**3 (Binkowski et al.,
    arXiv 1801.01401). In a resample, pairs of one image with itself stay out, as in the estimate.
    Raises ValueError unless both hold at least two rows of one length.
    """
    x, y = np.asarray(features, np.float64), np.asarray(real, np.float64)
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"features {x.shape} and real {y.shape} must be two or more rows of one d")

    def kernel(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3

    def within(k, counts):  # [r, n]: mean over pairs of different images
        pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
        total = np.einsum("ri,ri->r", counts @ (k - np.diag(np.diag(k))), counts)
        return np.where(pairs > 0, total / np.maximum(pairs, 1), np.nan)

    def draw(n):  # the sample itself first
        counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
        return np.concatenate([np.ones((1, n)), counts])

    generator = np.random.default_rng(seed)
    a, b = draw(len(x)), draw(len(y))
    between = np.einsum("ri,ri->r", a @ kernel(x, y), b) / (len(x) * len(y))
    values = 1000 * (within(kernel(x, x), a) + within(kernel(y, y), b) - 2 * between)
    drawn = values[1:][np.isfinite(values[1:])]  # of two images, a resample may hold but one
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(values[0]), low=float(low), high=float(high))


def _pair(images: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, reference = np.asarray(images, np.float64), np.asarray(reference, np.float64)
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"images {images.shape} and reference {reference.shape} must have one shape, "
            "[batch, height, width, 3]"
        )
    return images, reference
