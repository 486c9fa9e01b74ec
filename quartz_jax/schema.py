"""JSON of frozen dataclasses: one registry of parts, one writer, one reader.

Recipes, methods, checkpoints and reports are frozen dataclasses. A *part* is one that is named in
JSON, since several can stand in its place: `{"part": "Smooth", "alpha": 0.5}` is
`Smooth(alpha=0.5)`. Others are plain objects whose class follows from the field that holds them.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, dataclass_transform

T = TypeVar("T")

_PARTS: dict[str, type] = {}
_WORDS: dict[str, type] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def part(word: str | None = None) -> Callable[[type[T]], type[T]]:
    """Make a class a frozen keyword-only dataclass that JSON names by its own name.

    Args:
      word: what names of recipes call it with its defaults, such as "smooth" in
        "smooth+gptq+quartz"; None if they don't.

    Raises:
      ValueError: another class has that name or word.
    """

    def make(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        for table, name in ((_PARTS, cls.__name__), (_WORDS, word)):
            if name is None:
                continue
            known = table.get(name)
            if known and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise ValueError(
                    f"{name!r} is {known.__module__}.{known.__qualname__} already; name "
                    f"{cls.__module__}.{cls.__qualname__} otherwise"
                )
            table[name] = cls
        return cls

    return make


def parts(kind: type) -> dict[str, type[Any]]:
    """Return the registered parts that are of a kind, by their names."""
    return {name: cls for name, cls in _PARTS.items() if issubclass(cls, kind)}


def words(kind: type) -> dict[str, type[Any]]:
    """Return the registered parts of a kind that names of recipes can hold, by their words."""
    return {word: cls for word, cls in _WORDS.items() if issubclass(cls, kind)}


def to_json(value: Any) -> Any:
    """Return the JSON form of a dataclass, or of a container or plain value inside one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        tag = {"part": type(value).__name__} if type(value) in _PARTS.values() else {}
        return tag | fields
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


def from_json(cls: type[T], value: Any, where: str | None = None) -> T:
    """Undo `to_json`.

    Args:
      cls: what is expected: a dataclass, or a base class of parts.
      value: the JSON.
      where: what the value is, for messages; the name of the class if None.

    Raises:
      ValueError: a missing or unknown field, an unknown part, a value of another type, or one
        that the class refuses; says where.
    """
    return _read(cls, value, where or cls.__name__.lower())


def from_larger(cls: type[T], value: Any, where: str) -> T:
    """Return what `from_json` does for a JSON object that may hold more fields than the class."""
    _checked(value, isinstance(value, dict), where, "a JSON object")
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return from_json(cls, {name: value[name] for name in names if name in value}, where)


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, value, where)
    if origin is Literal:
        return _checked(value, value in args, where, f"one of {', '.join(map(repr, args))}")
    if origin is tuple:
        return _read_tuple(args, value, where)
    if origin is dict:
        _checked(value, isinstance(value, dict), where, "a JSON object")
        return {key: _read(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and hint not in _PARTS.values():
        return _read_fields(hint, value, where)
    if hint in _PARTS.values() or inspect.isabstract(hint):
        return _read_part(hint, value, where)
    return _read_plain(hint, value, where)


def _read_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    right = type(value) is hint if hint in (int, float, bool) else isinstance(value, hint)
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return _checked(value, right, where, names.get(hint, f"a {hint.__name__}"))


def _read_union(args: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [arg for arg in args if arg is not type(None)]
    errors = []
    for arg in rest:
        try:
            return _read(arg, value, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0] if len(errors) == 1 else " or ".join(errors))


def _read_tuple(args: tuple, value: Any, where: str) -> tuple:
    _checked(value, isinstance(value, list), where, "a list")
    if args[-1] is not Ellipsis:
        _checked(value, len(value) == len(args), where, f"a list of {len(args)}")
        return tuple(_read(a, x, f"{where}[{i}]") for i, (a, x) in enumerate(zip(args, value)))  # noqa: B905
    return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))


def _read_part(kind: Any, value: Any, where: str) -> Any:
    _checked(value, isinstance(value, dict), where, "a JSON object")
    name = value.get("part")
    known = [key for key, cls in _PARTS.items() if issubclass(cls, kind)]
    if name not in known:
        raise ValueError(f"{where}.part is {name!r}; it must be one of {', '.join(sorted(known))}")
    return _read_fields(_PARTS[name], value, where, ignore=frozenset({"part"}))


def _read_fields(cls: Any, value: Any, where: str, ignore: frozenset[str] = frozenset()) -> Any:
    _checked(value, isinstance(value, dict), where, "a JSON object")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    found = set(value) - ignore
    for problem, names in (("unknown", found - set(fields)), ("missing", required - found)):
        if names:
            raise ValueError(f"{where} has {problem} fields: {', '.join(sorted(names))}")
    hints = _hints(cls)
    given = {name: _read(hints[name], value[name], f"{where}.{name}") for name in found}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(value: Any, right: bool, where: str, wanted: str) -> Any:
    if not right:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{where} is {shown}; it must be {wanted}")
    return value
