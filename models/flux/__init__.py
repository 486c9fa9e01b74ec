"""FLUX.1: the transformer of dev and schnell."""

from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.flux.params import load_flux_transformer

__all__ = ["FluxConfig", "FluxTransformer", "load_flux_transformer"]
