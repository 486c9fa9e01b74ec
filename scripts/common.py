"""Where models and quartz_jax meet: pipelines whose transformers follow recipes."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import models
from models import build_component, load_pipeline
from models.flux import FluxTransformer, add_lora, read_lora
from models.flux.lora import Adapter
from models.pipeline import FluxPipeline
from models.stages import Deferred
from quartz_jax import checkpoint, quantize_model
from quartz_jax.recipe import Recipe
from quartz_jax.report import Report

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny_flux"
_MODELS = ("text_encoder", "text_encoder_2", "vae", "transformer")


@dataclasses.dataclass
class Opened:
    """A pipeline that loads its models when they are needed."""

    pipeline: FluxPipeline
    report: Report | None  # of the transformer; None until it has been quantized


def compute_dtype() -> jnp.dtype:
    """Return bfloat16, but float32 on CPUs, where bfloat16 matmuls are slow."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def apply_recipe(pipeline: FluxPipeline, recipe: Recipe) -> tuple[FluxPipeline, Report]:
    """Return a copy of a 16-bit pipeline with a quantized transformer, and the report."""
    transformer, report = quantize_model(pipeline.transformer, recipe, progress=bool(recipe.rules))
    return dataclasses.replace(pipeline, transformer=transformer), report


def open_checkpoint(folder: Path, loras: Sequence[tuple[Path, float]] = ()) -> Opened:
    """Open a quantized checkpoint, and the report that was saved with it.

    Args:
      folder: the checkpoint.
      loras: files and scales of adapters.
    """
    manifest = checkpoint.read_manifest(folder)
    build = functools.partial(build_component, dtype=compute_dtype())
    deferred = {
        name: Deferred(
            config=models.component_config(component.config),
            load=lambda name=name: checkpoint.load(folder, build, name)[0],
        )
        for name, component in manifest.components.items()
    }
    return _open(folder, None, deferred, loras, Opened(None, manifest.report))


def open_16_bit(
    model: Path,
    recipe: Recipe,
    *,
    text_encoders: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
) -> Opened:
    """Open a 16-bit model whose transformer is quantized when it is loaded.

    Args:
      model: a diffusers folder or a file in Black Forest Labs' naming.
      recipe: for the transformer.
      text_encoders: gives what `model` lacks.
      loras: files and scales of adapters.
    """
    opened = Opened(None, None)
    path = models.find_model(model, text_encoders).paths["transformer"]
    stored = models.open_component(path, compute_dtype())

    def load() -> FluxTransformer:
        original = stored.load(compute_dtype())
        transformer, opened.report = quantize_model(original, recipe, progress=bool(recipe.rules))
        return transformer

    deferred = {"transformer": Deferred(config=models.component_config(stored.config), load=load)}
    return _open(model, text_encoders, deferred, loras, opened)


def _open(
    model: Path,
    text_encoders: Path | None,
    deferred: dict[str, Deferred],
    loras: Sequence[tuple[Path, float]],
    opened: Opened,
) -> Opened:
    """Fill in the pipeline: every other model is 16-bit, all tensors and adapters are checked."""
    dtype = compute_dtype()
    config = deferred["transformer"].config
    adapters = [read_lora(path, config) for path, _ in loras]
    load = deferred["transformer"].load
    scales = [scale for _, scale in loras]
    deferred["transformer"] = Deferred(
        config=config, load=lambda: prepare_transformer(load(), adapters, scales)
    )
    paths = models.find_model(model, text_encoders).paths
    for name in (name for name in _MODELS if name not in deferred and paths[name].exists()):
        stored = models.open_component(paths[name], dtype)
        deferred[name] = Deferred(
            config=models.component_config(stored.config),
            load=functools.partial(stored.load, dtype),
        )
    opened.pipeline = load_pipeline(model, dtype, text_encoders=text_encoders, **deferred)
    return opened


def prepare_transformer(
    transformer: FluxTransformer, adapters: Sequence[Adapter], scales: Sequence[float]
) -> FluxTransformer:
    """Do what every transformer gets after loading, whatever it was loaded from."""
    return add_lora(transformer, adapters, scales, compute_dtype()) if adapters else transformer
