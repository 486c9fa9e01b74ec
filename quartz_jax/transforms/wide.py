"""Groups of input channels that keep eight bits where the others have four, in one int8 dot."""

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from quartz_jax.formats import Format, Int, Quartz
from quartz_jax.transforms.base import Layer, Wide


def widen(
    layer: Layer,  # that has seen the largest magnitudes of its inputs
    share: float,  # of the groups, above 0
    group_size: int,
) -> Layer:
    """Return the layer behind the mark of the groups whose four bits would cost most.

    The step of a group grows with its largest magnitude, and so does the error of each channel,
    which the weights of that channel multiply: what is compared is the square of the one times
    the squared norm of the others.
    """
    assert layer.seen.absmax is not None
    by_group = (
        codec.pad(statistic[None], group_size).reshape(-1, group_size)
        for statistic in (layer.seen.absmax, jnp.sum(layer.weight**2, axis=0))
    )
    largest, weights = by_group
    cost = jnp.max(largest, axis=1) ** 2 * jnp.sum(weights, axis=1)
    count = max(round(share * len(cost)), 1)
    chosen = jnp.argsort(-cost, stable=True)[:count]
    groups = jnp.zeros(len(cost), bool).at[chosen].set(True)
    return layer.then(Wide(groups=groups), layer.weight)


def rounded_input(
    x: jax.Array,  # [..., k]
    format: Format | None,
    wide: jax.Array | None,  # bool [groups], of a QuaRTZ format
) -> jax.Array:
    """Return an input as it is after rounding to a format, [..., k]: wide groups to eight bits."""
    if format is None:
        return x
    if wide is None:
        return format(x)
    assert isinstance(format, Quartz)
    mask = jnp.repeat(wide, format.group_size)[: x.shape[-1]]
    return jnp.where(mask, Int(width=8, range=format.range)(x), format(x))
