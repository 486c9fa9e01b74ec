"""From a model's files to a pipeline or to one of its components.

A model is a diffusers folder, or a file or folder in Black Forest Labs' naming, which carries the
transformer and perhaps the autoencoder and text encoders; a diffusers folder then brings the rest.
What a file is, the names of its tensors tell. That the components fit each other is checked when a
model is found, from their configs alone.
"""

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.checkpoint_io import StoredModule, TracingRngs, check_bounds, config_from_json
from models.fit import check_fit
from models.flux import params as flux_params
from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.flux.params import (
    export_flux_transformer,
    is_bfl_transformer,
    open_flux_transformer,
    select_bfl_transformer,
)
from models.sampler import LONGEST_SIDE, FluxPipeline, GenerationDefaults
from models.schedulers import FlowMatchEulerScheduler
from models.stored_files import (
    CheckpointError,
    find_prefix,
    open_checkpoint,
    quantized_by,
    read_json,
    refuse_quantized,
    weights_in,
)
from models.text_encoders import clip, t5
from models.text_encoders.clip import CLIPTextConfig, CLIPTextEncoder, open_clip_text_encoder
from models.text_encoders.t5 import T5Config, T5Encoder, open_t5_encoder
from models.tokenizers import load_tokenizer
from models.vae import params as vae_params
from models.vae.config import AutoencoderKLConfig
from models.vae.modeling import AutoencoderKL
from models.vae.params import (
    export_autoencoder_kl,
    is_bfl_autoencoder,
    open_autoencoder_kl,
)

# Class in a config.json: how to open a folder of it, its config, its module.
_CLASSES = {
    "AutoencoderKL": (open_autoencoder_kl, AutoencoderKLConfig, AutoencoderKL),
    "CLIPTextModel": (open_clip_text_encoder, CLIPTextConfig, CLIPTextEncoder),
    "CLIPTextModelWithProjection": (open_clip_text_encoder, CLIPTextConfig, CLIPTextEncoder),
    "FluxTransformer2DModel": (open_flux_transformer, FluxConfig, FluxTransformer),
    "T5EncoderModel": (open_t5_encoder, T5Config, T5Encoder),
}
_OPENERS = {
    "transformer": open_flux_transformer,
    "vae": open_autoencoder_kl,
    "text_encoder": open_clip_text_encoder,
    "text_encoder_2": open_t5_encoder,
}
# A tensor's name that tells each in a file, where a prefix may stand before it.
_TELLING = {
    "transformer": flux_params.TELLING,
    "vae": vae_params.TELLING,
    "text_encoder": clip.TELLING,
    "text_encoder_2": t5.TELLING,
}
_CONFIGS = (FluxConfig, AutoencoderKLConfig, CLIPTextConfig, T5Config)
_STEPS = {True: 28, False: 4}  # by default, of dev and of schnell
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
    r"(.+\.)?joint_blocks\..*": "Stable Diffusion 3",
    r"(.+\.)?input_blocks\..*|down_blocks\..*": "a Stable Diffusion U-Net",
    r".*lora.*": "a LoRA adapter",
    r"(en|de)coder\.(down_blocks|mid_block|up_blocks)\..*": "an autoencoder of diffusers: give the "
    "model's folder",
    r"(.+\.)?encoder\.layers\..*": "a CLIP text encoder",
    r"(.+\.)?encoder\.block\..*": "a T5 encoder",
    r"(.+\.)?single_transformer_blocks\..*": "a FLUX transformer of diffusers, without its "
    "config.json: give the model's folder",
}
SCHEDULES = ("dev", "schnell", "folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where the components of a model lie."""

    paths: dict[str, Path]  # component to its folder, or to a file in Black Forest Labs' naming
    index: dict[str, Any]  # contents of model_index.json
    scheduler: dict[str, Any] | None = None  # scheduler_config.json, where paths has no scheduler
    schedule: str = "the model's own"  # in words, whose noise levels and number of steps are taken

    def load_scheduler(self) -> FlowMatchEulerScheduler:
        """Return the scheduler."""
        if self.scheduler is not None:
            return FlowMatchEulerScheduler.from_json(self.scheduler)
        return _folder_scheduler(self.paths["scheduler"])

    def open(
        self, name: str, dtype: jnp.dtype = jnp.bfloat16, *, check_values: bool = False
    ) -> StoredModule:
        """Open a model by its component's name; see `open_component`."""
        path = self.paths[name]
        component = name if path.is_file() else None
        return open_component(path, dtype, component=component, check_values=check_values)

    def load_tokenizers(self) -> dict[str, Any]:
        """Return the tokenizers by component; raises CheckpointError where one doesn't load."""
        return {name: load_tokenizer(self.paths[name]) for name in _TOKENIZERS}


def find_model(
    path: Path | str,
    text_encoders: Path | str | None = None,
    schedule: str | None = None,
) -> ModelFiles:
    """Find the components of a FLUX.1 model.

    Args:
      path: a diffusers folder, with model_index.json; or a file in Black Forest Labs' naming such
        as flux1-dev.safetensors, an index of its shards, or a folder of such files. Beside a single
        file, ae.safetensors is the autoencoder if it is there.
      text_encoders: a diffusers folder that gives the text encoders and tokenizers, and the
        autoencoder where `path` has none. Needed for Black Forest Labs' files, which lack them.
      schedule: the noise levels and the number of steps that are the default: those of FLUX.1
        "dev" or "schnell", or of the "folder" that gives the text encoders. None for the model's
        own; files in Black Forest Labs' naming have none, and take dev's with a guidance embedding
        and schnell's, with a warning, without.

    Raises:
      ValueError: the schedule is none of these.
      CheckpointError: it is no FLUX.1 model for text to image, a component is missing, or the
        components don't fit each other.
    """
    path = Path(path)
    if schedule not in (None, *SCHEDULES):
        raise ValueError(f"schedule is {schedule!r}; use one of {', '.join(SCHEDULES)}")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a regular file nor a folder")
    files = [path] if path.is_file() else weights_in(path) if path.is_dir() else []
    if not files or (path / "model_index.json").exists():
        files = _find_in_diffusers_folder(path, text_encoders)
    else:
        files = _find_single_files(path, files, text_encoders, schedule)
    generation_defaults(files.index, guidance_embeds=False)  # malformed ones are refused here
    files = files if schedule is None else _with_schedule(files, schedule, text_encoders)
    check_fit(_configs(files.paths))
    return files


def _find_single_files(
    path: Path, files: list[Path], text_encoders: Path | str | None, schedule: str | None
) -> ModelFiles:
    if path.is_file() and (beside := path.parent / "ae.safetensors") not in files:
        files += [beside] * beside.exists()
    paths, guidance = _classify(path, files)
    paths |= _inside(paths["transformer"])
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
    if not guidance and schedule is None:
        warnings.warn(
            f"{path.name} has no guidance embedding, so it is sampled as FLUX.1-schnell is, in 4 "
            "steps by default; say so if it was made for another schedule (schedule)",
            stacklevel=3,
        )
    return ModelFiles(
        paths=paths,
        index=FLUX_INDEX,
        scheduler=flux_scheduler(guidance),
        schedule="FLUX.1-dev's" if guidance else "FLUX.1-schnell's",
    )


def _inside(file: Path) -> dict[str, Path]:
    """Return the file for each component that it holds whole beside a transformer."""
    found, names = {}, open_checkpoint(file).shapes
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if find_prefix(names, _TELLING[name], file) is None:
            continue
        with contextlib.suppress(CheckpointError):  # what isn't whole comes from elsewhere
            _OPENERS[name](file)
            found[name] = file
    return found


def _with_schedule(
    files: ModelFiles, schedule: str, text_encoders: Path | str | None
) -> ModelFiles:
    """Return a model's files with another schedule, and the number of steps that goes with it."""
    if schedule == "folder" and text_encoders is None:
        return files  # of a diffusers folder it is the model's own
    if schedule == "folder":
        folder = Path(text_encoders) / "scheduler"
        scheduler = read_json(folder / _SCHEDULER_CONFIG)
        dev = _folder_scheduler(folder).use_dynamic_shifting
    else:
        dev = schedule == "dev"
        scheduler = flux_scheduler(dev)
    steps = {"num_inference_steps": _STEPS[dev]}
    return dataclasses.replace(
        files,
        paths={name: path for name, path in files.paths.items() if name != "scheduler"},
        index=files.index | {_DEFAULTS_KEY: files.index.get(_DEFAULTS_KEY, {}) | steps},
        scheduler=scheduler,
        schedule=f"that of {text_encoders}" if schedule == "folder" else f"FLUX.1-{schedule}'s",
    )


def model_name(path: Path | str) -> str:
    """Return what to call a model: the name of its file or folder, of a cache's the repository.

    Links aren't followed: in the Hugging Face cache they lead to files that a hash names.
    """
    path = Path(os.path.abspath(path))
    for folder in path.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            repository = folder.parent.name.removeprefix("models--").replace("--", "/")
            return repository if path.parent == folder else f"{repository}/{path.name}"
    return path.name


def _configs(paths: Mapping[str, Path]) -> dict[str, Any]:
    """Return the config of each model that is there in 16 bits."""
    configs = {}
    for name in _MODULES:
        path = paths.get(name)
        if path is None or not path.exists():
            continue
        if path.is_file():
            configs[name] = _file_config(name, path)
        elif (path / "config.json").exists():
            configs[name] = _folder_config(path / "config.json")
    kinds = {"transformer": FluxConfig, "vae": AutoencoderKLConfig}
    kinds |= {"text_encoder": CLIPTextConfig, "text_encoder_2": T5Config}
    for name, config in configs.items():
        if not isinstance(config, kinds[name]):
            raise CheckpointError(f"{paths[name]} is no {name} of FLUX.1: {type(config).__name__}")
    return configs


def _folder_config(file: Path) -> Any:
    values = read_json(file)
    with _naming(file):
        return component_config(values)


@contextlib.contextmanager
def _naming(source: Path | str) -> Iterator[None]:
    """Put where it comes from before an error about a config."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _folder_scheduler(folder: Path) -> FlowMatchEulerScheduler:
    values = read_json(folder / _SCHEDULER_CONFIG)
    with _naming(folder / _SCHEDULER_CONFIG):
        return FlowMatchEulerScheduler.from_json(values)


def _file_config(name: str, file: Path) -> Any:
    checkpoint = open_checkpoint(file)
    if name == "transformer":
        return flux_params.config_from_bfl(select_bfl_transformer(checkpoint).shapes, file)
    if name == "vae":
        return vae_params.config_from_bfl(
            vae_params.select_bfl_autoencoder(checkpoint).shapes, file
        )
    if name == "text_encoder":
        return clip.config_from_shapes(clip.select_clip(checkpoint).shapes, file)
    return t5.config_from_shapes(t5.select_t5(checkpoint).shapes, file)


def open_component(
    path: Path | str,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    component: str | None = None,
    check_values: bool = False,
) -> StoredModule:
    """Open one model without reading its parameters, unless that is asked for.

    Args:
      path: a folder such as `<model>/transformer`, with a config.json whose `_class_name`
        (diffusers) or `architectures` (transformers) decides; or a file in Black Forest Labs'
        naming, or an index of its shards.
      dtype: of the parameters and the computation.
      component: which one of a file that holds several, such as "vae"; None for the transformer,
        or else the autoencoder.
      check_values: read every parameter once and refuse what isn't finite in bfloat16, before any
        work is done with the model.

    Raises:
      CheckpointError: the class is unknown, or a file or tensor can't be used.
    """
    path = Path(path)
    if path.is_file():
        opened = _file_opener(path, component)(path, dtype=dtype)
    else:
        config = read_json(path / "config.json")
        if _class_name(config) not in _CLASSES:
            raise CheckpointError(f"{path / 'config.json'}: {_unsupported(config)}")
        opened = _CLASSES[_class_name(config)][0](path, dtype=dtype)
    if check_values:
        opened.check_values()
    return opened


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
    if (Path(path) / _SCHEDULER_CONFIG).exists():
        return _folder_scheduler(Path(path))
    return open_component(path, dtype).load(dtype)


def export_component(
    module: nnx.Module, folder: Path | str, dtype: jnp.dtype = jnp.bfloat16
) -> None:
    """Write a model as the folder that diffusers or transformers, and `open_component`, read.

    Args:
      module: a transformer, autoencoder or text encoder of FLUX.1.
      folder: made if absent.
      dtype: floating dtype that every tensor is stored in.

    Raises:
      ValueError: the module is of another class.
    """
    exporters = {
        FluxTransformer: export_flux_transformer,
        AutoencoderKL: export_autoencoder_kl,
        CLIPTextEncoder: clip.export_clip_text_encoder,
        T5Encoder: t5.export_t5_encoder,
    }
    if type(module) not in exporters:
        known = ", ".join(kind.__name__ for kind in exporters)
        raise ValueError(f"module is a {type(module).__name__}; expected one of {known}")
    exporters[type(module)](module, folder, dtype)


def load_pipeline(
    path: Path | str,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    text_encoders: Path | str | None = None,
    schedule: str | None = None,
    **given: nnx.Module | None,
) -> FluxPipeline:
    """Load a FLUX.1 model.

    Args:
      path: as for `find_model`, like `text_encoders` and `schedule`.
      dtype: of every model's parameters and computation.
      text_encoders: gives what `path` lacks.
      schedule: "dev", "schnell", "folder", or None for the model's own.
      **given: components by name, such as `transformer`, to use in place of the files' (quantized
        ones, say); theirs aren't read. None is as if it weren't given.

    Raises:
      CheckpointError: this is no FLUX model, or a component is missing, can't be used or doesn't
        fit the others.
    """
    given = {name: module for name, module in given.items() if module is not None}
    if unknown := set(given) - set(_MODULES):
        raise TypeError(f"load_pipeline has no argument {', '.join(sorted(unknown))}")
    files = find_model(path, text_encoders, schedule)
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
    configs = _configs(files.paths) | {
        name: module.config
        for name, module in given.items()
        if isinstance(getattr(module, "config", None), _CONFIGS)
    }
    check_fit(configs, parts)
    parts |= {
        name: given[name] if name in given else files.open(name, dtype).load(dtype)
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
      CheckpointError: an unknown key, or a value of wrong type or range.
    """
    given = index.get(_DEFAULTS_KEY, {})
    if not isinstance(given, dict):
        raise CheckpointError(f"model_index.json: {_DEFAULTS_KEY} is {given!r}, no JSON object")
    known = {field.name for field in dataclasses.fields(GenerationDefaults)}
    if unknown := sorted(set(given) - known):
        raise CheckpointError(f"model_index.json: {_DEFAULTS_KEY} has unknown keys {unknown}")
    values = {"num_inference_steps": _STEPS[guidance_embeds], **given}
    sides, scales = ("height", "width"), ("guidance_scale", "true_cfg_scale")
    with _naming(f"model_index.json: {_DEFAULTS_KEY}"):
        defaults = config_from_json(GenerationDefaults, values)
        check_bounds(defaults, num_inference_steps=(1, 10**5), strength=(1e-6, 1))
        check_bounds(defaults, **dict.fromkeys(sides, (1, LONGEST_SIDE)))
        check_bounds(defaults, **dict.fromkeys(scales, (-1e30, 1e30)))
    return defaults


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
        checkpoint = open_checkpoint(file)
        names = checkpoint.shapes
        kinds.append(f"{file.name} is {_family(names)}")
        if quantized_by(names):
            continue
        if is_bfl_transformer(names):
            found["transformer"].append(file)
            names = select_bfl_transformer(checkpoint).shapes
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


def _file_opener(file: Path, component: str | None) -> Callable[..., StoredModule]:
    names = open_checkpoint(file).shapes
    refuse_quantized(file, names, {})
    for name in (component,) if component else ("transformer", "vae"):
        if find_prefix(names, _TELLING[name], file) is not None:
            return _OPENERS[name]
    raise CheckpointError(f"{file} is {_family(names)}; expected a FLUX.1 {component or 'file'}")


def _family(names: Mapping[str, object]) -> str:
    """Say what a checkpoint seems to be, from its tensors' names."""
    if format_ := quantized_by(names):
        return f"quantized already, by {format_}: give the 16-bit model"
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
    names = [config.get("_class_name")]
    if isinstance(config.get("architectures"), list):
        names += config["architectures"]
    return next((name for name in names if isinstance(name, str)), None)


def _unsupported(config: Mapping[str, Any]) -> str:
    known = ", ".join(_CLASSES)
    return f"class {_class_name(config)} is not supported; expected one of {known}"
