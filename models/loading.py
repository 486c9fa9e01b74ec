"""From a diffusers model folder to a pipeline or to one of its components."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.checkpoint_io import CheckpointError, read_json
from models.flux.params import load_flux_transformer
from models.pipeline import FluxPipeline, GenerationDefaults
from models.schedulers import FlowMatchEulerScheduler
from models.text_encoders.clip import load_clip_text_encoder
from models.text_encoders.t5 import load_t5_encoder
from models.vae.params import load_autoencoder_kl

_LOADERS = {
    "AutoencoderKL": load_autoencoder_kl,
    "CLIPTextModel": load_clip_text_encoder,
    "FluxTransformer2DModel": load_flux_transformer,
    "T5EncoderModel": load_t5_encoder,
}
_MODULES = ("text_encoder", "text_encoder_2", "vae", "transformer")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
# Our own key in model_index.json; diffusers ignores keys that start with an underscore.
_DEFAULTS_KEY = "_generation_defaults"


def load_component(
    folder: Path | str, dtype: jnp.dtype = jnp.bfloat16
) -> nnx.Module | FlowMatchEulerScheduler:
    """Load one model, or the scheduler, by the class that its config names.

    Args:
      folder: such as `<model>/transformer`, with config.json or scheduler_config.json; diffusers'
        `_class_name` or transformers' `architectures` decides.
      dtype: of a model's parameters and computation.

    Raises:
      CheckpointError: the class is unknown, or a file or tensor can't be used.
    """
    path = Path(folder) / "scheduler_config.json"
    if path.exists():
        return FlowMatchEulerScheduler.from_json(read_json(path))
    path = Path(folder) / "config.json"
    config = read_json(path)
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if name not in _LOADERS:
        known = ", ".join(_LOADERS)
        raise CheckpointError(f"{path}: class {name} is not supported; expected one of {known}")
    return _LOADERS[name](folder, dtype=dtype)


def load_pipeline(
    folder: Path | str,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    transformer: nnx.Module | None = None,
) -> FluxPipeline:
    """Load a FLUX.1 model folder, as diffusers' `save_pretrained` writes it.

    Args:
      folder: holds model_index.json and a folder for each component.
      dtype: of every model's parameters and computation.
      transformer: use this one, a quantized one say, and leave the folder's unread.

    Raises:
      CheckpointError: the folder is no FLUX model, or a component is missing or can't be used.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "FluxPipeline":
        raise CheckpointError(
            f"{folder / 'model_index.json'}: _class_name is {index.get('_class_name')!r}; "
            "expected 'FluxPipeline'"
        )
    given = {} if transformer is None else {"transformer": transformer}
    models = [name for name in (*_MODULES, "scheduler") if name not in given]
    if missing := [name for name in (*models, *_TOKENIZERS) if not (folder / name).is_dir()]:
        raise CheckpointError(f"{folder} lacks the component folders {', '.join(missing)}")

    parts: dict[str, Any] = {name: _load_tokenizer(folder / name) for name in _TOKENIZERS}
    parts |= {name: load_component(folder / name, dtype) for name in models} | given
    defaults = _defaults(index.get(_DEFAULTS_KEY, {}), parts["transformer"].config.guidance_embeds)
    return FluxPipeline(**parts, defaults=defaults)


def _defaults(given: dict[str, Any], guidance_embeds: bool) -> GenerationDefaults:
    """Fill what the folder leaves out: schnell, which has no guidance, is made for 4 steps."""
    known = {field.name for field in dataclasses.fields(GenerationDefaults)}
    if unknown := sorted(set(given) - known):
        raise CheckpointError(f"model_index.json: {_DEFAULTS_KEY} has unknown keys {unknown}")
    return GenerationDefaults(**{"num_inference_steps": 28 if guidance_embeds else 4, **given})


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # here, as importing it takes seconds

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its readers happen to
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} holds no tokenizer that loads: {first}") from None
