"""Frozen dataclasses that methods are put together from, and their JSON form both ways.

`{"part": "Smooth", "alpha": 0.5}` stands for `Smooth(alpha=0.5)`; parts hold parts, tuples of
parts, and plain values.
"""

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_REGISTRY: dict[str, type] = {}


def part(cls: T) -> T:
    """Make a class a frozen keyword-only dataclass that JSON can name."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    _REGISTRY[cls.__name__] = cls
    return cls


def to_json(value: Any) -> Any:
    """Return the JSON form of a part, or of a tuple or plain value inside one."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"part": type(value).__name__} | fields
    return [to_json(item) for item in value] if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    """Undo `to_json`.

    Raises:
      ValueError: an unknown part or field, or a value that the part refuses.
    """
    if isinstance(value, list):
        return tuple(map(from_json, value))
    if not isinstance(value, dict):
        return value
    fields = {key: from_json(item) for key, item in value.items() if key != "part"}
    name = value.get("part")
    if name not in _REGISTRY:
        raise ValueError(f"part is {name!r}; it must be one of {', '.join(sorted(_REGISTRY))}")
    try:
        return _REGISTRY[name](**fields)
    except TypeError as error:
        raise ValueError(f"part {name} has wrong fields: {error}") from None
