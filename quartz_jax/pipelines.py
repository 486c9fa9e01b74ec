"""Where models and quartz_jax meet: pipelines whose transformers follow recipes."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import models
from models import build_component, load_pipeline
from models.flux import FluxTransformer, add_lora, read_lora
from models.pipeline import FluxPipeline
from models.stages import Deferred
from quartz_jax import place, quantize_model
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.report import Report
from quartz_jax.recipes.recipe import Recipe

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny_flux"
_MODELS = ("text_encoder", "text_encoder_2", "vae", "transformer")


@dataclasses.dataclass
class Opened:
    """A pipeline that loads its models when they are needed."""

    pipeline: FluxPipeline
    report: Report | None  # of the transformer; None until it has been quantized


def compile_quickly() -> None:
    """Keep XLA on GPUs from searching tilings for matmuls of its own, which is most of compiling.

    For programs that run briefly. Call it before JAX is first used; XLA_FLAGS may say otherwise.
    """
    flag, flags = "--xla_gpu_enable_triton_gemm", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


def compute_dtype() -> jnp.dtype:
    """Return bfloat16, but float32 on CPUs, where bfloat16 matmuls are slow."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def apply_recipe(pipeline: FluxPipeline, recipe: Recipe) -> tuple[FluxPipeline, Report]:
    """Return a copy of a 16-bit pipeline with a quantized transformer, and the report."""
    transformer, report = quantize_model(pipeline.transformer, recipe, progress=bool(recipe.rules))
    return dataclasses.replace(pipeline, transformer=transformer), report


def open_checkpoint(
    folder: Path, *, loras: Sequence[tuple[Path, float]] = (), expand: bool = False
) -> Opened:
    """Open a quantized checkpoint, and the report that was saved with it.

    Args:
      folder: the checkpoint.
      loras: files and scales of adapters.
      expand: keep 4-bit weights decoded to int8 on the device.
    """
    components = checkpoint.read_manifest(folder).components
    build = functools.partial(build_component, dtype=compute_dtype())
    quantized = {
        name: Deferred(
            config=models.component_config(component.config),
            load=lambda name=name: checkpoint.load(folder, build, name)[0],
        )
        for name, component in components.items()
    }
    quantized["transformer"] = _prepared(quantized["transformer"], loras, expand)
    pipeline = _open_pipeline(folder, None, quantized)
    return Opened(pipeline=pipeline, report=components["transformer"].report)


def open_16_bit(
    model: Path,
    recipe: Recipe,
    *,
    text_encoders: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    expand: bool = False,
) -> Opened:
    """Open a 16-bit model whose transformer is quantized when it is loaded.

    Args:
      model: a diffusers folder or a file in Black Forest Labs' naming.
      recipe: for the transformer.
      text_encoders: gives what `model` lacks.
      loras: files and scales of adapters.
      expand: keep 4-bit weights decoded to int8 on the device.
    """
    stored = models.find_model(model, text_encoders).open("transformer", compute_dtype())

    def load() -> FluxTransformer:
        original = stored.load(compute_dtype())
        transformer, opened.report = quantize_model(original, recipe, progress=bool(recipe.rules))
        return transformer

    transformer = Deferred(config=models.component_config(stored.config), load=load)
    given = {"transformer": _prepared(transformer, loras, expand)}
    opened = Opened(pipeline=_open_pipeline(model, text_encoders, given), report=None)
    return opened


def _prepared(transformer: Deferred, loras: Sequence[tuple[Path, float]], expand: bool) -> Deferred:
    """Read and check adapters; return a transformer that loads with them, ready for the device."""
    adapters = [read_lora(path, transformer.config) for path, _ in loras]
    scales = [scale for _, scale in loras]

    def load() -> FluxTransformer:
        loaded = transformer.load()
        place(loaded, expand=expand)
        return add_lora(loaded, adapters, scales, compute_dtype()) if adapters else loaded

    return Deferred(config=transformer.config, load=load)


def _open_pipeline(
    model: Path, text_encoders: Path | None, given: dict[str, Deferred]
) -> FluxPipeline:
    """Return the pipeline; what isn't given loads in 16 bits, its tensors are checked already."""
    dtype = compute_dtype()
    files = models.find_model(model, text_encoders)
    deferred = dict(given)
    for name in (name for name in _MODELS if name not in given and files.paths[name].exists()):
        stored = files.open(name, dtype)
        config = models.component_config(stored.config)
        deferred[name] = Deferred(config=config, load=functools.partial(stored.load, dtype))
    return load_pipeline(model, dtype, text_encoders=text_encoders, **deferred)
