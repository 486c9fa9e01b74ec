"""Quantized checkpoints: a model folder whose transformer is packed, with quartz.json beside it.

Layout of a checkpoint folder, version 1:
  quartz.json         what `Manifest` holds
  transformer/        Orbax; a flat dict from "path.of.module.leaf" to array. Quantized weights as
                      they are in memory (uint8, int8, float32), everything else bfloat16
  everything else     the base model's other components, copied
"""

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

from quartz_jax.convert import abstract_quantized
from quartz_jax.files import atomic_folder, check_output, hash_files
from quartz_jax.linear import QuantizedWeight
from quartz_jax.recipe import Recipe
from quartz_jax.report import Report

M = TypeVar("M", bound=nnx.Module)

FORMAT_VERSION = 1
_MANIFEST, _TRANSFORMER = "quartz.json", "transformer"
# Files of the base that travel with its components; others may be large single-file weights.
_TEXTS = ("*.json", "*.md", "*.txt", "LICENSE*", "NOTICE*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of quartz.json."""

    recipe: Recipe  # that the transformer was quantized with
    report: Report  # formats, errors and sizes of the layers
    base_name: str  # folder name of the 16-bit model
    base_sha256: str  # of its transformer's safetensors files, see `hash_files`
    sha256: str  # of the quantized transformer's files
    config: dict[str, Any]  # the transformer's config.json
    library_version: str  # of quartz-jax when it was written
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        nested = {"recipe": self.recipe.to_json(), "report": self.report.to_json()}
        return {"format_version": self.format_version} | dataclasses.asdict(self) | nested

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`; raises ValueError for another version or a missing field."""
        version = value.get("format_version") if isinstance(value, dict) else None
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version is {version!r}; expected {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version}, but this quartz-jax reads up to {FORMAT_VERSION}; "
                "install a newer one"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if set(value) != names:
            raise ValueError(f"missing or unknown fields: {', '.join(sorted(names ^ set(value)))}")
        nested = {
            "recipe": Recipe.from_json(value["recipe"]),
            "report": Report.from_json(value["report"]),
        }
        return cls(**value | nested)


def is_checkpoint(folder: Path | str) -> bool:
    """Return whether a folder is a quantized checkpoint of any version."""
    return (Path(folder) / _MANIFEST).exists()


def read_manifest(folder: Path | str) -> Manifest:
    """Read quartz.json.

    Raises:
      ValueError: it is absent, malformed or of a newer version.
    """
    path = Path(folder) / _MANIFEST
    try:
        return Manifest.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a quantized checkpoint") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be used: {error}") from None


def save(
    folder: Path | str,
    model: nnx.Module,
    *,
    recipe: Recipe,
    report: Report,
    base: Path | str,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that holds everything generation needs.

    It is written to a temporary folder beside the final one and renamed: an interrupted save
    leaves nothing under the final name.

    Args:
      folder: the checkpoint to make.
      model: the quantized transformer.
      recipe: that it was quantized with.
      report: that `quantize_model` returned.
      base: folder of the 16-bit model in the diffusers layout, whose other components are copied.
      overwrite: replace a folder that exists.

    Raises:
      ValueError: the folder exists or can't be written, or base is no 16-bit model folder.
    """
    base, folder = Path(base).resolve(), Path(folder).absolute()
    check_output(folder, folder=True, overwrite=overwrite)
    index = _read_base(base, "model_index.json")
    config = _read_base(base, f"{_TRANSFORMER}/config.json")
    if not any((base / _TRANSFORMER).glob("*.safetensors")):
        raise ValueError(f"base {base} has no {_TRANSFORMER}/*.safetensors; give a 16-bit model")
    with atomic_folder(folder) as partial:
        _copy_components(base, partial, index)
        ocp.save(partial / _TRANSFORMER, _stored(nnx.state(model)))
        manifest = Manifest(
            recipe=recipe,
            report=report,
            base_name=base.name,
            base_sha256=hash_files(base / _TRANSFORMER, "*.safetensors"),
            sha256=hash_files(partial / _TRANSFORMER, "*"),
            config=config,
            library_version=_library_version(),
        )
        (partial / _MANIFEST).write_text(json.dumps(manifest.to_json(), indent=2) + "\n")


def load(folder: Path | str, build: Callable[[dict[str, Any]], M]) -> tuple[M, Manifest]:
    """Load the transformer of a checkpoint; its 16-bit weights never exist.

    Args:
      folder: a checkpoint that `save` made.
      build: makes the 16-bit model from its config.json; only traced, so it costs nothing. What
        stays 16-bit takes the dtypes that it gives.

    Raises:
      ValueError: quartz.json or a tensor is missing, misshapen, corrupt or of a newer version.
    """
    manifest = read_manifest(folder)
    transformer = Path(folder).absolute() / _TRANSFORMER
    if hash_files(transformer, "*") != manifest.sha256:
        raise ValueError(f"{transformer} is corrupt or incomplete: its SHA-256 isn't quartz.json's")
    graphdef, state = nnx.split(abstract_quantized(lambda: build(manifest.config), manifest.recipe))
    stored = _read(transformer, jax.eval_shape(_stored, state))
    filled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: stored[_name(path)].astype(leaf.dtype), nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, filled)
    return nnx.merge(graphdef, state), manifest


def _stored(state: nnx.State) -> dict[str, jax.Array]:
    """Arrays by dotted path, as stored: parameters in bfloat16, quantized weights as they are."""
    packed, rest = nnx.split_state(state, QuantizedWeight, ...)
    rest = jax.tree.map(lambda x: x.astype(jnp.bfloat16), rest)
    tree = nnx.to_pure_dict(nnx.merge_state(packed, rest))
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _read(path: Path, expected: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    found = {name: x.shape for name, x in ocp.metadata(path).metadata.items()}
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
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in expected.items()
    }
    return ocp.load(path, wanted)


def _read_base(base: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((base / name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"base {base} has no usable {name}: {error}") from None


def _copy_components(base: Path, folder: Path, index: dict[str, Any]) -> None:
    for name, value in index.items():
        if isinstance(value, list) and name != _TRANSFORMER and (base / name).is_dir():
            shutil.copytree(base / name, folder / name)
    for file in {file for pattern in _TEXTS for file in base.glob(pattern)}:
        shutil.copyfile(file, folder / file.name)


def _library_version() -> str:
    try:
        return importlib.metadata.version("quartz-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"
