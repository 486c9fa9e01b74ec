"""Diffusion models, their encoders and samplers in plain Flax NNX."""

from models.checkpoint_io import CheckpointError, StoredModule
from models.loading import (
    ModelFiles,
    build_component,
    component_config,
    export_component,
    find_model,
    load_component,
    load_pipeline,
    model_name,
    open_component,
)
from models.sampler import FluxPipeline, GenerationDefaults

__all__ = [
    "CheckpointError",
    "FluxPipeline",
    "GenerationDefaults",
    "ModelFiles",
    "StoredModule",
    "build_component",
    "component_config",
    "export_component",
    "find_model",
    "load_component",
    "load_pipeline",
    "model_name",
    "open_component",
]
