"""Quantized checkpoints: a model folder with packed components, and quartz.json beside them.

Layout of a checkpoint folder, version 3:
  quartz.json         what `Manifest` holds, and a hash of it
  transformer/        a quantized component, one Orbax checkpoint a part: a block, or "other" for
    double_blocks.0/  all outside of blocks. A part is a flat dict from "path.of.module.leaf" to
    ...               array: of a quantized layer weight.codes, weight.scale and such, and what its
    other/            ops hold, ops.0.factor and such, as they are in memory; 16-bit floats else
  text_encoder_2/     the same, if it is quantized too
  everything else     the base model's other components, as diffusers lays them out
Version 2 had no ops, no hashes of what is carried along, and 4-bit integers under other names.
Version 1 had one component, the transformer, as a single Orbax checkpoint. Both still load.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from quartz_jax import schema
from quartz_jax.conversion.model import (
    abstract_quantized,
    check_folded,
    check_unplaced,
    leaf_name,
    part_of,
    stored_arrays,
)
from quartz_jax.conversion.report import Report
from quartz_jax.io.files import (
    atomic_file,
    atomic_folder,
    check_apart,
    check_output,
    copy_synced,
    hash_file,
    hash_files,
    is_system_file,
    read_json,
    recover_folder,
    sync,
    tree_bytes,
    unchanged,
)
from quartz_jax.recipes.recipe import Recipe

M = TypeVar("M", bound=nnx.Module)

FORMAT_VERSION = 3
TRANSFORMER = "transformer"
_MANIFEST = "quartz.json"
_PARTS_AT_ONCE = 4  # that are read: Orbax spends half its time in Python, the rest in threads
# Files of the base that travel with its components; others may be large single-file weights.
TEXTS = ("*.json", "*.md", "*.txt", "LICENSE*", "NOTICE*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """What statistics of a component's inputs were gathered from."""

    prompts_sha256: str  # of the prompts, one a line
    samples: int  # calls of the model
    steps: tuple[int, ...]  # of sampling, those that calls were taken at
    seed: int  # of the noise
    propagate: bool  # whether blocks saw what the quantized blocks before them made
    size: tuple[int, int] | None = None  # width and height of images; None where there are none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A quantized component of a checkpoint."""

    recipe: Recipe  # that it was quantized with
    report: Report  # formats, errors and sizes of its layers
    config: dict[str, Any]  # its config.json
    # of the 16-bit model's safetensors files, see `hash_files`; "" for one that was in memory only
    base_sha256: str
    parts: dict[str, str]  # part to the SHA-256 of its files; "" for the component's own folder
    calibration: CalibrationRecord | None = None  # None where the recipe needs none

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        nested = {"recipe": self.recipe.to_json(), "report": self.report.to_json()}
        return schema.to_json(self) | nested

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Undo `to_json`; raises ValueError for a missing, unknown or malformed field."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or not names - {"calibration"} <= set(value) <= names:
            raise ValueError("a component has missing or unknown fields")
        if not value["parts"]:
            raise ValueError("a component has no parts")
        found = value.get("calibration")
        return cls(
            recipe=Recipe.from_json(value["recipe"]),
            report=Report.from_json(value["report"]),
            config=schema.from_json(dict[str, Any], value["config"], "config"),
            base_sha256=schema.from_json(str, value["base_sha256"], "base_sha256"),
            parts=schema.from_json(dict[str, str], value["parts"], "parts"),
            calibration=found and schema.from_json(CalibrationRecord, found, "calibration"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of quartz.json."""

    components: dict[str, Component]  # the quantized ones, by folder
    base_name: str  # name of the 16-bit model's folder or file
    library_version: str  # of quartz-jax when it was written
    # of everything else in the folder, by name: the SHA-256 of a file, or `hash_files` of a folder
    carried: dict[str, str] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def main(self) -> str:
        """The component that is told of first: the transformer, or what there is."""
        return TRANSFORMER if TRANSFORMER in self.components else next(iter(self.components))

    @property
    def recipe(self) -> Recipe:
        """The main component's recipe."""
        return self.components[self.main].recipe

    @property
    def report(self) -> Report:
        """The main component's report."""
        return self.components[self.main].report

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with a hash of itself."""
        components = {name: component.to_json() for name, component in self.components.items()}
        value = schema.to_json(self) | {"components": components}
        return value | {"sha256": _hash_json(value)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Undo `to_json`; raises ValueError for a newer version or a malformed or changed field."""
        version = value.get("format_version") if isinstance(value, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version is {version!r}; expected 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version}, but this quartz-jax reads up to {FORMAT_VERSION}; "
                "install a newer one"
            )
        value = _from_version_1(value) if version == 1 else dict(value)
        if version >= 3 and value.pop("sha256", None) != _hash_json(value):
            raise ValueError("it was changed since it was written: its sha256 isn't its own")
        names = {field.name for field in dataclasses.fields(cls)}
        names -= {"carried"} if version < 3 else set()
        if set(value) != names:
            odd = ", ".join(sorted(names ^ set(value)))
            raise ValueError(f"missing or unknown fields: {odd}")
        if not isinstance(value["components"], dict) or not value["components"]:
            raise ValueError("components must be a JSON object with at least one model")
        components = {
            name: Component.from_json(component) for name, component in value["components"].items()
        }
        hints: dict[str, Any] = {"base_name": str, "library_version": str}
        hints |= {"carried": dict[str, str]}
        read: dict[str, Any] = {
            name: schema.from_json(hints[name], value[name], name) for name in names & {*hints}
        }
        parts = [part for component in components.values() for part in component.parts if part]
        _check_names([*components, *parts, *read.get("carried", ())])
        return cls(**value | read | {"components": components})


def _check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that would lead out of the checkpoint's folder."""
    for name in names:
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name) or Path(name).drive:
            raise ValueError(f"{name!r} is no name of a file or folder in it")


def is_checkpoint(folder: Path | str) -> bool:
    """Return whether a folder is a quantized checkpoint of any version."""
    return (Path(folder) / _MANIFEST).exists()


def check_target(folder: Path, inputs: Iterable[Path] = (), *, overwrite: bool = False) -> None:
    """Check before any work that a checkpoint can be made, without leaving a trace.

    Args:
      folder: the checkpoint.
      inputs: files and folders that it is made from.
      overwrite: whether it may exist already; an empty folder may then be there too.

    Raises:
      ValueError: it exists and may not, is no checkpoint, can't be written, or an input is in it.
    """
    check_output(folder, folder=True, overwrite=overwrite, is_ours=is_checkpoint)
    check_apart(folder, inputs)


def read_manifest(folder: Path | str) -> Manifest:
    """Read quartz.json.

    Raises:
      ValueError: it is absent, malformed or of a newer version.
    """
    path = Path(folder) / _MANIFEST
    try:
        return Manifest.from_json(read_json(path))
    except NotADirectoryError:
        raise ValueError(f"{folder} is a file; expected the folder of a checkpoint") from None
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a quantized checkpoint") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be used: {error}") from None


def write_manifest(folder: Path, base_name: str, components: dict[str, Component]) -> Manifest:
    """Write quartz.json, which makes a folder a checkpoint, and return its contents.

    What else the folder holds by then is hashed, but for files of operating systems.
    """
    carried = {
        path.name: hash_files(path, "*") if path.is_dir() else hash_file(path)
        for path in sorted(folder.iterdir())
        if path.name not in components and path.name != _MANIFEST and not is_system_file(path)
    }
    manifest = Manifest(
        components=components,
        base_name=base_name,
        library_version=_library_version(),
        carried=carried,
    )
    with atomic_file(folder / _MANIFEST) as partial:
        partial.write_text(json.dumps(manifest.to_json(), indent=2) + "\n", encoding="utf-8")
    return manifest


def check_carried(folder: Path | str, manifest: Manifest) -> None:
    """Raise ValueError unless what a checkpoint carries along is what was written.

    Files that nobody wrote there are left alone, but for parts of a model, which would be taken for
    the checkpoint's. A file that was checked before, and has had the same size and time since,
    isn't read again.
    """
    folder = Path(folder)
    known = {*manifest.components, *manifest.carried}
    for path in sorted(folder.iterdir()) if manifest.format_version >= 3 else ():
        if path.name not in known and _is_of_a_model(path):
            raise ValueError(f"{path} isn't in quartz.json, so it was put there later; remove it")
    for name, sha256 in manifest.carried.items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"{path} is missing; {folder} is incomplete")
        if not unchanged(path, sha256):
            raise ValueError(f"{path} is corrupt or was replaced: its SHA-256 isn't quartz.json's")


def check_contents(folder: Path | str) -> None:
    """Raise ValueError unless all that a checkpoint holds is what was written.

    As `check_carried`, it reads no file again that is as it was when it was checked.
    """
    manifest = read_manifest(folder)
    check_carried(folder, manifest)
    for name, component in manifest.components.items():
        for part, sha256 in component.parts.items():
            path = Path(folder) / name / part
            if not path.is_dir() or not unchanged(path, sha256):
                raise ValueError(_corrupt(path))


def _corrupt(path: Path) -> str:
    return f"{path} is corrupt or incomplete: its SHA-256 isn't quartz.json's"


def _is_of_a_model(path: Path) -> bool:
    """Whether a file or folder is what a pipeline reads."""
    patterns = ("*config.json", "*.safetensors", "tokenizer.json", "vocab.json", "spiece.model")
    inside = any(next(path.glob(pattern), None) for pattern in patterns)
    return path.name == "model_index.json" or inside


def _hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, however it is laid out."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_part(folder: Path, arrays: Mapping[str, np.ndarray | jax.Array]) -> str:
    """Write the arrays of one part and return the SHA-256 of its files.

    Raises:
      OSError: they can't be written.
    """
    arrays = dict(sorted(arrays.items()))
    with _write_errors(folder), _without_brackets(folder) as plain:
        ocp.save(plain, arrays)
    # A path that the writer takes otherwise than the reader leaves a part that nobody can read.
    try:
        found = ocp.metadata(folder.absolute()).metadata or {}
    except (OSError, ValueError) as error:
        raise OSError(f"{folder} can't be read back: {error}") from error
    if {name: x.shape for name, x in found.items()} != {n: x.shape for n, x in arrays.items()}:
        raise OSError(f"{folder} can't be read back; choose a path of plain letters")
    sync(folder)
    return hash_files(folder, "*")


@contextmanager
def _without_brackets(folder: Path) -> Iterator[Path]:
    """Give a path of a folder that is to be made which holds no brackets.

    Orbax searches for what it wrote by a pattern, in which brackets in the path mean something
    else: it would find nothing, and leave a part that nobody can read.
    """
    if "[" not in str(folder.absolute()):
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory() as links:
        link = Path(links) / "link"
        link.symlink_to(folder.absolute().parent, target_is_directory=True)
        yield link / folder.name


def read_part(folder: Path) -> dict[str, jax.Array]:
    """Return the arrays of one part of this version, by dotted path of the model."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = ocp.metadata(folder.absolute()).metadata
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in shapes.items()
    }
    return ocp.load(folder.absolute(), wanted)


def save(
    folder: Path | str,
    model: nnx.Module,
    *,
    recipe: Recipe,
    report: Report,
    base: Path | str,
    component: str = TRANSFORMER,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of a quantized component in memory; `conversion` does without one.

    It is written to a temporary folder beside the final one and renamed: an interrupted save
    leaves nothing under the final name.

    Args:
      folder: the checkpoint to make.
      model: the quantized component.
      recipe: that it was quantized with.
      report: that `quantize_model` returned.
      base: folder of the 16-bit model in the diffusers layout, whose other components are copied.
      component: the model's name in that folder.
      overwrite: replace a checkpoint that exists.

    Raises:
      ValueError: the model is placed or wasn't quantized with the recipe, the folder exists or
        can't be written, or base is no 16-bit model folder or in it.
    """
    check_unplaced(model, recipe, report)
    base, folder = Path(base).resolve(), Path(folder).resolve()
    index = _read_base(base, "model_index.json")
    config = _read_base(base, f"{component}/config.json")
    if not any((base / component).glob("*.safetensors")):
        raise ValueError(f"base {base} has no {component}/*.safetensors; give a 16-bit model")
    carried = carried_files(base, index, component)
    recover_folder(folder)
    check_target(folder, [base / component, *carried], overwrite=overwrite)
    with atomic_folder(folder) as partial:
        for source in carried:
            copy_synced(source, partial / source.name)
        made = Component(
            recipe=recipe,
            report=report,
            config=config,
            base_sha256=hash_files(base / component, "*.safetensors"),
            parts=_write_parts(partial / component, model),
        )
        write_manifest(partial, base.name, {component: made})


def save_model(
    folder: Path | str,
    model: nnx.Module,
    *,
    recipe: Recipe,
    report: Report,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of any quantized model, which `load` reads; nothing else is in it.

    As `save`, it leaves nothing under the final name when it is interrupted.

    Args:
      folder: the checkpoint to make. The model stands in it as its transformer, whatever it is.
      model: the quantized model, not placed. Its float parameters are stored in bfloat16.
      recipe: that it was quantized with.
      report: that `quantize_model` returned.
      config: what `load` hands to `build`, as JSON; None for an empty one.
      overwrite: replace a checkpoint that exists.

    Raises:
      ValueError: the model is placed or holds random keys, config is no JSON object, or the folder
        exists or can't be written.
    """
    for name, array in stored_arrays(nnx.state(model)).items():
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"model holds a random key, {name}, which no checkpoint does; build it without, "
                "for example with a dropout that takes its key in the call"
            )
    check_unplaced(model, recipe, report)
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(config or {})))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be a JSON object: {error}") from None
    folder = Path(folder).resolve()
    recover_folder(folder)
    check_target(folder, overwrite=overwrite)
    with atomic_folder(folder) as partial:
        parts = _write_parts(partial / TRANSFORMER, model)
        component = Component(
            recipe=recipe, report=report, config=plain, base_sha256="", parts=parts
        )
        write_manifest(partial, type(model).__name__, {TRANSFORMER: component})


def _write_parts(folder: Path, model: nnx.Module) -> dict[str, str]:
    """Make a component's folder with a model's arrays; return the hashes of its parts."""
    parts: dict[str, dict[str, jax.Array]] = collections.defaultdict(dict)
    for name, array in stored_arrays(nnx.state(model)).items():
        parts[part_of(name)][name] = array
    folder.mkdir()
    return {name: write_part(folder / name, arrays) for name, arrays in parts.items()}


def carried_files(base: Path, index: Mapping[str, Any], component: str = TRANSFORMER) -> list[Path]:
    """Return the folders and texts of a diffusers model that a checkpoint takes over.

    Args:
      base: the model's folder.
      index: contents of its model_index.json.
      component: what the checkpoint has of its own.
    """
    folders = [
        base / name
        for name, value in index.items()
        if isinstance(value, list) and name != component and (base / name).is_dir()
    ]
    return folders + sorted({file for pattern in TEXTS for file in base.glob(pattern)})


def load(
    folder: Path | str, build: Callable[[dict[str, Any]], M], component: str = TRANSFORMER
) -> tuple[M, Manifest]:
    """Load a quantized component of a checkpoint; its 16-bit weights never exist.

    Args:
      folder: the checkpoint.
      build: makes the 16-bit model from its config.json; only traced, so it costs nothing. What
        stays 16-bit takes the dtypes that it gives.
      component: one of the manifest's components.

    Raises:
      ValueError: there is no such component, or quartz.json or a tensor is missing, misshapen,
        corrupt or of a newer version; or the model states other layers to fold rotations into than
        it did.
    """
    manifest = read_manifest(folder)
    if component not in manifest.components:
        listed = ", ".join(manifest.components)
        raise ValueError(f"{folder} has no quantized {component}; it has {listed}")
    described = manifest.components[component]
    path = Path(folder).absolute() / component
    model = abstract_quantized(lambda: build(described.config), described.recipe)
    check_folded(model, described.report)
    graphdef, state = nnx.split(model)
    stored = _read(path, described.parts, stored_arrays(state))
    filled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: stored[leaf_name(path)].astype(leaf.dtype), nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, filled)
    return nnx.merge(graphdef, state), manifest


def describe(folder: Path | str, *, layers: bool = False) -> str:
    """Return in words what a checkpoint is.

    Args:
      folder: the checkpoint.
      layers: also give a line a layer.

    Raises:
      ValueError: it isn't one, or of a newer version.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    lines = [
        f"{folder}: quantized from {manifest.base_name}, format version "
        f"{manifest.format_version}, written by quartz-jax {manifest.library_version}"
    ]
    total = 0
    for path in sorted(folder.iterdir()):
        size = tree_bytes(path)
        total += size
        if path.name == _MANIFEST:
            lines.append(f"{path.name}: {size:,} bytes")
        elif path.name not in manifest.components:
            lines.append(f"{path.name}: {size:,} bytes, as it was")
        else:
            lines += _describe(path.name, size, manifest.components[path.name], layers)
    return "\n".join([*lines, f"total: {total:,} bytes"])


def _describe(name: str, size: int, component: Component, layers: bool) -> list[str]:
    report = component.report
    return [
        f"{name}: {size:,} bytes, compressed, in {len(component.parts)} parts, recipe "
        f"{component.recipe.name}, base SHA-256 {component.base_sha256}",
        *(f"  {line}" for line in report.summary().splitlines()),
        *(f"  {line}" for line in report.table().splitlines() if layers),
    ]


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Raise an OSError where Orbax raises a ValueError and prints tracebacks of all its threads."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = without_closed_loops
    try:
        yield
        sys.unraisablehook = hook  # after an error it stays: other writes end later, in vain
    except ValueError as error:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's words
            code = int(found[1])
            raise OSError(code, os.strerror(code), str(folder)) from error
        raise OSError(f"{folder}: {error}") from error
    finally:
        logger.setLevel(level)


def _read(
    path: Path,
    parts: Mapping[str, str],  # SHA-256 by name
    expected: Mapping[str, jax.Array | jax.ShapeDtypeStruct],  # only shapes and dtypes are read
) -> dict[str, jax.Array]:
    """Read the arrays of all parts, after checking that they are what was written and expected."""

    def shapes_of(part: str) -> dict[str, tuple[int, ...]]:
        if not (path / part).is_dir() or hash_files(path / part, "*") != parts[part]:
            raise ValueError(_corrupt(path / part))
        return {name: x.shape for name, x in ocp.metadata(path / part).metadata.items()}

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        shapes = dict(zip(parts, pool.map(shapes_of, parts), strict=True))
    names = {found: now for part in shapes.values() for found, now in _names_now(part, expected)}
    found = {names[name]: shape for part in shapes.values() for name, shape in part.items()}
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"misshapen {name}: {list(found[name])}, expected {list(x.shape)}"
        for name, x in expected.items()
        if found.get(name, x.shape) != x.shape
    ]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def load(part: str) -> dict[str, jax.Array]:
        wanted = {}
        for name in shapes[part]:
            like = expected[names[name]]
            wanted[name] = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)
        return {names[name]: array for name, array in ocp.load(path / part, wanted).items()}

    with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
        return {name: x for loaded in pool.map(load, parts) for name, x in loaded.items()}


def _names_now(found: Iterable[str], expected: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield names of arrays and what they are called now; version 2 had others for 4-bit ints."""
    for name in found:
        base, _, leaf = name.rpartition(".")
        now = {"values": f"{base}.codes", "scale": f"{base}.scales.scale"}.get(leaf, name)
        yield name, name if name in expected or now not in expected else now


def _from_version_1(value: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of version 2 for a checkpoint of version 1; its version stays."""
    names = {"recipe", "report", "config", "base_sha256", "sha256"}
    whole = names | {"base_name", "library_version", "format_version"}
    if set(value) != whole:
        raise ValueError(f"missing or unknown fields: {', '.join(sorted(whole ^ set(value)))}")
    component = {name: value[name] for name in names} | {"parts": {"": value["sha256"]}}
    del component["sha256"]
    rest = {name: value[name] for name in whole - names}
    return rest | {"components": {TRANSFORMER: component}}


def _read_base(base: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(base / name)
    except (OSError, ValueError) as error:
        raise ValueError(f"base {base} has no usable {name}: {error}") from None


def _library_version() -> str:
    try:
        return importlib.metadata.version("quartz-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"
