"""Where models and quartz_jax meet: a pipeline whose transformer follows a recipe."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from models import build_component, load_pipeline
from models.pipeline import FluxPipeline
from quartz_jax import checkpoint, quantize_model
from quartz_jax.recipe import Recipe
from quartz_jax.report import Report

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny_flux"


def compute_dtype() -> jnp.dtype:
    """Return bfloat16, but float32 on CPUs, where bfloat16 matmuls are slow."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def apply_recipe(pipeline: FluxPipeline, recipe: Recipe) -> tuple[FluxPipeline, Report]:
    """Return a copy of a 16-bit pipeline with a quantized transformer, and the report."""
    transformer, report = quantize_model(pipeline.transformer, recipe, progress=bool(recipe.rules))
    return dataclasses.replace(pipeline, transformer=transformer), report


def open_checkpoint(folder: Path) -> tuple[FluxPipeline, Report]:
    """Load the pipeline of a quantized checkpoint, and the report that was saved with it."""
    dtype = compute_dtype()
    build = functools.partial(build_component, dtype=dtype)
    manifest = checkpoint.read_manifest(folder)
    given = {name: checkpoint.load(folder, build, name)[0] for name in manifest.components}
    return load_pipeline(folder, dtype=dtype, **given), manifest.report
