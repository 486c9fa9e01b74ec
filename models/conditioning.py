"""From time and other conditions to what modulates the blocks of a transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.linear import EPSILON, modulation

_THETA = 10000.0  # base of the frequencies
TIME_CHANNELS = 256  # of the sinusoidal embedding of timestep and guidance


def sinusoidal_embedding(
    position: jax.Array,  # float32 [b]
    channels: int = TIME_CHANNELS,
    *,
    last: int = 0,  # 1 where the last frequency is 1 / 10000 itself, and not just above it
) -> jax.Array:
    """Return float32 [b, channels]: cosines, then sines, of falling frequencies."""
    half = channels // 2
    frequency = jnp.asarray(_THETA ** (-np.arange(half) / (half - last)), jnp.float32)
    angle = position.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Embedder(nnx.Module):
    """Two linears that bring one condition (time, guidance, pooled text) to a width."""

    def __init__(self, inputs: int, hidden: int, outputs: int | None = None, *, linear):
        self.in_layer = linear(inputs, hidden, role="embed")
        self.out_layer = linear(hidden, outputs or hidden, role="embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, inputs] to [b, outputs], or [b, hidden] where none is said."""
        return self.out_layer(nnx.silu(self.in_layer(x)))


class Modulation(nnx.Module):
    """Shifts, scales and gates from the condition vector; zero at initialisation."""

    def __init__(self, hidden: int, parts: int, *, linear):
        self.parts = parts
        zeros = nnx.initializers.zeros
        self.lin = linear(hidden, parts * hidden, kernel_init=zeros, role="modulation")

    def __call__(self, vec: jax.Array) -> list[jax.Array]:
        """[b, c] to `parts` arrays [b, 1, c]."""
        return jnp.split(self.lin(nnx.silu(vec))[:, None], self.parts, axis=-1)


class FinalLayer(nnx.Module):
    """Modulated norm and the linear to output channels; both linears zero at initialisation."""

    def __init__(self, hidden: int, outputs: int, epsilon: float = EPSILON, *, linear):
        zeros = nnx.initializers.zeros
        self.epsilon = epsilon  # of the norm
        self.modulation = linear(hidden, 2 * hidden, kernel_init=zeros, role="embed")
        self.linear = linear(hidden, outputs, kernel_init=zeros, role="head")

    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        """[b, t, c] and the condition [b, c] to [b, t, outputs]."""
        shift, scale = jnp.split(self.modulation(nnx.silu(vec))[:, None], 2, axis=-1)
        return self.linear(x, norm=modulation(shift, scale, self.epsilon))
