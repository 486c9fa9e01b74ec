"""The families of models that are known, and what is found among their components."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from models.component import Component
from models.dit.family import DIT
from models.family import Family
from models.flux.family import FLUX
from models.flux.redux import FLUX_REDUX
from models.flux.variants import FLUX_CONTROL, FLUX_FILL, FLUX_KONTEXT
from models.flux2.family import FLUX2
from models.ldm.family import LDM
from models.pixart.family import PIXART
from models.sd3.family import SD3
from models.stored_files import Checkpoint, CheckpointError
from models.text_encoders.decoder import DECODER
from models.unet.family import SD, SDXL
from models.zimage.family import ZIMAGE

# Where a single file could be of several, the first that fits is taken; a component by itself, of a
# class that several have, is the first one's: so FLUX.1's CLIP, as SDXL's isn't read whole.
FAMILIES: tuple[Family, ...] = (
    FLUX,
    FLUX_KONTEXT,
    FLUX_FILL,
    FLUX_CONTROL,
    FLUX_REDUX,
    FLUX2,
    ZIMAGE,
    DIT,
    PIXART,
    SD3,
    SDXL,
    SD,
    LDM,
)


def components() -> Iterator[Component]:
    """Yield the components of all families; one that several share comes several times."""
    for family in FAMILIES:
        yield from family.components.values()


def configs() -> tuple[type, ...]:
    """Return the classes of all components' configs."""
    return tuple(dict.fromkeys(x.config for x in (*components(), DECODER)))


def of_class(name: str | None, expected: Component | None = None) -> Component:
    """Return the component that config.json calls by a name.

    Args:
      name: the class.
      expected: is taken if the name is one of its own: families may share a class. Without it the
        first family's is, but a decoder gives its last state, as transformers' does, and not those
        that some family takes.

    Raises:
      CheckpointError: there is none; the message lists those there are.
    """
    tried = (*reversed([*components()]), DECODER, *([expected] if expected else []))
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
    for component in components():
        former = component.formerly
        if former and all(values.get(name) == value for name, value in former):
            return component
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


def of_file(path: Path, checkpoint: Checkpoint, schedule: str | None = None) -> Family | None:
    """Return the family whose main component a single file holds; None for none.

    Several may be told by a tensor that is there: then those fit whose sizes the file has, and of
    them the one that has the schedule, or else the first.

    Args:
      path: of the file.
      checkpoint: the opened file.
      schedule: that was asked for.

    Raises:
      CheckpointError: it holds several such components.
    """
    found = []
    for family in FAMILIES:
        naming = family.components[family.main].file
        if naming is not None and naming.prefix(checkpoint.shapes, path) is not None:
            found.append(family)
    fitting = [x for x in found if _fits(x, path, checkpoint)] if len(found) > 1 else found
    fitting = fitting or found  # what isn't whole is refused when it is opened
    return next((x for x in fitting if schedule in x.schedules), fitting[0] if fitting else None)


def _fits(family: Family, path: Path, checkpoint: Checkpoint) -> bool:
    """Return whether a single file has the sizes of a family's main component."""
    try:
        config = family.components[family.main].file_config(path, checkpoint)
    except CheckpointError:
        return False
    return not list(family.misfits({family.main: config}, {}))


def schedules() -> tuple[str, ...]:
    """Return the names of schedules that `models.find_model` takes, of all families."""
    names = (name for family in FAMILIES for name in family.schedules)
    return (*dict.fromkeys(names), "folder")
