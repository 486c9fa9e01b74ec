"""Diffusion models, their encoders and samplers in plain Flax NNX."""

from models.checkpoint_io import CheckpointError
from models.loading import load_component, load_pipeline
from models.pipeline import FluxPipeline, GenerationDefaults

__all__ = [
    "CheckpointError",
    "FluxPipeline",
    "GenerationDefaults",
    "load_component",
    "load_pipeline",
]
