"""Small layers with what they have seen, for tests of methods and of how they run."""

import jax
import jax.numpy as jnp
import numpy as np

from quartz_jax.transforms import (
    Layer,
    LowRank,
    ResidualChannels,
    Rotate,
    Seen,
    Shift,
    Smooth,
    Sort,
)

N, K = 16, 32
HIGHEST = jax.lax.Precision.HIGHEST

# One of each op.
EVERY_OP = (
    Shift(),
    Smooth(alpha=0.5),
    LowRank(rank=2, iterations=1),
    Rotate(block=16),
    Sort(),
    ResidualChannels(count=3),
)


def rows_of(seed, samples=64, k=K):
    """Correlated inputs with a few large channels, float32 [2, samples / 2, k]."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(k, k)) * np.exp(rng.normal(size=k))
    rows = rng.normal(size=(samples, k)) @ mixing / k
    return jnp.asarray(rows.reshape(2, -1, k), jnp.float32)


def weight_of(seed, n=N, k=K):
    """Weights as checkpoints hold them, float32 [n, k] of bfloat16 values."""
    weight = np.random.default_rng(seed).normal(size=(n, k))
    return jnp.asarray(weight, jnp.bfloat16).astype(jnp.float32)


def seen_of(rows):
    """All statistics of rows [calls, rows a call, k]."""
    flat = rows.reshape(-1, rows.shape[-1])
    return Seen(
        rows=rows,
        absmax=jnp.max(jnp.abs(flat), axis=0),
        mean=jnp.mean(flat, axis=0),
        gram=jnp.matmul(flat.T, flat, precision=HIGHEST) / len(flat),
    )


def layer_of(seed, n=N, k=K):
    """A layer with a bias and with all statistics."""
    bias = jnp.arange(n, dtype=jnp.float32)
    seen = seen_of(rows_of(seed + 1, k=k))
    return Layer(weight=weight_of(seed, n, k), bias=bias, seen=seen)
