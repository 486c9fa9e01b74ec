"""Moving magnitude between inputs and weights, channel by channel."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from quartz_jax.schema import part
from quartz_jax.transforms.base import Layer, Need, Scale, Transform

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe

_SMALL = 1e-5  # channel maxima below this count as this
_EXPONENTS = tuple(i / 20 for i in range(1, 21))


class _Smoothing(Transform):
    """Divides channels by a factor whose exponent is fixed, or chosen by the layer's error."""

    @property
    def exponent(self) -> float | None:
        """The exponent, None to choose one of 20 between 0.05 and 1."""
        raise NotImplementedError

    def factor(self, layer: Layer, exponent: jax.Array | float) -> jax.Array:
        """Return what channels are divided by, float32 [k]."""
        raise NotImplementedError

    @property
    def needs(self) -> frozenset[Need]:
        """Channel maxima, and rows to choose the exponent with."""
        return frozenset({"absmax"} if self.exponent is not None else {"absmax", "rows"})

    def fit(self, layer: Layer, rest: "LayerRecipe") -> Layer:
        """Return the layer behind a `Scale`; among exponents the one of least error."""

        def candidate(exponent: jax.Array | float) -> Layer:
            factor = self.factor(layer, exponent)
            return layer.then(Scale(factor=1 / factor), layer.weight * factor)

        if self.exponent is not None:
            return candidate(self.exponent)
        return candidate(_least_error(lambda e: rest.error(candidate(e))))


@part("smooth")
class Smooth(_Smoothing):
    """Divides channels by max|X|**alpha / max|W|**(1 - alpha) (SmoothQuant, arXiv 2211.10438).

    Without an alpha, the one of 20 between 0.05 and 1 with the least output error of the
    quantized layer is taken, what follows included (SVDQuant does so with its branch).
    """

    alpha: float | None = None

    def __post_init__(self):
        _check_exponent("alpha", self.alpha)

    @property
    def exponent(self) -> float | None:
        """Alpha."""
        return self.alpha

    def factor(self, layer: Layer, exponent: jax.Array | float) -> jax.Array:
        """Return max|X|**alpha / max|W|**(1 - alpha)."""
        assert layer.seen.absmax is not None
        return _largest(layer.seen.absmax) ** exponent / _of_weight(layer) ** (1 - exponent)


@part("reverse")
class ReverseSmooth(_Smoothing):
    """Makes weights even at the expense of the activations: divides by max|W|**-beta.

    The authors of QuaRTZ name reverse smoothing without a formula; this is our reading of it.
    The 8-bit first stage bears uneven activations, so the difficulty moves from the weights to
    them, against SmoothQuant's direction. Without a beta, as `Smooth`.
    """

    beta: float | None = None

    def __post_init__(self):
        _check_exponent("beta", self.beta)

    @property
    def exponent(self) -> float | None:
        """Beta."""
        return self.beta

    def factor(self, layer: Layer, exponent: jax.Array | float) -> jax.Array:
        """Return max|W|**-beta."""
        return _of_weight(layer) ** -exponent


def _largest(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, _SMALL)


def _of_weight(layer: Layer) -> jax.Array:
    """Return the largest magnitude of each channel of the weight, [k]."""
    return _largest(jnp.max(jnp.abs(layer.weight), axis=0))


def _check_exponent(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; it must be None or lie in 0..1")


def _least_error(error: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return the exponent of least error, float32 []."""
    exponents = jnp.asarray(_EXPONENTS, jnp.float32)
    return exponents[jnp.argmin(jax.lax.map(error, exponents))]
