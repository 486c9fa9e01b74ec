"""From a model's files to a sampler or to one of its components.

A model is a diffusers folder, or a file or folder of single files in their makers' naming, which
carry the transformer and perhaps the autoencoder and text encoders; a diffusers folder then brings
the rest. What a file is, the names of its tensors tell. That the components fit each other is
checked when a model is found, from their configs alone.
"""

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models import families
from models.checkpoint_io import StoredModule, check_bounds, config_from_json
from models.component import Component
from models.family import LONGEST_SIDE, Family, GenerationDefaults, Schedule
from models.fit import check_fit
from models.sampler import Sampler
from models.schedulers import Scheduler, scheduler_from_json
from models.stored_files import (
    CheckpointError,
    open_checkpoint,
    quantized_by,
    read_json,
    refuse_quantized,
    weights_in,
)
from models.tokenizers import load_tokenizer

_SCHEDULER_CONFIG = "scheduler_config.json"
_FOLDER = "folder"  # the schedule of the folder that gives the text encoders
# Our own key in model_index.json; diffusers ignores keys that start with an underscore. A model
# that gives height and width there is made for that size alone.
_DEFAULTS_KEY = "_generation_defaults"
# Names that tell what is no component of a known family, tried in this order.
_FOREIGN = {
    r"(.+\.)?input_blocks\..*|down_blocks\..*": "a Stable Diffusion U-Net",
    r".*lora.*": "a LoRA adapter",
    r"(.+\.)?encoder\.layers\..*": "a CLIP text encoder",
    r"(.+\.)?encoder\.block\..*": "a T5 encoder",
    r"(.+\.)?(single_)?transformer_blocks\..*": "a transformer of diffusers, without its "
    "config.json: give the model's folder",
    r"(en|de)coder\.(down_blocks|mid_block|up_blocks)\..*": "an autoencoder of diffusers: give the "
    "model's folder",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where the components of a model lie."""

    family: Family
    paths: dict[str, Path]  # component or tokenizer to its folder, or to a single file
    index: dict[str, Any]  # contents of model_index.json
    scheduler: dict[str, Any] | None = None  # scheduler_config.json, where paths has no scheduler
    schedule: str = "the model's own"  # in words, whose noise levels and number of steps are taken
    home: Path | None = None  # the folder that the index is of; None for single files

    def load_scheduler(self) -> Scheduler:
        """Return the scheduler; raises CheckpointError for one of models that predict otherwise."""
        if self.scheduler is not None:
            found = scheduler_from_json(self.scheduler)
        else:
            found = _folder_scheduler(self.paths["scheduler"])
        first = next(iter(self.family.schedules.values()))
        if found.along != (wanted := scheduler_from_json(first.scheduler).along):
            raise CheckpointError(
                f"scheduler {type(found).__name__} goes along {found.along}, and "
                f"{self.family.name} predicts {wanted}; take one such as "
                f"{first.scheduler['_class_name']}"
            )
        return found

    def open(
        self, name: str, dtype: jnp.dtype = jnp.bfloat16, *, check_values: bool = False
    ) -> StoredModule:
        """Open a model by its component's name; see `open_component`."""
        path, component = self.paths[name], self.family.components[name]
        if not path.is_file():
            component = _folder_component(path, component)
        return _checked(component.open(path, dtype), check_values)

    def load_tokenizers(self) -> dict[str, Any]:
        """Return the tokenizers that are there; raises CheckpointError where one doesn't load."""
        names = (name for name in self.family.tokenizers if name in self.paths)
        return {name: load_tokenizer(self.paths[name]) for name in names}

    def configs(self) -> dict[str, Any]:
        """Return the config of each component that is there in 16 bits.

        Raises:
          CheckpointError: a config can't be used, or is another component's.
        """
        configs = {}
        for name, component in self.family.components.items():
            path = self.paths.get(name)
            if path is None or not path.exists():
                continue
            if path.is_file():
                configs[name] = component.file_config(path)
            elif (path / "config.json").exists():
                configs[name] = _folder_config(path / "config.json", component)
            if name in configs and not isinstance(configs[name], component.config):
                kind = type(configs[name]).__name__
                raise CheckpointError(f"{path} is no {name} of {self.family.name}: {kind}")
        return configs

    def index_configs(self) -> Mapping[str, Any]:
        """Return what the family's denoiser needs of model_index.json, by name."""
        with _naming("model_index.json"):
            return self.family.index_configs(self.index)

    @property
    def only_size(self) -> tuple[int, int] | None:
        """Width and height, in pixels, of a model that draws one size; None for one of many."""
        return _only_size(self.index)

    def defaults(self, configs: Mapping[str, Any]) -> GenerationDefaults:
        """Return what the model generates with by default; see `generation_defaults`."""
        known = {**configs, "scheduler": self.load_scheduler()}
        return generation_defaults(self.index, self.family, known)


def find_model(
    path: Path | str,
    text_encoders: Path | str | None = None,
    schedule: str | None = None,
) -> ModelFiles:
    """Find the components of a model.

    Args:
      path: a diffusers folder, with model_index.json; or a single file in its makers' naming such
        as flux1-dev.safetensors, an index of its shards, or a folder of such files. Beside a single
        file, the autoencoder is taken too if it is there (ae.safetensors).
      text_encoders: a diffusers folder that gives what `path` lacks: of single files the text
        encoders and tokenizers, and perhaps the autoencoder. Without it that is left out of the
        paths: a transformer alone can be converted, though not sampled from.
      schedule: the noise levels and the number of steps that are the default: one of the family's,
        as FLUX.1's "dev" or "schnell", or that of the "folder" that gives the text encoders. None
        for the model's own; single files have none, and take what the family finds to go with their
        sizes, with a warning where it is a guess.

    Raises:
      ValueError: the schedule is none of these.
      CheckpointError: it is no model of a known family, a component is missing, or the components
        don't fit each other.
    """
    path = Path(path)
    if schedule is not None and schedule not in (known := families.schedules()):
        raise ValueError(f"schedule is {schedule!r}; use one of {', '.join(known)}")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a regular file nor a folder")
    files = [path] if path.is_file() else weights_in(path) if path.is_dir() else []
    if not files or (path / "model_index.json").exists():
        found = _find_in_diffusers_folder(path, text_encoders)
    else:
        found = _find_single_files(path, files, text_encoders, schedule)
    _own_defaults(found.index)  # malformed ones are refused here
    found.index_configs()
    found = found if schedule is None else _with_schedule(found, schedule, text_encoders)
    check_fit(found.family, found.configs())
    return found


def _find_single_files(
    path: Path, files: list[Path], text_encoders: Path | str | None, schedule: str | None
) -> ModelFiles:
    family = _family_of(path, files, schedule)
    if path.is_file() and (beside := path.parent / family.autoencoder_file) not in files:
        files = [*files, beside] if beside.exists() else files
    paths = _classify(path, files, family)
    paths |= _inside(family, paths[family.main])
    needed = (*family.encoders, family.autoencoder, family.main, *family.tokenizers)
    missing = [name for name in needed if name not in paths]
    paths |= _from_elsewhere(missing, text_encoders)
    main = family.components[family.main].file_config(paths[family.main])
    name, guess = family.schedule_of({family.main: main}, family.index)
    if guess is not None and schedule is None:
        warnings.warn(f"{path.name} {guess}", stacklevel=3)
    chosen = family.schedules[name]
    return ModelFiles(
        family=family,
        paths=paths,
        index={**family.index, **chosen.index},
        scheduler=dict(chosen.scheduler),
        schedule=chosen.name,
    )


def _from_elsewhere(names: Sequence[str], text_encoders: Path | str | None) -> dict[str, Path]:
    """Return the folders of components that a diffusers folder gives, if one was named."""
    if text_encoders is None:
        return {}
    folder = Path(text_encoders)
    if absent := [name for name in names if not (folder / name).is_dir()]:
        raise CheckpointError(f"{folder} lacks the component folders {', '.join(absent)}")
    return {name: folder / name for name in names}


def _inside(family: Family, file: Path) -> dict[str, Path]:
    """Return the file for each component that it holds whole beside the main one."""
    found, checkpoint = {}, open_checkpoint(file)
    for name, component in family.components.items():
        if name == family.main or component.file is None:
            continue
        if component.file.prefix(checkpoint.shapes, file) is None:
            continue
        with contextlib.suppress(CheckpointError):  # what isn't whole comes from elsewhere
            component.open(file)
            found[name] = file
    return found


def _with_schedule(
    files: ModelFiles, schedule: str, text_encoders: Path | str | None
) -> ModelFiles:
    """Return a model's files with another schedule, and the settings that go with it."""
    family = files.family
    if schedule == _FOLDER and text_encoders is None:
        if files.scheduler is None:
            return files  # of a diffusers folder it is the model's own
        raise CheckpointError("schedule is 'folder'; name the folder (--text-encoders)")
    if schedule == _FOLDER:
        folder = Path(text_encoders or "") / "scheduler"
        scheduler = read_json(folder / _SCHEDULER_CONFIG)
        file = folder.parent / "model_index.json"
        index = read_json(file) if file.exists() else {}
        chosen = family.schedules[family.schedule_like(_folder_scheduler(folder), index)]
        words = f"that of {text_encoders}"
    elif schedule in family.schedules:
        chosen = family.schedules[schedule]
        scheduler, words = dict(chosen.scheduler), chosen.name
    else:
        known = ", ".join((*family.schedules, _FOLDER))
        raise ValueError(f"schedule is {schedule!r}; of {family.name}, use one of {known}")
    return dataclasses.replace(
        files,
        paths={name: path for name, path in files.paths.items() if name != "scheduler"},
        index=_with_defaults(files.index, chosen),
        scheduler=scheduler,
        schedule=words,
    )


def _with_defaults(index: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    defaults = {**index.get(_DEFAULTS_KEY, {}), **schedule.defaults}
    return {**index, **schedule.index, _DEFAULTS_KEY: defaults}


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


def _folder_config(file: Path, expected: Component) -> Any:
    values = read_json(file)
    with _naming(file):
        return families.of_config(values, expected).config.from_json(values)


def _folder_component(folder: Path, expected: Component | None = None) -> Component:
    """Return what a folder's config.json says it holds; see `families.of_class`."""
    values = read_json(folder / "config.json")
    with _naming(folder / "config.json"):
        return families.of_config(values, expected)


@contextlib.contextmanager
def _naming(source: Path | str) -> Iterator[None]:
    """Put where it comes from before an error about a config."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _folder_scheduler(folder: Path) -> Scheduler:
    values = read_json(folder / _SCHEDULER_CONFIG)
    with _naming(folder / _SCHEDULER_CONFIG):
        return scheduler_from_json(values)


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
        (diffusers) or `architectures` (transformers) decides, and the model_index.json beside it
        where families read a class differently; or a single file in its makers' naming, or an index
        of its shards.
      dtype: of the parameters and the computation.
      component: which one of a file that holds several, such as "vae"; None for the family's main
        one, or else the autoencoder.
      check_values: read every parameter once and refuse what isn't finite in bfloat16, before any
        work is done with the model.

    Raises:
      CheckpointError: the class is unknown, or a file or tensor can't be used.
    """
    path = Path(path)
    if path.is_file():
        return _checked(_component_of_file(path, component).open(path, dtype), check_values)
    found = _folder_component(path, _expected(path))
    return _checked(found.open(path, dtype), check_values)


def _expected(folder: Path) -> Component | None:
    """Return what the model_index.json beside a component's folder says it is; None without one."""
    index = folder.parent / "model_index.json"
    values = read_json(index) if index.exists() else {}
    with contextlib.suppress(CheckpointError):  # a model of another family, or no model
        return families.of_index(values).components.get(folder.name)
    return None


def _checked(opened: StoredModule, check_values: bool) -> StoredModule:
    if check_values:
        opened.check_values()
    return opened


def build_component(
    config: Mapping[str, Any],
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    expected: Component | None = None,
) -> nnx.Module:
    """Make a model for tracing only, as under `nnx.eval_shape`: its weights mean nothing.

    Args:
      config: contents of its config.json.
      dtype: of the parameters and the computation.
      expected: the component that it is in its family, if it is of one: see `families.of_class`.

    Raises:
      CheckpointError: the class is unknown.
    """
    component = families.of_config(config, expected)
    return component.build(component.config.from_json(config), dtype)


def component_config(config: Mapping[str, Any], expected: Component | None = None) -> Any:
    """Return a model's config, such as a FluxConfig, from the contents of its config.json.

    Args:
      config: the contents.
      expected: as for `build_component`.

    Raises:
      CheckpointError: the class is unknown.
    """
    return families.of_config(config, expected).config.from_json(config)


def load_component(path: Path | str, dtype: jnp.dtype = jnp.bfloat16) -> nnx.Module | Scheduler:
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
      module: a component of a known family.
      folder: made if absent.
      dtype: floating dtype that every tensor is stored in.

    Raises:
      ValueError: the module is of another class.
    """
    families.of_module(module).export(module, folder, dtype)


def load_pipeline(
    path: Path | str,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    text_encoders: Path | str | None = None,
    schedule: str | None = None,
    **given: nnx.Module | None,
) -> Sampler:
    """Load a model.

    Args:
      path: as for `find_model`, like `text_encoders` and `schedule`.
      dtype: of every model's parameters and computation.
      text_encoders: gives what `path` lacks.
      schedule: one of the family's such as "dev", "folder", or None for the model's own.
      **given: components by name, such as `transformer`, to use in place of the files' (quantized
        ones, say); theirs aren't read. None is as if it weren't given.

    Raises:
      CheckpointError: this is no model of a known family, or a component is missing, can't be used
        or doesn't fit the others.
    """
    given = {name: module for name, module in given.items() if module is not None}
    files = find_model(path, text_encoders, schedule)
    family = files.family
    if unknown := set(given) - set(family.components):
        raise TypeError(f"load_pipeline has no argument {', '.join(sorted(unknown))}")
    wanted = (x for x in (*family.components, *family.tokenizers, "scheduler") if x not in given)
    lacking = [
        name
        for name in wanted
        if not (name in files.paths and files.paths[name].exists())
        and not (name == "scheduler" and files.scheduler)
    ]
    if lacking:
        raise CheckpointError(
            f"{path} lacks the component folders {', '.join(lacking)}; name a diffusers folder "
            "that has them (--text-encoders)"
        )

    tokenizers = files.load_tokenizers()
    check_fit(family, files.configs() | _given_configs(family, given), tokenizers)
    models = {
        name: given[name] if name in given else files.open(name, dtype).load(dtype)
        for name in family.components
    }
    return Sampler(
        family=family,
        models=models,
        tokenizers=tokenizers,
        scheduler=files.load_scheduler(),
        index_configs=files.index_configs(),
        defaults=files.defaults({name: getattr(x, "config", None) for name, x in models.items()}),
        only_size=files.only_size,
    )


def _given_configs(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configs of components that stand in place of files'; other classes have none.

    Raises:
      CheckpointError: one was read for another family, which takes other things of it.
    """
    known, configs = families.configs(), {}
    for name, module in given.items():
        config, wanted = getattr(module, "config", None), family.components[name].config
        if type(config) is wanted:
            configs[name] = config
        elif type(config) in known:
            raise CheckpointError(
                f"the given {name} has a {type(config).__module__}.{type(config).__name__}, and "
                f"{family.name} takes a {wanted.__module__}.{wanted.__name__}; load it from a "
                f"folder of {family.name}, or with its component"
            )
    return configs


def generation_defaults(
    index: Mapping[str, Any], family: Family, configs: Mapping[str, Any]
) -> GenerationDefaults:
    """Return what a model generates with by default.

    What its model_index.json leaves out is that of the family's schedule for such sizes: FLUX.1
    without guidance embedding is schnell, which is made for 4 steps.

    Args:
      index: contents of model_index.json.
      family: of the model.
      configs: of its components by name, the main one among them; and perhaps its scheduler.

    Raises:
      CheckpointError: an unknown key, or a value of wrong type or range.
    """
    name, _ = family.schedule_of(configs, index)
    told = {**family.schedules[name].defaults, **family.defaults_of(configs)}
    return _defaults({**told, **_own_defaults(index)})


def _own_defaults(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return what model_index.json says of generation, checked."""
    given = index.get(_DEFAULTS_KEY, {})
    if not isinstance(given, dict):
        raise CheckpointError(f"model_index.json: {_DEFAULTS_KEY} is {given!r}, no JSON object")
    known = {field.name for field in dataclasses.fields(GenerationDefaults)}
    if unknown := sorted(set(given) - known):
        raise CheckpointError(f"model_index.json: {_DEFAULTS_KEY} has unknown keys {unknown}")
    _defaults(given)
    return given


def only_size(folder: Path | str) -> tuple[int, int] | None:
    """Return what `ModelFiles.only_size` is, from a folder's model_index.json alone.

    None also for a folder without one, such as a checkpoint of one component.

    Raises:
      CheckpointError: it can't be used.
    """
    path = Path(folder) / "model_index.json"
    return _only_size(read_json(path)) if path.exists() else None


def _only_size(index: Mapping[str, Any]) -> tuple[int, int] | None:
    own = _own_defaults(index)
    return (own["width"], own["height"]) if {"width", "height"} <= set(own) else None


def _defaults(values: Mapping[str, Any]) -> GenerationDefaults:
    sides, scales = ("height", "width"), ("guidance_scale", "true_cfg_scale")
    with _naming(f"model_index.json: {_DEFAULTS_KEY}"):
        defaults = config_from_json(GenerationDefaults, values)
        check_bounds(defaults, num_inference_steps=(1, 10**5), strength=(1e-6, 1))
        check_bounds(defaults, **dict.fromkeys(sides, (1, LONGEST_SIDE)))
        check_bounds(defaults, **dict.fromkeys(scales, (-1e30, 1e30)))
    return defaults


def _find_in_diffusers_folder(folder: Path, text_encoders: Path | str | None) -> ModelFiles:
    index = read_json(folder / "model_index.json")
    with _naming(folder / "model_index.json"):
        family = families.of_index(index)
    names = (*family.components, *family.tokenizers, "scheduler")
    paths = {name: folder / name for name in names}
    missing = [name for name, path in paths.items() if not path.exists()]
    if text_encoders is not None and not missing:
        raise CheckpointError(f"{folder} has text encoders; leave out --text-encoders")
    paths |= _from_elsewhere(missing, text_encoders)
    return ModelFiles(family=family, paths=paths, index=index, home=folder)


def _family_of(path: Path, files: list[Path], schedule: str | None) -> Family:
    """Return the family whose main component is in one of the files."""
    kinds = []
    for file in files:
        checkpoint = open_checkpoint(file)
        names = checkpoint.shapes
        if not quantized_by(names) and (family := families.of_file(file, checkpoint, schedule)):
            return family
        kinds.append(f"{file.name} is {_kind(names)}")
    mains = (family.components[family.main] for family in families.FAMILIES)
    known = " or ".join(dict.fromkeys(main.name for main in mains if main.file))
    raise CheckpointError(f"{path} holds no {known}: {'; '.join(kinds)}")


def _classify(path: Path, files: list[Path], family: Family) -> dict[str, Path]:
    """Return component to file, of what stands in a file of its own."""
    found: dict[str, list[Path]] = {}
    for file in files:
        names = open_checkpoint(file).shapes
        if quantized_by(names):
            continue
        for name in (family.main, family.autoencoder):
            naming = family.components[name].file
            if naming is not None and naming.prefix(names, file) is not None:
                found.setdefault(name, []).append(file)
                break
    for name, several in found.items():
        if len(several) > 1:
            listed = ", ".join(file.name for file in several)
            raise CheckpointError(f"{path} holds several of {name}: {listed}; name one file")
    return {name: files[0] for name, files in found.items()}


def _component_of_file(file: Path, name: str | None) -> Component:
    """Return the component that a single file holds."""
    checkpoint = open_checkpoint(file)
    names = checkpoint.shapes
    refuse_quantized(file, names, {})
    family = families.of_file(file, checkpoint)
    for known in (family,) if family else families.FAMILIES:
        for wanted in (name,) if name else (known.main, known.autoencoder):
            component = known.components.get(wanted)
            if component and component.file and component.file.prefix(names, file) is not None:
                return component
    listed = " or ".join(dict.fromkeys(x.components[x.main].name for x in families.FAMILIES))
    raise CheckpointError(f"{file} is {_kind(names)}; expected a {name or listed}")


def _kind(names: Collection[str]) -> str:
    """Say what a checkpoint seems to be, from its tensors' names."""
    if format_ := quantized_by(names):
        return f"quantized already, by {format_}: give the 16-bit model"
    for pattern, kind in _FOREIGN.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    for component in families.components():
        if component.file and component.file.prefix(names) is not None:
            return f"{'an' if component.name[0] in 'aeiou' else 'a'} {component.name}"
    return f"of an unknown kind, with tensors such as {', '.join(sorted(names)[:3])}"
