"""Where models and quartz_jax meet: pipelines whose models follow recipes.

from quartz_jax.pipelines import load_pipeline

pipeline = load_pipeline("QUANTIZED")
images = pipeline(["a pizza, 3d style"], seed=0)
"""

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from models import build_component, programs
from models.family import Family
from models.fit import check_fit
from models.lora import add_lora, read_lora
from models.sampler import Sampler
from models.stages import Deferred
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.calibrate import Calibration
from quartz_jax.conversion.checkpoint import CalibrationRecord
from quartz_jax.conversion.model import quantize_model
from quartz_jax.conversion.report import Report
from quartz_jax.conversion.stream import Carried, Conversion, Source
from quartz_jax.engine.place import Placement, place
from quartz_jax.evaluation.paired import SamplingOptions, calibration_samples
from quartz_jax.evaluation.prompts import read_lines
from quartz_jax.io.files import hold
from quartz_jax.recipes import MAIN, Recipe, get_recipe
from quartz_jax.transforms import Seen

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny_flux"
CALIBRATION_PROMPTS = Path(__file__).resolve().parent / "conversion" / "calibration_prompts.txt"
_TOKENS_AT_ONCE = 4096  # of latents, while calibration samples are made: an image of 1024x1024
_IMAGES_AT_ONCE = 16  # the same, where images are small


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A pipeline that loads its models when they are needed."""

    pipeline: Sampler
    # of the components that follow recipes; one that is quantized while it loads has none before
    reports: dict[str, Report]

    @property
    def report(self) -> Report:
        """The main component's."""
        return self.reports[self.pipeline.family.main]


def load_pipeline(
    folder: Path | str,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    lora_transformer_only: bool = False,
    expand: bool = False,
    keep_loaded: bool = True,
) -> Sampler:
    """Return the pipeline of a quantized checkpoint, ready for this device's kernels.

    Args:
      folder: what `quartz quantize` made.
      loras: files and scales of adapters.
      lora_transformer_only: leave out what they hold for text encoders, which take none here.
      expand: keep 4-bit weights decoded to int8 on the device: twice the memory.
      keep_loaded: load all models now and keep them; otherwise each is loaded for the stage that
        needs it, in every call.

    Raises:
      ValueError: the folder is no quantized checkpoint, or one that can't be used.
    """
    opened = open_checkpoint(
        Path(folder), loras=loras, lora_transformer_only=lora_transformer_only, expand=expand
    )
    pipeline = opened.pipeline
    return pipeline.load() if keep_loaded else pipeline


def compile_quickly() -> None:
    """Keep XLA on GPUs from searching tilings for matmuls of its own, which is most of compiling.

    For programs that run briefly. Call it before JAX is first used; XLA_FLAGS may say otherwise.
    """
    flag, flags = "--xla_gpu_enable_triton_gemm", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


def keep_programs(folder: Path | None) -> None:
    """Keep what models are traced to in a folder, see `models.programs`; None for nowhere."""
    programs.keep(folder)


def program_counts() -> dict[str, int]:
    """Return how many programs of models were "traced", and "kept" since an earlier start."""
    return dict(programs.counts)


def compute_dtype() -> jnp.dtype:
    """Return bfloat16, but float32 on CPUs, where bfloat16 matmuls are slow."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def by_component(recipes: Mapping[str, Recipe], family: Family) -> dict[str, Recipe]:
    """Return recipes by component's name, that of `MAIN` by the family's.

    Raises:
      ValueError: one is for a component that the family hasn't.
    """
    if unknown := set(recipes) - {MAIN, *family.components}:
        raise ValueError(
            f"recipe for {', '.join(sorted(unknown))}: components are "
            f"{', '.join(family.components)}"
        )
    return {name or family.main: recipe for name, recipe in recipes.items()}


def apply_recipe(
    pipeline: Sampler,
    recipe: Recipe,
    seen: Mapping[str, Seen] | None = None,
    *,
    component: str = MAIN,
) -> tuple[Sampler, Report]:
    """Return a copy of a loaded 16-bit pipeline with one model quantized, and the report.

    Args:
      pipeline: is untouched.
      recipe: for the model.
      seen: statistics of its linears' inputs, for calibrated recipes.
      component: the model's name; `MAIN` for the family's main one.
    """
    ((component, _),) = by_component({component: recipe}, pipeline.family).items()
    module = pipeline.models[component]
    module, report = quantize_model(module, recipe, seen, progress=bool(recipe.rules))
    return pipeline.replace(**{component: module}), report


def placed(
    pipeline: Sampler, *, component: str = MAIN, simulate: bool = False
) -> tuple[Sampler, Placement]:
    """Return a copy with one loaded model ready for this device's kernels, and how it runs.

    See `engine.place` for `simulate`.
    """
    component = component or pipeline.family.main
    model = pipeline.models[component]
    module, placement = place(model, dtype=compute_dtype(), simulate=simulate)
    return pipeline.replace(**{component: module}), placement


def open_checkpoint(
    folder: Path,
    *,
    text_encoders: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    lora_transformer_only: bool = False,
    expand: bool = False,
) -> Opened:
    """Open a quantized checkpoint, and the reports that were saved with it.

    Args:
      folder: the checkpoint.
      text_encoders: a diffusers folder that gives what a checkpoint of a transformer alone lacks.
      loras: files and scales of adapters.
      lora_transformer_only: leave out what they hold for text encoders, which take none here.
      expand: keep 4-bit weights decoded to int8 on the device.
    """
    manifest = checkpoint.read_manifest(folder)
    checkpoint.check_carried(folder, manifest)
    files = models.find_model(folder, text_encoders)
    components = manifest.components
    if unknown := set(components) - set(files.family.components):
        raise ValueError(
            f"{folder} holds {', '.join(sorted(unknown))}: components are "
            f"{', '.join(files.family.components)}"
        )
    build = functools.partial(build_component, dtype=compute_dtype())
    known = files.family.components
    given = {
        name: Deferred(
            config=models.component_config(component.config, known[name]),
            load=functools.partial(
                _load_quantized, folder, functools.partial(build, expected=known[name]), name
            ),
            bytes=component.report.bytes,
        )
        for name, component in components.items()
    }
    reports = {name: component.report for name, component in components.items()}
    if (main := files.family.main) not in given:
        given[main] = _quantized(files, main, get_recipe("bf16"), reports)
    given = _prepared(files.family, given, loras, lora_transformer_only, expand)
    pipeline = _open_pipeline(files, folder, given, text_encoders)
    return Opened(pipeline=pipeline, reports=reports)


def warn_of_other_base(folder: Path, model: Path) -> None:
    """Warn, before any work, if a checkpoint wasn't made of the 16-bit model it is compared with.

    The model's files are read once; as long as they have the same sizes and times, never again.

    Args:
      folder: the checkpoint.
      model: as `models.find_model` takes it. Of a single file, only what is in it is looked at.
    """
    manifest, files = checkpoint.read_manifest(folder), models.find_model(model)
    for name, component in manifest.components.items():
        if name not in files.paths or not files.paths[name].exists():
            continue
        if not component.base_sha256:
            told = f"{folder} doesn't say what its {name} was made of: it was in memory only"
        elif not hold(_weights(files.open(name)), component.base_sha256):
            told = (
                f"{model} isn't what {folder} was made of ({manifest.base_name}): its {name} has "
                "other files"
            )
        else:
            continue
        warnings.warn(f"{told}; figures may compare two models", stacklevel=2)


def _weights(opened: models.StoredModule) -> tuple[Path, ...]:
    """Return the files that hold a component."""
    return tuple(sorted(set(opened.checkpoint.files.values())))


def _load_quantized(
    folder: Path, build: Callable[[dict[str, Any]], nnx.Module], component: str
) -> nnx.Module:
    return checkpoint.load(folder, build, component)[0]


def load_16_bit(model: Path) -> Sampler:
    """Return the pipeline of a 16-bit model with all its models loaded."""
    return models.load_pipeline(model, dtype=compute_dtype())


def loaded_main(pipeline: Sampler) -> nnx.Module:
    """Return the main component of a pipeline that keeps its models loaded."""
    module = pipeline.models[pipeline.family.main]
    assert not isinstance(module, Deferred)
    return module


def abstract_main(model: Path) -> Any:
    """Return a 16-bit model's main component with shapes in place of arrays."""
    files = models.find_model(model)
    return files.open(files.family.main).abstract


def only_size(folder: Path) -> tuple[int, int] | None:
    """Return width and height, in pixels, of a model that draws one size; None for one of many."""
    return models.only_size(folder)


def describe_16_bit(model: Path) -> str:
    """Return in words what a 16-bit model is: its family, and the bytes of what it holds.

    Raises:
      ValueError: a component is missing, can't be used or doesn't fit the others.
    """
    files = models.find_model(model)
    lines = [f"{model}: {files.family.name}, not quantized"]
    for name in files.family.components:
        lines.append(f"{name}: {files.open(name).checkpoint.bytes:,} bytes")
    return "\n".join(lines)


def open_16_bit(
    model: Path,
    recipes: Mapping[str, Recipe],
    *,
    text_encoders: Path | None = None,
    schedule: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    lora_transformer_only: bool = False,
    expand: bool = False,
) -> Opened:
    """Open a 16-bit model whose components are quantized when they are loaded.

    Args:
      model: a diffusers folder or a file in Black Forest Labs' naming.
      recipes: by component; without one for the main component it stays 16-bit.
      text_encoders: gives what `model` lacks.
      schedule: "dev", "schnell" or "folder", as `models.find_model` takes it.
      loras: files and scales of adapters.
      lora_transformer_only: leave out what they hold for text encoders, which take none here.
      expand: keep 4-bit weights decoded to int8 on the device.

    Raises:
      ValueError: a recipe is calibrated, or for a component that there is none of.
    """
    for recipe in recipes.values():
        if recipe.calibrated:
            raise ValueError(
                f"recipe {recipe.name!r} is calibrated: make a checkpoint with quantize.py, and "
                "give that as --model"
            )
    files = models.find_model(model, text_encoders, schedule)
    recipes = {files.family.main: get_recipe("bf16")} | by_component(recipes, files.family)
    reports: dict[str, Report] = {}
    given = {name: _quantized(files, name, recipe, reports) for name, recipe in recipes.items()}
    given = _prepared(files.family, given, loras, lora_transformer_only, expand)
    pipeline = _open_pipeline(files, model, given, text_encoders, schedule)
    return Opened(pipeline=pipeline, reports=reports)


def _quantized(
    files: models.ModelFiles, name: str, recipe: Recipe, reports: dict[str, Report]
) -> Deferred:
    """Return a 16-bit model that is quantized when it loads, which leaves its report."""
    stored = files.open(name, compute_dtype())

    def load() -> Any:
        original = stored.load(compute_dtype())
        module, reports[name] = quantize_model(original, recipe, progress=bool(recipe.rules))
        return module

    size = _bytes_in(compute_dtype(), stored)  # before it is quantized, which frees what it had
    config = models.component_config(stored.config, files.family.components[name])
    return Deferred(config=config, load=load, bytes=size)


def _bytes_in(dtype: Any, stored: models.StoredModule) -> int:
    """Return the bytes of a component's parameters in a dtype, whichever they are stored in."""
    leaves: Any = jax.tree.leaves(nnx.state(stored.abstract))
    return sum(leaf.size for leaf in leaves) * jnp.dtype(dtype).itemsize


def _prepared(
    family: Family,
    given: Mapping[str, Deferred],
    loras: Sequence[tuple[Path, float]],
    transformer_only: bool,
    expand: bool,
) -> dict[str, Deferred]:
    """Read and check adapters; return models that load ready for the device, and with them."""
    config = given[family.main].config
    options = {"transformer_only": transformer_only}
    adapters = [read_lora(path, family, config, **options) for path, _ in loras]
    scales = [scale for _, scale in loras]

    def load(name: str, deferred: Deferred) -> Any:
        module: Any = deferred.load()  # of whatever class the component is
        if name == family.main and adapters:  # before kernels' own order, which holds them too
            module = add_lora(module, adapters, scales, compute_dtype())
        return place(module, expand=expand, dtype=compute_dtype(), in_place=True)[0]

    return {
        name: dataclasses.replace(deferred, load=functools.partial(load, name, deferred))
        for name, deferred in given.items()
    }


def _open_pipeline(
    files: models.ModelFiles,
    model: Path,
    given: Mapping[str, Deferred],
    text_encoders: Path | None = None,
    schedule: str | None = None,
) -> Sampler:
    """Return the pipeline; what isn't given loads in 16 bits, its tensors are checked already."""
    dtype = compute_dtype()
    deferred: dict[str, Any] = dict(given)  # they stand where modules would
    there = (name for name in files.family.components if name in files.paths)
    there = (name for name in there if files.paths[name].exists())
    for name in (name for name in there if name not in given):
        stored = files.open(name, dtype)
        config = models.component_config(stored.config, files.family.components[name])
        load = functools.partial(stored.load, dtype)
        deferred[name] = Deferred(config=config, load=load, bytes=_bytes_in(dtype, stored))
    return models.load_pipeline(
        model, dtype, text_encoders=text_encoders, schedule=schedule, **deferred
    )


def calibration_prompts(pipeline: Sampler) -> list[str]:
    """Return the prompts to calibrate a model on where none are given."""
    return list(pipeline.denoiser.calibration_texts()) or read_lines(CALIBRATION_PROMPTS)


def calibrate(
    pipeline: Sampler,  # of the 16-bit model
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 4,
    size: tuple[int, int] | tuple[None, None] = (None, None),
    propagate: bool = False,
) -> Calibration:
    """Return what a conversion calibrates a transformer on; nothing is sampled before it starts.

    Args:
      pipeline: draws the prompts, in twice as many steps as are looked at, or its own fewer.
      prompts: an image each.
      seed: of the noise.
      steps: of sampling that statistics are taken at, evenly spaced; all if there are no more.
      size: width and height of the images; None for the model's own.
      propagate: let blocks see what the quantized blocks before them made.
    """
    options, count = SamplingOptions.of(pipeline, size), len(prompts)
    total = min(options.num_inference_steps, 2 * steps)
    options = dataclasses.replace(options, num_inference_steps=total)
    taken = sorted({int(step) for step in np.linspace(0, total - 1, min(steps, total)).round()})
    tokens = pipeline.canvas(options.height, options.width).tokens
    most = min(_IMAGES_AT_ONCE, max(1, _TOKENS_AT_ONCE // tokens))
    batch = max(size for size in range(1, most + 1) if count % size == 0)  # all of one shape

    def make() -> list[dict[str, Any]]:
        key = jax.random.key(seed)
        noise = pipeline.initial_noise(key, count, options.height, options.width)
        return calibration_samples(pipeline, list(prompts), noise, options, batch, taken)

    record = CalibrationRecord(
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        samples=count // batch * len(taken),
        steps=tuple(taken),
        seed=seed,
        propagate=propagate,
        size=(options.width, options.height),
    )
    return Calibration(make=make, record=record)


def plan_conversion(
    model: Path,
    recipes: Mapping[str, Recipe],
    *,
    text_encoders: Path | None = None,
    schedule: str | None = None,
    calibration: Calibration | None = None,
) -> Conversion:
    """Open every component of a 16-bit model, and return what is quantized and what is carried.

    Args:
      model: a diffusers folder or a file in Black Forest Labs' naming.
      recipes: by component.
      text_encoders: gives what `model` lacks.
      schedule: "dev", "schnell" or "folder", as `models.find_model` takes it.
      calibration: of the main component, see `calibrate`; None without a calibrated recipe.

    Raises:
      ValueError: a component can't be read, doesn't fit the others or isn't one of the family's, or
        there is none that a recipe is for.
    """
    files = models.find_model(model, text_encoders, schedule)
    recipes = by_component(recipes, files.family)
    there = (name for name in files.family.components if name in files.paths)
    opened = {name: files.open(name, check_values=True) for name in there}
    if absent := [name for name in recipes if name not in opened]:
        raise ValueError(
            f"{model} holds no {', '.join(absent)}, which a recipe is for; name a diffusers folder "
            "that does (--text-encoders)"
        )
    files.load_scheduler()  # what is only carried must load too
    configs = {
        name: models.component_config(module.config, files.family.components[name])
        for name, module in opened.items()
    }
    check_fit(files.family, configs, files.load_tokenizers())
    given = {files.family.main: calibration}
    sources = tuple(
        _source(name, recipe, opened[name], given.get(name)) for name, recipe in recipes.items()
    )
    carried = [
        _carry(name, path, opened.get(name))
        for name, path in files.paths.items()
        if name not in recipes
    ]
    return Conversion(
        base_name=models.model_name(model), sources=sources, carried=(*carried, *_texts(files))
    )


def _source(
    name: str, recipe: Recipe, opened: models.StoredModule, calibration: Calibration | None
) -> Source:
    return Source(
        name=name,
        recipe=recipe,
        model=opened.abstract,
        read=opened.read,
        config=opened.config,
        files=_weights(opened),
        calibration=calibration,
    )


def _carry(name: str, path: Path, component: models.StoredModule | None) -> Carried:
    """Carry a component's folder as it is, or a single file as the folder diffusers would write."""
    if not path.is_file():
        if not path.is_dir():
            raise ValueError(f"{path} does not exist; expected a component of the model")
        return Carried.copy(path, name)
    assert component is not None
    wide = component.checkpoint.stored_dtype(next(iter(component.checkpoint.files))) == "F32"
    dtype = jnp.float32 if wide else jnp.bfloat16

    def write(folder: Path) -> None:
        models.export_component(component.load(dtype), folder, dtype)

    return Carried(name=name, bytes=component.checkpoint.bytes, write=write, source=path)


def _texts(files: models.ModelFiles) -> list[Carried]:
    """Carry licences and the like of a model's folder; make what single files lack."""
    if files.scheduler is None:
        assert files.home is not None
        found = {file for pattern in checkpoint.TEXTS for file in files.home.glob(pattern)}
        return [Carried.copy(file) for file in sorted(found)]
    made = {
        "scheduler": ("scheduler_config.json", files.scheduler),
        "model_index.json": (None, files.index),
    }
    return [
        Carried(name=name, bytes=1000, write=functools.partial(_write_json, *content))
        for name, content in made.items()
    ]


def _write_json(inside: str | None, value: dict, path: Path) -> None:
    """Write a JSON file at a path, or inside a folder that is made there."""
    if inside:
        path.mkdir()
        path /= inside
    path.write_text(json.dumps(value, indent=2) + "\n")
