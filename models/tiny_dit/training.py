"""The loss that trains a DiT: noise, and where a step's variance lies between its two bounds.

x_t = alpha_t x_0 + sigma_t noise. The hybrid loss of Nichol and Dhariwal (arXiv 2102.09672,
equation 16), as DiT has it: the error of the noise, and the step's part of the variational bound,
which reaches the variance alone. Beyond DiT, timesteps are drawn where there is most to learn and
weighted as flow matching weights them (Esser et al., arXiv 2403.03206, section 3.1).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.noise_schedulers import NoiseScheduler
from models.training import LossFunction, draw

_LARGEST_WEIGHT = 16.0  # of the noise's error, over that of timesteps without noise
_UNIFORM_SHARE = 0.1  # of the timesteps, so that none is left out
_SPREAD = 2.0  # deviation of log(alpha**2 / sigma**2): that of logit-normal times


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseTable:
    """What the loss needs of each timestep, float32 [timesteps]."""

    alpha: np.ndarray
    sigma: np.ndarray
    weight: np.ndarray  # of the noise's error; 1 in the mean over drawn timesteps
    chance: np.ndarray  # of all timesteps up to this, this one included
    log_beta: np.ndarray  # upper bound of a step's log variance
    log_posterior: np.ndarray  # lower bound: that of q(x_{t-1} | x_t, x_0)
    slope: np.ndarray  # of a step's mean in the noise


def noise_table(scheduler: NoiseScheduler) -> NoiseTable:
    """Return what the loss needs of a scheduler (arXiv 2006.11239, equations 4 to 7)."""
    signal = scheduler.alphas()
    before = np.append(1.0, signal[:-1])
    beta, noise = 1 - signal / before, 1 - signal
    posterior = beta * (1 - before) / noise
    posterior[0] = posterior[1]  # 0 otherwise, which has no logarithm
    weight = np.minimum((1 + np.sqrt(noise / signal)) ** 2, _LARGEST_WEIGHT)
    chance = _chances(np.log(signal / noise))
    table = {
        "alpha": np.sqrt(signal),
        "sigma": np.sqrt(noise),
        "weight": weight / (weight @ chance),
        "chance": np.cumsum(chance),
        "log_beta": np.log(beta),
        "log_posterior": np.log(posterior),
        "slope": beta / np.sqrt(noise * (1 - beta)),
    }
    return NoiseTable(**{name: x.astype(np.float32) for name, x in table.items()})


def _chances(ratio: np.ndarray) -> np.ndarray:
    """Return how often timesteps of falling log signal-to-noise ratios are drawn; sums to 1."""
    density = np.exp(-0.5 * (ratio / _SPREAD) ** 2) * -np.gradient(ratio)
    return _UNIFORM_SHARE / len(ratio) + (1 - _UNIFORM_SHARE) * density / density.sum()


def variance_bits(
    table: NoiseTable,
    time: jax.Array,  # int [b]
    error: jax.Array,  # [b, c, h, w]: predicted minus true noise
    share: jax.Array,  # [b, c, h, w]: predicted; -1 for the lower bound, 1 for the upper one
) -> jax.Array:
    """Return KL(q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t)) in bits, [b, c, h, w].

    Both are normal; log variances between the bounds are linear (arXiv 2102.09672, equation 15).
    The first timestep's term, which has bins of pixels in it, is left out: 0.
    """

    def at(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values)[time][:, None, None, None]

    low, high = at(table.log_posterior), at(table.log_beta)
    predicted = low + (share + 1) / 2 * (high - low)
    shift = at(table.slope) * error
    kl = predicted - low + jnp.exp(low - predicted) - 1 + shift**2 * jnp.exp(-predicted)
    return jnp.where(time[:, None, None, None] == 0, 0, kl / (2 * math.log(2)))


def hybrid_loss(
    graphdef: nnx.GraphDef, table: NoiseTable, batch_size: int, class_dropout: float
) -> LossFunction:
    """Return the loss over data of `latents` [n, c, h, w] and `labels` int [n].

    Args:
      graphdef: of a `DiT` that predicts noise and variance.
      table: of its noise.
      batch_size: examples a step.
      class_dropout: share of the labels that become that of no class, for guidance.
    """

    def loss(params, frozen, data, key):
        model: Any = nnx.merge(graphdef, params)
        keys = jax.random.split(key, 4)
        batch = draw(keys[0], data, batch_size)
        time = jnp.searchsorted(table.chance, jax.random.uniform(keys[1], (batch_size,)))
        time = jnp.minimum(time, len(table.chance) - 1)
        drop = jax.random.uniform(keys[2], (batch_size,)) < class_dropout
        labels = jnp.where(drop, model.config.num_embeds_ada_norm, batch["labels"])
        clean = batch["latents"].astype(jnp.float32)
        noise = jax.random.normal(keys[3], clean.shape)
        alpha, sigma, weight = (
            jnp.asarray(x)[time][:, None, None, None]
            for x in (table.alpha, table.sigma, table.weight)
        )
        predicted = model(alpha * clean + sigma * noise, time, labels).astype(jnp.float32)
        predicted, share = jnp.split(predicted, 2, axis=1)
        error = predicted - noise
        bits = variance_bits(table, time, jax.lax.stop_gradient(error), share)
        return (weight * error**2).mean() + bits.mean()

    return loss
