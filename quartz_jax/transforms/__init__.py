"""What changes a layer before it is rounded, one method a file; see `base`."""

from quartz_jax.transforms.base import (
    BlockRotation,
    Layer,
    Offset,
    Op,
    Permute,
    Product,
    Scale,
    Seen,
    TakeOut,
    Transform,
    TurnedRows,
    Wide,
    run_ops,
)
from quartz_jax.transforms.low_rank import LowRank
from quartz_jax.transforms.permute import Sort
from quartz_jax.transforms.residual import ResidualChannels
from quartz_jax.transforms.rotate import Folded, Rotate, Turned
from quartz_jax.transforms.shift import Shift
from quartz_jax.transforms.smooth import ReverseSmooth, Smooth

__all__ = [
    "BlockRotation",
    "Folded",
    "Layer",
    "LowRank",
    "Offset",
    "Op",
    "Permute",
    "Product",
    "ResidualChannels",
    "ReverseSmooth",
    "Rotate",
    "Scale",
    "Seen",
    "Shift",
    "Smooth",
    "Sort",
    "TakeOut",
    "Transform",
    "Turned",
    "TurnedRows",
    "Wide",
    "run_ops",
]
