"""One table entry a kind of model: its config, its module, and what its tensors are called.

Opening, loading, export, tracing and checkpoints with random weights all run off the same entry; a
component's `params.py` declares it. Which components make a model, a `models.family.Family` says.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.checkpoint_io import (
    Rule,
    StoredModule,
    TracingRngs,
    match_params,
    save_params,
    stored_tensors,
)
from models.stored_files import (
    Checkpoint,
    CheckpointError,
    find_prefix,
    open_checkpoint,
    open_folder,
    unwrap,
)

Shapes = Mapping[str, tuple[int, ...]]  # tensor name to shape

# What the names of other models begin with in files that hold several.
_BESIDE = r"(vae|first_stage_model|text_encoders?|text_encoder_2|cond_stage_model|conditioner)\."
# The file of weights, by the library that writes the folder, and the largest it writes.
_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
_SHARD_BYTES = {"diffusers": 10**10, "transformers": 5 * 10**9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """What a component's tensors are called in one kind of file."""

    # A tensor that every such checkpoint has and few others; what stands before it stands before
    # all names. Of several, the first that is there.
    telling: str | tuple[str, ...]
    # from the config and the names that are there to the rules; a module without one keeps its name
    rules: Callable[[Any, Collection[str]], Sequence[Rule]]
    # regular expressions of names that have no parameter here, or from the config to them
    ignore: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    # from shapes and the file's path, for errors, to a config; None where a config.json says it
    config: Callable[[Shapes, Path], Any] | None = None
    dtype: str = "BF16"  # that published files are stored in, in the words of safetensors
    # regular expression that the prefix holds, where a file has several of the kind, as "clip_g"
    within: str = ""

    @property
    def tellings(self) -> tuple[str, ...]:
        """The telling tensors, in the order in which they are looked for."""
        return (self.telling,) if isinstance(self.telling, str) else self.telling

    def ignored(self, config: Any) -> tuple[str, ...]:
        """Return regular expressions of names that have no parameter in a config's module."""
        return self.ignore(config) if callable(self.ignore) else self.ignore

    def prefix(self, names: Collection[str], path: Path | str = "") -> str | None:
        """Return what stands before every name of the component's; None if it isn't there.

        Args:
          names: of a file's tensors.
          path: of the file, for errors.

        Raises:
          CheckpointError: there are several such components.
        """
        for telling in self.tellings:
            prefix = find_prefix(names, telling, path, self.within)
            if prefix is not None:
                return prefix
        return None

    def select(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Return the component's tensors among those of a file; None if it isn't there.

        Raises:
          CheckpointError: there are several such components.
        """
        prefix = self.prefix(checkpoint.shapes, checkpoint.path)
        if prefix is None:
            return None
        return checkpoint.under(prefix) if prefix else checkpoint.without(_BESIDE)

    def unwrapped(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the tensors of a folder without a prefix that all their names share."""
        for telling in self.tellings:
            if find_prefix(checkpoint.shapes, telling, checkpoint.path) is not None:
                return unwrap(checkpoint, telling)
        return checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A kind of model that a folder or file can hold: a transformer, an autoencoder, an encoder.

    The config is a frozen dataclass with `from_json(values)` and `to_json()`; the module is made by
    `module(config, rngs=, dtype=, param_dtype=)` and has the config as `config`.
    """

    name: str  # in words, for errors: "FLUX.1 transformer"
    # what config.json calls it: `_class_name` or one of `architectures`; the first is written
    classes: tuple[str, ...]
    library: str  # "diffusers" or "transformers": whose folder it is
    config: Any  # the config's class
    module: Any  # the module's class
    folder: Naming  # in a folder with a config.json
    file: Naming | None = None  # in a single file, whose shapes are all that tells the config
    # what its config.json holds where a class's name, since given up, doesn't tell kinds apart
    formerly: tuple[tuple[str, Any], ...] = ()
    # from the config of a module that leaves parts of its checkpoint out to that of all of it
    whole: Callable[[Any], Any] = lambda config: config

    def build(self, config: Any, dtype: jnp.dtype = jnp.bfloat16) -> nnx.Module:
        """Make the module for tracing only, as under `nnx.eval_shape`: its weights mean nothing."""
        return self.module(config, rngs=TracingRngs(), dtype=dtype, param_dtype=dtype)

    def open(self, path: Path | str, dtype: jnp.dtype = jnp.bfloat16) -> StoredModule:
        """Open the component without reading its parameters.

        Args:
          path: a folder with config.json and safetensors, as the library writes it; or a file or an
            index of such files, with any prefix or none, and perhaps other models beside it.
          dtype: of the parameters and the computation.

        Raises:
          CheckpointError: a file, its config or a tensor can't be used; the message names it.
        """
        path = Path(path)
        naming, config, checkpoint = self._find(path)
        return match_params(
            lambda: self.build(config, dtype),
            checkpoint,
            naming.rules(config, checkpoint.shapes),
            config=config.to_json(),
            ignore=naming.ignored(config),
        )

    def load(self, path: Path | str, dtype: jnp.dtype = jnp.bfloat16) -> Any:
        """Load what `open` opens; the module computes and stores in `dtype`."""
        return self.open(path, dtype).load(dtype)

    def file_config(self, path: Path, checkpoint: Checkpoint | None = None) -> Any:
        """Return the config that the shapes in a single file tell.

        Args:
          path: of the file.
          checkpoint: the file, where it is open already.

        Raises:
          CheckpointError: the component isn't there, or not whole enough to tell.
        """
        return self._find(path, checkpoint)[1]

    def export(
        self, module: nnx.Module, folder: Path | str, dtype: jnp.dtype = jnp.bfloat16
    ) -> None:
        """Write the folder that the library, and `open`, read.

        Args:
          module: of the component's class.
          folder: made if absent.
          dtype: floating dtype that every tensor is stored in.
        """
        config: Any = module.config
        values = config.to_json()
        if self.library == "transformers":
            values |= {"dtype": jnp.dtype(dtype).name}
        save_params(
            module,
            folder,
            self.folder.rules(config, ()),
            config=values,
            filename=_FILES[self.library],
            dtype=dtype,
        )

    def tensors(self, config: Any, naming: Naming) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return leaf ("kernel", "bias", ...) and shape of all tensors of a checkpoint.

        Args:
          config: of the module.
          naming: `folder` or `file`.
        """
        config = self.whole(config)
        return stored_tensors(lambda: self.build(config), naming.rules(config, ()))

    @property
    def weights_stem(self) -> str:
        """The file of a folder's weights, without its ending."""
        return _FILES[self.library].removesuffix(".safetensors")

    @property
    def shard_bytes(self) -> int:
        """The most bytes that the library puts into one file."""
        return _SHARD_BYTES[self.library]

    def _find(
        self, path: Path, checkpoint: Checkpoint | None = None
    ) -> tuple[Naming, Any, Checkpoint]:
        """Return the naming, the config and the tensors of what lies at a path."""
        if not path.is_file():
            values, whole = open_folder(path)
            return self.folder, self.config.from_json(values), self.folder.unwrapped(whole)
        if self.file is None or self.file.config is None:
            raise CheckpointError(f"{path} is a file; a {self.name} is read from a folder")
        selected = self.file.select(checkpoint or open_checkpoint(path))
        if selected is None:
            listed = " or ".join(self.file.tellings)
            raise CheckpointError(f"{path} holds no {self.name}: missing {listed}")
        return self.file, self.file.config(selected.shapes, path), selected
