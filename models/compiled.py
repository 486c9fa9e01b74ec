"""Modules under `jax.jit`, their weights an argument rather than constants."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from flax import nnx

from models import programs


def compiled(function: Callable, module: nnx.Module, *static: Hashable) -> Callable:
    """Return `function(module, *static, ...)` under jit.

    Weights go in as a flat list: walking the module's state at every call would cost milliseconds.
    Where `programs` are kept, what was traced and lowered in an earlier process isn't again.

    Args:
      function: of a file's top level, so that what was compiled is found again.
      module: of which another with the same structure runs the same program.
      *static: what the program is compiled for, compared by value.
    """
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    jitted, found = _jitted(function, graphdef, treedef, static)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)  # within another program
    if programs.is_on() and not traced and _on_one_device(leaves):
        made_of = function, graphdef, str(treedef), static
        return programs.Program(jitted, leaves, made_of, found)
    return functools.partial(jitted, leaves)


@functools.lru_cache(maxsize=16)
def _jitted(
    function: Callable, graphdef: nnx.GraphDef, treedef: Any, static: tuple
) -> tuple[Callable, programs.Found]:
    def call(leaves, *args):
        return function(nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)), *static, *args)

    return jax.jit(call), programs.Found()


def device_of(module: nnx.Module) -> jax.sharding.Sharding | None:
    """Return where a module's weights are, or None if they are on several devices."""
    leaves = jax.tree.leaves(nnx.state(module))
    return leaves[0].sharding if _on_one_device(leaves) else None


def _on_one_device(leaves: Sequence[jax.Array]) -> bool:
    shardings = {leaf.sharding for leaf in leaves}
    return len(shardings) == 1 and len(next(iter(shardings)).device_set) == 1
