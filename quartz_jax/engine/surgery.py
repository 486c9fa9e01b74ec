"""Putting other modules in the place of linears and convolutions."""

from collections.abc import Callable, Container
from typing import Any, TypeVar

import jax
from flax import nnx

from quartz_jax.recipes.sites import layers

M = TypeVar("M", bound=nnx.Module)
_NODES = (nnx.Module, nnx.Variable)  # of a module's graph: not looked into


def replace_layers(
    model: M,
    replace: Callable[[str, Any], nnx.Module],
    only: Container[str] | None = None,
) -> M:
    """Return a copy of a model with replace(path, layer) in the place of each layer.

    A layer that stands in several places is replaced once, by one module in all of them.

    Args:
      model: is untouched; the copy shares its arrays.
      replace: is called in the order of the paths that `sites.layers` gives.
      only: paths to replace; None for all.
    """
    model = nnx.clone(model)
    made = {
        id(layer): replace(path, layer)
        for path, layer in list(layers(model))
        if only is None or path in only
    }
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(nnx.iter_children(parent)):
            if id(child) in made:
                _set_child(parent, name, made[id(child)])
        for name, value in list(vars(parent).items()):
            if isinstance(value, list | tuple | dict):
                _replace_inside(parent, name, value, made)
    return model


def _replace_inside(
    parent: nnx.Module, name: str, value: list | tuple | dict, made: dict[int, nnx.Module]
) -> None:
    """Replace children that lie in plain containers, which a module may hold as data."""
    leaves, tree = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, _NODES))
    if any(id(leaf) in made for leaf in leaves):
        replaced = jax.tree.unflatten(tree, [made.get(id(leaf), leaf) for leaf in leaves])
        setattr(parent, name, nnx.data(replaced))


def _set_child(
    parent: Any,  # a module; one that is a list or a dict of modules is given an index or a key
    name: Any,
    child: nnx.Module,
) -> None:
    if isinstance(name, int):
        parent[name] = child
    else:
        setattr(parent, name, child)
