"""FLUX.1: the transformer of dev and schnell."""

from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.flux.params import TRANSFORMER

__all__ = [
    "TRANSFORMER",
    "FluxConfig",
    "FluxTransformer",
]
