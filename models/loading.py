"""From a model's files to a pipeline or to one of its components.

A model is a diffusers folder, or a file or folder in Black Forest Labs' naming, which carries the
transformer and perhaps the autoencoder; a diffusers folder then brings the text encoders. What a
file is, the names of its tensors tell.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.checkpoint_io import (
    CheckpointError,
    StoredModule,
    TracingRngs,
    open_checkpoint,
    read_json,
)
from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.flux.params import is_bfl_transformer, open_flux_transformer
from models.pipeline import FluxPipeline, GenerationDefaults
from models.schedulers import FlowMatchEulerScheduler
from models.text_encoders.clip import CLIPTextConfig, CLIPTextEncoder, open_clip_text_encoder
from models.text_encoders.t5 import T5Config, T5Encoder, open_t5_encoder
from models.vae.config import AutoencoderKLConfig
from models.vae.modeling import AutoencoderKL
from models.vae.params import is_bfl_autoencoder, open_autoencoder_kl

# Class in a config.json: how to open a folder of it, its config, its module.
_CLASSES = {
    "AutoencoderKL": (open_autoencoder_kl, AutoencoderKLConfig, AutoencoderKL),
    "CLIPTextModel": (open_clip_text_encoder, CLIPTextConfig, CLIPTextEncoder),
    "FluxTransformer2DModel": (open_flux_transformer, FluxConfig, FluxTransformer),
    "T5EncoderModel": (open_t5_encoder, T5Config, T5Encoder),
}
_MODULES = ("text_encoder", "text_encoder_2", "vae", "transformer")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_SCHEDULER_CONFIG = "scheduler_config.json"
# Our own key in model_index.json; diffusers ignores keys that start with an underscore.
_DEFAULTS_KEY = "_generation_defaults"

# What diffusers writes for FLUX.1; a model in Black Forest Labs' naming brings no such file.
FLUX_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Names that tell other families apart, tried in this order.
_FAMILIES = {
    r"joint_blocks\..*": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?input_blocks\..*|down_blocks\..*": "a Stable Diffusion U-Net",
    r".*lora.*": "a LoRA adapter",
    r"(en|de)coder\.(down_blocks|mid_block|up_blocks)\..*": "an autoencoder of diffusers: give the "
    "model's folder",
    r"(text_model\.)?encoder\.layers\..*": "a CLIP text encoder",
    r"encoder\.block\..*": "a T5 encoder",
    r"single_transformer_blocks\..*": "a FLUX transformer of diffusers, without its config.json: "
    "give the model's folder",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where the components of a model lie."""

    paths: dict[str, Path]  # component to its folder, or to a file in Black Forest Labs' naming
    index: dict[str, Any]  # contents of model_index.json
    scheduler: dict[str, Any] | None = None  # scheduler_config.json, where paths has no scheduler

    def load_scheduler(self) -> FlowMatchEulerScheduler:
        """Return the scheduler."""
        if self.scheduler is not None:
            return FlowMatchEulerScheduler.from_json(self.scheduler)
        config = self.paths["scheduler"] / _SCHEDULER_CONFIG
        return FlowMatchEulerScheduler.from_json(read_json(config))

    def load_tokenizers(self) -> dict[str, Any]:
        """Return the tokenizers by component; raises CheckpointError where one doesn't load."""
        return {name: load_tokenizer(self.paths[name]) for name in _TOKENIZERS}


def find_model(path: Path | str, text_encoders: Path | str | None = None) -> ModelFiles:
    """Find the components of a FLUX.1 model.

    Args:
      path: a diffusers folder, with model_index.json; or a file in Black Forest Labs' naming such
        as flux1-dev.safetensors, or a folder of such files. Beside a single file, ae.safetensors
        is the autoencoder if it is there.
      text_encoders: a diffusers folder that gives the text encoders and tokenizers, and the
        autoencoder where `path` has none. Needed for Black Forest Labs' files, which lack them.

    Raises:
      CheckpointError: it is no FLUX.1 model, or a component is missing.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files or (path / "model_index.json").exists():
        return _find_in_diffusers_folder(path, text_encoders)
    if path.is_file() and (beside := path.parent / "ae.safetensors") not in files:
        files += [beside] * beside.exists()
    paths, guidance = _classify(path, files)
    missing = [name for name in (*_MODULES, *_TOKENIZERS) if name not in paths]
    if text_encoders is None:
        raise CheckpointError(
            f"{path} holds no {', '.join(missing)}; name a diffusers folder that does "
            "(--text-encoders)"
        )
    folder = Path(text_encoders)
    if absent := [name for name in missing if not (folder / name).is_dir()]:
        raise CheckpointError(f"{folder} lacks the component folders {', '.join(absent)}")
    paths |= {name: folder / name for name in missing}
    return ModelFiles(paths=paths, index=FLUX_INDEX, scheduler=flux_scheduler(guidance))


def open_component(path: Path | str, dtype: jnp.dtype = jnp.bfloat16) -> StoredModule:
    """Open one model without reading its parameters.

    Args:
      path: a folder such as `<model>/transformer`, with a config.json whose `_class_name`
        (diffusers) or `architectures` (transformers) decides; or a file in Black Forest Labs'
        naming, a transformer or an autoencoder.
      dtype: of the parameters and the computation.

    Raises:
      CheckpointError: the class is unknown, or a file or tensor can't be used.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path)(path, dtype=dtype)
    config = read_json(path / "config.json")
    try:
        return _CLASSES[_class_name(config)][0](path, dtype=dtype)
    except KeyError:
        raise CheckpointError(f"{path / 'config.json'}: {_unsupported(config)}") from None


def build_component(config: Mapping[str, Any], dtype: jnp.dtype = jnp.bfloat16) -> nnx.Module:
    """Make a model for tracing only, as under `nnx.eval_shape`: its weights mean nothing.

    Args:
      config: contents of its config.json.
      dtype: of the parameters and the computation.

    Raises:
      CheckpointError: the class is unknown.
    """
    if _class_name(config) not in _CLASSES:
        raise CheckpointError(_unsupported(config))
    _, sizes, module = _CLASSES[_class_name(config)]
    return module(sizes.from_json(config), rngs=TracingRngs(), dtype=dtype, param_dtype=dtype)


def component_config(config: Mapping[str, Any]) -> Any:
    """Return a model's config, such as a FluxConfig, from the contents of its config.json.

    Raises:
      CheckpointError: the class is unknown.
    """
    if _class_name(config) not in _CLASSES:
        raise CheckpointError(_unsupported(config))
    return _CLASSES[_class_name(config)][1].from_json(config)


def load_component(
    path: Path | str, dtype: jnp.dtype = jnp.bfloat16
) -> nnx.Module | FlowMatchEulerScheduler:
    """Load what `open_component` opens, or the scheduler from a folder with its config.

    Args:
      path: as for `open_component`, or a folder with scheduler_config.json.
      dtype: of a model's parameters and computation.

    Raises:
      CheckpointError: the class is unknown, or a file or tensor can't be used.
    """
    scheduler = Path(path) / _SCHEDULER_CONFIG
    if scheduler.exists():
        return FlowMatchEulerScheduler.from_json(read_json(scheduler))
    return open_component(path, dtype).load(dtype)


def load_pipeline(
    path: Path | str,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    text_encoders: Path | str | None = None,
    **given: nnx.Module | None,
) -> FluxPipeline:
    """Load a FLUX.1 model.

    Args:
      path: as for `find_model`, like `text_encoders`.
      dtype: of every model's parameters and computation.
      text_encoders: gives what `path` lacks.
      **given: components by name, such as `transformer`, to use in place of the files' (quantized
        ones, say); theirs aren't read. None is as if it weren't given.

    Raises:
      CheckpointError: this is no FLUX model, or a component is missing or can't be used.
    """
    given = {name: module for name, module in given.items() if module is not None}
    if unknown := set(given) - set(_MODULES):
        raise TypeError(f"load_pipeline has no argument {', '.join(sorted(unknown))}")
    files = find_model(path, text_encoders)
    wanted = (name for name in (*_MODULES, *_TOKENIZERS, "scheduler") if name not in given)
    lacking = [
        name
        for name in wanted
        if not (name in files.paths and files.paths[name].exists())
        and not (name == "scheduler" and files.scheduler)
    ]
    if lacking:
        raise CheckpointError(f"{path} lacks the component folders {', '.join(lacking)}")

    parts = files.load_tokenizers()
    parts |= {
        name: given[name] if name in given else load_component(files.paths[name], dtype)
        for name in _MODULES
    }
    defaults = generation_defaults(files.index, parts["transformer"].config.guidance_embeds)
    return FluxPipeline(**parts, scheduler=files.load_scheduler(), defaults=defaults)


def generation_defaults(index: Mapping[str, Any], guidance_embeds: bool) -> GenerationDefaults:
    """Return what a model generates with by default.

    What its model_index.json leaves out is that of FLUX.1: schnell, which has no guidance, is made
    for 4 steps.

    Args:
      index: contents of model_index.json.
      guidance_embeds: whether the transformer takes a guidance scale.

    Raises:
      CheckpointError: an unknown key.
    """
    given = index.get(_DEFAULTS_KEY, {})
    known = {field.name for field in dataclasses.fields(GenerationDefaults)}
    if unknown := sorted(set(given) - known):
        raise CheckpointError(f"model_index.json: {_DEFAULTS_KEY} has unknown keys {unknown}")
    return GenerationDefaults(**{"num_inference_steps": 28 if guidance_embeds else 4, **given})


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer of transformers; raises CheckpointError, naming the folder."""
    from transformers import AutoTokenizer  # here, as importing it takes seconds

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its readers happen to
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} holds no tokenizer that loads: {first}") from None


def _find_in_diffusers_folder(folder: Path, text_encoders: Path | str | None) -> ModelFiles:
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "FluxPipeline":
        raise CheckpointError(
            f"{folder / 'model_index.json'}: _class_name is {index.get('_class_name')!r}; "
            "expected 'FluxPipeline'"
        )
    if text_encoders is not None:
        raise CheckpointError(f"{folder} has text encoders; leave out --text-encoders")
    names = (*_MODULES, *_TOKENIZERS, "scheduler")
    return ModelFiles(paths={name: folder / name for name in names}, index=index)


def _classify(path: Path, files: list[Path]) -> tuple[dict[str, Path], bool]:
    """Return component to file, and whether the transformer takes a guidance scale."""
    found: dict[str, list[Path]] = {"transformer": [], "vae": []}
    guidance, kinds = False, []
    for file in files:
        names = open_checkpoint(file).shapes
        kinds.append(f"{file.name} is {_family(names)}")
        if is_bfl_transformer(names):
            found["transformer"].append(file)
            guidance = "guidance_in.in_layer.weight" in names
        elif is_bfl_autoencoder(names):
            found["vae"].append(file)
    if not found["transformer"]:
        raise CheckpointError(f"{path} holds no FLUX.1 transformer: {'; '.join(kinds)}")
    for name, several in found.items():
        if len(several) > 1:
            listed = ", ".join(file.name for file in several)
            raise CheckpointError(f"{path} holds several of {name}: {listed}; name one file")
    return {name: files[0] for name, files in found.items() if files}, guidance


def _open_file(file: Path) -> Any:
    names = open_checkpoint(file).shapes
    if is_bfl_transformer(names):
        return open_flux_transformer
    if is_bfl_autoencoder(names):
        return open_autoencoder_kl
    raise CheckpointError(f"{file} is {_family(names)}; expected a FLUX.1 file")


def _family(names: Mapping[str, object]) -> str:
    """Say what a checkpoint seems to be, from its tensors' names."""
    if is_bfl_autoencoder(names):
        return "an autoencoder"
    for pattern, family in _FAMILIES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return family
    return f"of an unknown kind, with tensors such as {', '.join(sorted(names)[:3])}"


def flux_scheduler(guidance: bool) -> dict[str, Any]:
    """Return the published scheduler_config.json of FLUX.1-dev or, without guidance, -schnell."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0 if guidance else 1.0,
        "use_dynamic_shifting": guidance,
    }


def _class_name(config: Mapping[str, Any]) -> str | None:
    return config.get("_class_name") or next(iter(config.get("architectures") or ()), None)


def _unsupported(config: Mapping[str, Any]) -> str:
    known = ", ".join(_CLASSES)
    return f"class {_class_name(config)} is not supported; expected one of {known}"
