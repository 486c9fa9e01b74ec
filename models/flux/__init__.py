"""FLUX.1: the transformer of dev and schnell."""

from models.flux.config import FluxConfig
from models.flux.lora import add_lora, read_lora
from models.flux.modeling import FluxTransformer
from models.flux.params import export_flux_transformer, load_flux_transformer

__all__ = [
    "FluxConfig",
    "FluxTransformer",
    "add_lora",
    "export_flux_transformer",
    "load_flux_transformer",
    "read_lora",
]
