"""The convolution of the UNets here: what surrounds it comes as arguments, as for linears."""

import jax
from flax import nnx


class Conv(nnx.Conv):
    """A convolution over images [b, h, w, c], and what is added to its result."""

    quantizable = True  # a quantized one can take its place: it computes what is said here

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        # what it is in its model: conv (of a residual block), shortcut (beside one), resample,
        # projection (into and out of transformer blocks), embed or head
        role: str | None = None,
        **options,  # of nnx.Conv
    ):
        padding = options.pop("padding", size // 2)
        super().__init__(in_features, out_features, (size, size), padding=padding, **options)
        self.role = role

    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,  # [b, h, w, c]
        *,
        residual: jax.Array | None = None,  # [b, rows, columns, n]
    ) -> jax.Array:
        """Return residual + conv(x), [b, rows, columns, n]."""
        y = super().__call__(x)
        return y if residual is None else residual + y
