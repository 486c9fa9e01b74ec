"""The feed-forward part of transformer blocks, plain or gated."""

import jax
from flax import nnx

from models.linear import Norm, Part, swiglu


class MLP(nnx.Module):
    """Two linears with GELU between them, its tanh form; gated, SiLU of one half times the other.

    Of a gated one the first half of what `up` gives goes through SiLU.
    """

    def __init__(self, hidden: int, inner: int, *, gated: bool = False, linear):
        self.gated = gated
        self.up = linear(hidden, 2 * inner if gated else inner, role="mlp_in")
        self.down = linear(inner, hidden, role="mlp_out")

    def __call__(
        self,
        x: jax.Array,  # [b, t, c]
        norm: Norm,  # of [c] or [b, 1, c]
        gate: jax.Array | None = None,  # [b, 1, c]
        residual: jax.Array | None = None,  # [b, t, c]
    ) -> jax.Array:
        """Return residual + gate * mlp(norm(x)), [b, t, c]."""
        wide = self.up(x, norm=norm)
        gelu = Part(array=wide, size=wide.shape[-1], activation="gelu")
        return self.down((swiglu(wide) if self.gated else gelu,), gate=gate, residual=residual)
