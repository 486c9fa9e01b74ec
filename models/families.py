"""The families of models that are known, and what is found among their components."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flax import nnx

from models.component import Component
from models.family import Family
from models.flux.family import FLUX
from models.stored_files import CheckpointError

# Where the tensor that tells one family is in another's files too, the other comes first.
FAMILIES: tuple[Family, ...] = (FLUX,)


def components() -> Iterator[Component]:
    """Yield the components of all families; one that several share comes several times."""
    for family in FAMILIES:
        yield from family.components.values()


def of_class(name: str | None, expected: Component | None = None) -> Component:
    """Return the component that config.json calls by a name.

    Args:
      name: the class.
      expected: is taken if the name is one of its own: families may share a class.

    Raises:
      CheckpointError: there is none; the message lists those there are.
    """
    tried = (*components(), *([expected] if expected else []))
    known = {kind: x for x in tried for kind in x.classes}
    if name not in known:
        listed = ", ".join(sorted(known))
        raise CheckpointError(f"class {name} is not supported; expected one of {listed}")
    return known[name]


def of_config(values: Mapping[str, Any], expected: Component | None = None) -> Component:
    """Return the component of a config.json, by `_class_name` or `architectures`.

    Args:
      values: contents of the config.json.
      expected: as for `of_class`.

    Raises:
      CheckpointError: the class is unknown.
    """
    names = [values.get("_class_name")]
    if isinstance(values.get("architectures"), list):
        names += values["architectures"]
    return of_class(next((name for name in names if isinstance(name, str)), None), expected)


def of_module(module: nnx.Module) -> Component:
    """Return the component that a module is one of.

    Raises:
      ValueError: there is none.
    """
    for component in components():
        if type(module) is component.module:
            return component
    known = ", ".join(sorted({x.module.__name__ for x in components()}))
    raise ValueError(f"module is a {type(module).__name__}; expected one of {known}")


def of_index(index: Mapping[str, Any]) -> Family:
    """Return the family that model_index.json names.

    Raises:
      CheckpointError: there is none.
    """
    name = index.get("_class_name")
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    known = " or ".join(repr(x) for family in FAMILIES for x in family.pipelines)
    raise CheckpointError(f"_class_name is {name!r}; expected {known}")


def of_tensors(names: Collection[str], path: Any = "") -> Family | None:
    """Return the family whose main component a single file holds; None for none.

    Args:
      names: of the file's tensors.
      path: of the file, for errors.

    Raises:
      CheckpointError: it holds several.
    """
    for family in FAMILIES:
        file = family.components[family.main].file
        if file is not None and file.prefix(names, path) is not None:
            return family
    return None


def schedules() -> tuple[str, ...]:
    """Return the names of schedules that `models.find_model` takes, of all families."""
    names = (name for family in FAMILIES for name in family.schedules)
    return (*dict.fromkeys(names), "folder")
