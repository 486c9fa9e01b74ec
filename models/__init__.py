"""Diffusion models, their encoders and samplers in plain Flax NNX."""

from models.checkpoint_io import CheckpointError, StoredModule
from models.family import GenerationDefaults
from models.loading import (
    ModelFiles,
    build_component,
    component_config,
    export_component,
    find_model,
    load_component,
    load_pipeline,
    model_name,
    only_size,
    open_component,
)
from models.sampler import Sampler

__all__ = [
    "CheckpointError",
    "GenerationDefaults",
    "ModelFiles",
    "Sampler",
    "StoredModule",
    "build_component",
    "component_config",
    "export_component",
    "find_model",
    "load_component",
    "load_pipeline",
    "model_name",
    "only_size",
    "open_component",
]
