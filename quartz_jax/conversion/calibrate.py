"""Statistics of layers' inputs for a model that is read block by block.

A model that can be calibrated so is a `Blockwise` one. Samples are run through one block after
another: they, and the statistics of one block, are what memory holds beside the block itself. Both
are on the device.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quartz_jax.conversion.checkpoint import CalibrationRecord
from quartz_jax.conversion.model import (
    OTHER,
    Part,
    leaf_name,
    part_of,
    quantize_shapes,
    stored_arrays,
)
from quartz_jax.engine.observe import ROWS, Statistic, statistics, watch
from quartz_jax.io.files import atomic_file
from quartz_jax.recipes.recipe import Recipe
from quartz_jax.transforms import Seen
from quartz_jax.transforms.base import Need

# Keyword arguments of the model's call: arrays, or arrays by name.
Sample = Mapping[str, Any]


@runtime_checkable
class Blockwise(Protocol):
    """What a model has, besides its call, to be run block by block.

    With `starts`, paths of linears outside of blocks that `start` calls, those are calibrated too.
    """

    def start(self, *, hidden_states: Any) -> Any:
        """Return what goes into the first block."""

    def blocks(self) -> Sequence[tuple[str, nnx.Module]]:
        """Return the blocks by path, in the order in which they run."""

    @staticmethod
    def advance(block: nnx.Module, carry: Any) -> Any:
        """Return what goes into the next block."""


def run_blocks(model: Any, **sample: Any) -> None:
    """Run a model as `Blockwise` ones are run, on a sample: every block, whatever was prepared."""
    carry = model.start(**sample)
    for _, block in model.blocks():
        carry = type(model).advance(block, carry)
    if hasattr(model, "finish"):
        model.finish(carry)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where samples come from."""

    make: Callable[[], Sequence[Sample]]  # called once; what it gives is kept for a resumed run
    record: CalibrationRecord

    def load(self, path: Path) -> list[Sample]:
        """Return the samples, from a file if they were made before.

        The file says the dtypes by name: numpy forgets that of bfloat16.
        """
        if not path.exists():
            arrays: dict[str, Any] = {
                f"{i}/{name}/{array.dtype}": array.view(f"u{array.dtype.itemsize}")
                for i, sample in enumerate(self.make())
                for name, value in _flat(sample)
                for array in [np.asarray(value)]
            }
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        samples: dict[int, dict[str, Any]] = {}
        with np.load(path, allow_pickle=False) as file:
            for key in file:
                index, *inside, name, dtype = key.split("/")
                at = samples.setdefault(int(index), {})
                for outer in inside:
                    at = at.setdefault(outer, {})
                at[name] = file[key].view(jnp.dtype(dtype))
        return [samples[i] for i in sorted(samples)]


def _flat(sample: Sample) -> Iterator[tuple[str, Any]]:
    """Yield arrays with their names, which slashes join to those of mappings that they are in."""
    for name, value in sample.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", x) for inner, x in _flat(value))
        elif value is not None:
            yield name, value


def check(
    model: nnx.Module, recipe: Recipe, parts: Sequence[Part], calibration: Calibration | None
) -> Blockwise:
    """Return the model; raise ValueError unless it can be calibrated for a recipe."""
    if calibration is None:
        raise ValueError(
            f"recipe {recipe.name!r} is calibrated and there are no samples for this component; "
            "choose another recipe for it"
        )
    if not isinstance(model, Blockwise):
        raise ValueError(
            f"{type(model).__name__} can't be run block by block, so recipe {recipe.name!r}, which "
            "is calibrated, can't be used for it"
        )
    names = {name for name, _ in model.blocks()}
    for part in parts:
        outside = [path for path, layer in part.layers.items() if layer.needs]
        outside = [path for path in outside if path not in getattr(model, "starts", ())]
        if part.name not in names and outside:
            raise ValueError(
                f"recipe {recipe.name!r} would calibrate {outside[0]}, which lies in none of the "
                "model's blocks, nor before them; leave it out, or give it a plain format"
            )
        if part.name not in {OTHER, *names}:
            raise ValueError(
                f"{type(model).__name__} holds a list with {part.name}, which isn't one of its "
                f"blocks(), so recipe {recipe.name!r}, which is calibrated, can't be used for it"
            )
    return model


def in_order(model: Blockwise, parts: Sequence[Part]) -> list[Part]:
    """Return what lies outside of blocks, then the blocks as they run."""
    by_name = {part.name: part for part in parts}
    names = [name for name, _ in model.blocks()]
    return [by_name[name] for name in [OTHER, *names] if name in by_name]


class BlockRun:
    """Samples on their way through a model's blocks, on the device."""

    def __init__(
        self,
        model: Any,  # the 16-bit model with shapes in place of arrays
        samples: Sequence[Sample],
    ):
        self.model = model
        self.kind: Any = type(model)
        self.blocks = dict(model.blocks())
        self.samples = samples
        self.carries: list[Any] = []
        if OTHER not in map(part_of, stored_arrays(nnx.state(model))):
            self.carries = _start(model, {}, samples)[0]

    def observe(self, part: Part, params: Mapping[str, np.ndarray]) -> dict[str, Seen]:
        """Return what the layers of a block, or before the first, are given, by path."""
        needs = {path: layer.needs for path, layer in part.layers.items() if layer.needs}
        if not needs:
            return {}
        if part.name not in self.blocks:
            return _start(self.model, params, self.samples, needs)[1]
        inside = {path.removeprefix(f"{part.name}."): need for path, need in needs.items()}
        block = _filled(self.blocks[part.name], part.name, params)
        watched = watch(block, inside, len(self.carries), ROWS)
        run = _watched_step(self.kind)
        for carry in self.carries:
            run(watched, carry)
        return {f"{part.name}.{path}": seen for path, seen in statistics(watched).items()}

    def advance(
        self,
        part: Part,
        params: Mapping[str, np.ndarray],
        recipe: Recipe,
        quantized: Callable[[], Mapping[str, jax.Array]] | None = None,
    ) -> None:
        """Hand the samples on: into the first block, or from a block to the next.

        Always by a program without statistics, so that what a resumed run computes is the same.

        Args:
          part: whose turn it is.
          params: its parameters, by path.
          recipe: of the model.
          quantized: reads its arrays as stored; the block then runs quantized.
        """
        if part.name not in self.blocks:
            self.carries = _start(self.model, params, self.samples)[0]
            return
        if quantized is None:
            block = _filled(self.blocks[part.name], part.name, params)
        else:
            shapes = dict(quantize_shapes(self.model, recipe).blocks())[part.name]
            block = _filled(shapes, part.name, quantized())
        run = _step(self.kind)
        self.carries = [run(block, carry) for carry in self.carries]


def _start(
    model: Any,
    params: Mapping[str, np.ndarray],
    samples: Sequence[Sample],
    needs: Mapping[str, frozenset[Need]] | None = None,
) -> tuple[list[Any], dict[str, Seen]]:
    """Return what goes into the first block for each sample, from what lies outside of blocks.

    Beside it statistics of linears outside of blocks, by path, as far as they are needed.
    """
    model = _filled_where_given(model, params)
    if needs:
        model = watch(model, needs, len(samples), ROWS)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    missing = [isinstance(x, jax.ShapeDtypeStruct) for x in leaves]

    @jax.jit
    def start(given, sample):
        # The blocks' weights are never read: zeros that no program holds.
        arrays = [
            jnp.zeros(x.shape, x.dtype) if absent else next_given
            for x, absent, next_given in zip(leaves, missing, given, strict=True)
        ]
        whole = nnx.merge(graphdef, jax.tree.unflatten(tree, arrays))
        carry = whole.start(**sample)
        return carry, nnx.state(whole, Statistic)

    carries = []
    for sample in samples:
        given = [None if absent else x for x, absent in zip(leaves, missing, strict=True)]
        carry, gathered = start(given, dict(sample))
        carries.append(carry)
        nnx.update(model, gathered)
        leaves = jax.tree.leaves(nnx.state(model))
    return carries, statistics(model)


def _filled_where_given(model: Any, params: Mapping[str, np.ndarray]) -> Any:
    """Return a copy of a model of shapes with the arrays that are given, by path."""
    graphdef, state = nnx.split(model)
    filled = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            jnp.asarray(params[name].astype(x.dtype)) if (name := leaf_name(path)) in params else x
        ),
        nnx.to_pure_dict(state),
    )
    nnx.replace_by_pure_dict(state, filled)
    return nnx.merge(graphdef, state)


def _filled(block: nnx.Module, name: str, params: Mapping[str, Any]) -> nnx.Module:
    """Return a block with shapes in place of arrays filled with arrays of the model, by path."""
    graphdef, state = nnx.split(block)
    filled = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(params[f"{name}.{leaf_name(path)}"]).astype(x.dtype),
        nnx.to_pure_dict(state),
    )
    nnx.replace_by_pure_dict(state, filled)
    return nnx.merge(graphdef, state)


@functools.cache
def _watched_step(cls: Any) -> Callable[[nnx.Module, Any], None]:
    @nnx.jit
    def run(block: nnx.Module, carry: Any) -> None:
        cls.advance(block, carry)

    return run


@functools.cache
def _step(cls: Any) -> Callable[[nnx.Module, Any], Any]:
    return nnx.jit(cls.advance)
