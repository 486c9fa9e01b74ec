"""Changes of a linear that leave its exact output alone and make it easier to quantize.

Each transform fits itself to a layer's weights and recorded inputs and returns a step, which is
applied to the input at run time, and the layer as it is behind that step.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quartz_jax.schema import part

if TYPE_CHECKING:
    from quartz_jax.methods.recipe import LayerMethod

_HIGHEST = jax.lax.Precision.HIGHEST
_SMALL = 1e-5  # channel maxima below this count as this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear on its way through the transforms: y = x weight^T + up(down(x)) + bias."""

    weight: jax.Array  # float32 [n, k], to be quantized
    bias: jax.Array | None  # float32 [n]
    rows: jax.Array | None  # float32 [calls, rows a call, k] as they reach the weight, or None
    absmax: jax.Array | None  # float32 [k], of all inputs
    down: jax.Array | None = None  # float32 [k, rank]: 16-bit branch, in bfloat16 values
    up: jax.Array | None = None  # float32 [rank, n]

    @property
    def flat(self) -> jax.Array | None:
        """The rows as [samples, k]."""
        return None if self.rows is None else self.rows.reshape(-1, self.rows.shape[-1])

    def need_rows(self, what: str) -> None:
        """Raise ValueError unless inputs were recorded."""
        if self.rows is None:
            raise ValueError(f"{what} needs recorded inputs; calibrate first")


class Divide(nnx.Module):
    """Divides channels by fixed factors."""

    def __init__(self, factor: jax.Array):  # float32 [k]
        self.factor = nnx.Variable(factor)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., k] to [..., k]."""
        return x / self.factor.get_value()


class Add(nnx.Module):
    """Adds one number."""

    def __init__(self, amount: float):
        self.amount = amount

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., k] to [..., k]."""
        return x + self.amount


class BlockHadamard(nnx.Module):
    """Rotates blocks of channels by one orthogonal matrix."""

    def __init__(self, size: int, regular: bool):
        self.size = size
        self.regular = regular

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., k] to [..., k]."""
        blocks = x.reshape(*x.shape[:-1], -1, self.size)
        matrix = jnp.asarray(hadamard(self.size, self.regular), x.dtype)
        return jnp.matmul(blocks, matrix, precision=_HIGHEST).reshape(x.shape)


@part
class Shift:
    """Adds a constant to the input and takes it back in the bias.

    Behind GELU, whose least value is above -0.171875, it makes inputs non-negative, so that
    unsigned codes fit them (SVDQuant, arXiv 2411.05007, and its released code).
    """

    amount: float = 0.171875

    def fit(self, layer: Layer, method: "LayerMethod") -> tuple[nnx.Module, Layer]:
        """Return the step and the layer behind it."""
        delta = -self.amount * layer.weight.sum(axis=1)
        bias = delta if layer.bias is None else layer.bias + delta
        rows = None if layer.rows is None else layer.rows + self.amount
        largest = None if layer.absmax is None else layer.absmax + self.amount
        return Add(self.amount), dataclasses.replace(layer, bias=bias, rows=rows, absmax=largest)


@part
class Smooth:
    """Divides channels by max|X|**alpha / max|W|**(1 - alpha) (SmoothQuant, arXiv 2211.10438).

    Without an alpha, the one of 20 between 0.05 and 1 with the least output error of the
    quantized layer is taken, the low-rank branch included if there is one (SVDQuant).
    """

    alpha: float | None = None

    def __post_init__(self):
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}; it must be None or lie in 0..1")

    def fit(self, layer: Layer, method: "LayerMethod") -> tuple[nnx.Module, Layer]:
        """Return the step and the layer behind it."""
        layer.need_rows("smoothing")
        exponents = np.arange(1, 21) / 20 if self.alpha is None else [self.alpha]
        return _least_error(layer, method, [(a, 1 - a) for a in exponents])


@part
class ReverseSmooth:
    """Makes weights even at the expense of the activations: divides by max|W|**-beta.

    The authors of QuaRTZ name reverse smoothing without a formula; this is our reading of it.
    The 8-bit first stage bears uneven activations, so the difficulty moves from the weights to
    them, against SmoothQuant's direction. Without a beta, as `Smooth`.
    """

    beta: float | None = None

    def __post_init__(self):
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta!r}; it must be None or lie in 0..1")

    def fit(self, layer: Layer, method: "LayerMethod") -> tuple[nnx.Module, Layer]:
        """Return the step and the layer behind it."""
        layer.need_rows("reverse smoothing")
        exponents = np.arange(1, 21) / 20 if self.beta is None else [self.beta]
        return _least_error(layer, method, [(0.0, b) for b in exponents])


@part
class Rotate:
    """Multiplies blocks of channels by a Hadamard matrix (QuaRot; regular: ConvRot, 2512.03673).

    The block is the largest power of four that divides k and isn't above `block`.
    """

    block: int = 256  # at most this many channels
    regular: bool = True  # all rows and columns have one sum, so that no channel collects means

    def __post_init__(self):
        if self.block < 4:
            raise ValueError(f"block is {self.block!r}; it must be at least 4")

    def fit(self, layer: Layer, method: "LayerMethod") -> tuple[nnx.Module, Layer]:
        """Return the step and the layer behind it."""
        k = layer.weight.shape[1]
        powers = [4**i for i in range(1, 8) if 4**i <= self.block and k % 4**i == 0]
        if not powers:
            raise ValueError(f"rotation needs a multiple of 4 channels; the layer has {k}")
        step = BlockHadamard(powers[-1], self.regular)
        rows = None if layer.rows is None else step(layer.rows)
        largest = None if rows is None else jnp.max(jnp.abs(rows), axis=(0, 1))
        weight = step(layer.weight)
        return step, dataclasses.replace(layer, weight=weight, rows=rows, absmax=largest)


@part
class LowRank:
    """SVDQuant's 16-bit branch: the largest singular directions of the weights, kept apart.

    W = L1 L2 + R; the branch starts as the SVD of W and is found again for W - Q(R) as long as
    the output error falls (arXiv 2411.05007 and its released code).
    """

    rank: int = 32
    iterations: int = 100  # at most; 1 is the plain SVD

    def __post_init__(self):
        if self.rank < 1 or self.iterations < 1:
            raise ValueError(
                f"rank is {self.rank} and iterations {self.iterations}; both must be at least 1"
            )

    def fit(self, layer: Layer, method: "LayerMethod") -> tuple[None, Layer]:
        """Return no step, and the layer with a branch."""
        if self.iterations > 1:
            layer.need_rows("the low-rank branch")
        best, least, target = None, math.inf, layer.weight
        for _ in range(self.iterations):
            down, up = _truncated_svd(target, self.rank)
            residual = layer.weight - jnp.matmul(down, up, precision=_HIGHEST).T
            candidate = dataclasses.replace(layer, weight=residual, down=down, up=up)
            if self.iterations == 1:
                return None, candidate
            error = output_error(candidate, method)
            if error >= least:
                break
            best, least, target = candidate, error, layer.weight - method.weight(residual)
        return None, best


def output_error(layer: Layer, method: "LayerMethod") -> float:
    """Return the squared error of the quantized layer's output on its recorded inputs."""
    return float(_output_error(layer.rows, layer.weight, method.weight, method.activation))


def hadamard(size: int, regular: bool) -> np.ndarray:
    """Return an orthogonal matrix with entries +-1 / sqrt(size), size a power of four."""
    four = np.ones((4, 4)) - 2 * np.eye(4)[::-1]  # one -1 a row: every row sums to 2
    two = np.array([[1, 1], [1, -1]])
    seed = four if regular else np.kron(two, two)
    matrix = functools.reduce(np.kron, [seed] * round(math.log(size, 4)))
    return (matrix / math.sqrt(size)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _output_error(rows, weight, weight_format, activation_format) -> jax.Array:
    """What the 16-bit branch adds is exact, so that only the quantized product counts."""
    stored = weight_format(weight)
    given = rows if activation_format is None else activation_format(rows)
    # x w - x' w' = (x - x') w + x' (w - w'): products of small differences
    error = jnp.matmul(rows - given, weight.T, precision=_HIGHEST)
    return jnp.sum((error + jnp.matmul(given, (weight - stored).T, precision=_HIGHEST)) ** 2)


def _least_error(layer: Layer, method: "LayerMethod", exponents) -> tuple[nnx.Module, Layer]:
    """Smooth by max|X|**a / max|W|**b for the pair (a, b) with the least output error."""
    best = exponents[0]
    if len(exponents) > 1:
        branch = next((t for t in method.transforms if isinstance(t, LowRank)), None)
        rank = None if branch is None else branch.rank
        arrays = (layer.weight, layer.rows, layer.absmax, jnp.asarray(exponents, jnp.float32))
        errors = _smoothing_errors(*arrays, method.weight, method.activation, rank)
        best = exponents[int(jnp.argmin(errors))]
    factor = _smoothing_factor(layer.weight, layer.absmax, *best)
    smoothed = dataclasses.replace(
        layer,
        weight=layer.weight * factor,
        rows=layer.rows / factor,
        absmax=layer.absmax / factor,
    )
    return Divide(factor), smoothed


def _smoothing_factor(weight, absmax, a, b) -> jax.Array:
    """Return max|X|**a / max|W|**b of each channel, float32 [k]."""
    w_largest = jnp.maximum(jnp.max(jnp.abs(weight), axis=0), _SMALL)
    return jnp.maximum(absmax, _SMALL) ** a / w_largest**b


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _smoothing_errors(weight, rows, absmax, exponents, weight_format, activation_format, rank):
    """Output error of the quantized layer for each pair of exponents [m, 2], float32 [m]."""

    def error(pair):
        factor = _smoothing_factor(weight, absmax, *pair)
        smoothed = weight * factor
        if rank is not None:
            down, up = _truncated_svd(smoothed, rank)
            smoothed = smoothed - jnp.matmul(down, up, precision=_HIGHEST).T
        return _output_error(rows / factor, smoothed, weight_format, activation_format)

    return jax.lax.map(error, exponents)


@functools.partial(jax.jit, static_argnums=1)
def _truncated_svd(
    weight: jax.Array,  # float32 [n, k]
    rank: int,
) -> tuple[jax.Array, jax.Array]:
    """Return down [k, rank] and up [rank, n], in bfloat16 values, with (down up)^T near weight.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix, and the
    weight projected on the first of them is the truncated SVD; far faster than a whole SVD.
    """
    n, k = weight.shape
    side = weight if n <= k else weight.T  # [short, long]
    _, vectors = jnp.linalg.eigh(jnp.matmul(side, side.T, precision=_HIGHEST))
    basis = vectors[:, -rank:]  # eigenvalues rise; [short, rank]
    projected = jnp.matmul(side.T, basis, precision=_HIGHEST)  # [long, rank]
    down, up = (projected, basis.T) if n <= k else (basis, projected.T)
    return tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (down, up))
