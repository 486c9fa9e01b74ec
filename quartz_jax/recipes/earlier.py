"""Recipes of earlier versions.

Version 2 had two kinds, each with patterns for paths: recipes of plain formats, and methods of
parts. Fields and classes have changed names since.
"""

from collections.abc import Set
from typing import Any


def from_version_2(value: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of version 3 for a recipe or a method of version 2."""
    if set(value) == {"name", "method"}:
        rules = _listed(value, "method")
        made = [_rule(_method_layer(_object(rule, "method")), rule) for rule in rules]
    elif set(value) == {"name", "rules"}:
        rules = _listed(value, "rules")
        made = [_rule(_plain_layer(_object(rule, "rule")), rule) for rule in rules]
    else:
        extra = sorted(set(value) - {"name", "rules"})
        problem = f"unknown fields: {', '.join(extra)}" if extra else "missing fields"
        raise ValueError(f"recipe has {problem}; it needs name and rules")
    return {"name": value["name"], "rules": made}


def _rule(layer: dict[str, Any], rule: dict[str, Any]) -> dict[str, Any]:
    return {"match": {"path": rule["pattern"]}, "layer": layer}


def _plain_layer(rule: dict[str, Any]) -> dict[str, Any]:
    _fields(rule, "rule", {"pattern", "weight", "activation"})
    return {name: _plain_format(rule[name], name) for name in ("weight", "activation")}


def _plain_format(value: Any, where: str) -> dict[str, Any] | None:
    value = _object(value, where)
    kind = value.get("kind")
    if kind == "bf16":
        return None
    if kind in ("int8", "int4"):
        return {"part": "Int", "width": int(kind[3])} | _only(value, {"range"}, where)
    if kind == "quartz":
        config = _object(value.get("config"), f"{where}.config")
        return {"part": "Quartz"} | config | _only(value, {"search"}, where)
    raise ValueError(f"{where}.kind is {kind!r}; it must be bf16, int8, int4 or quartz")


def _method_layer(rule: dict[str, Any]) -> dict[str, Any]:
    _fields(rule, "method", {"pattern", "method"}, ignored={"part"})
    layer = dict(_object(rule["method"], "method"))
    layer.pop("part", None)
    layer["transforms"] = [_without_regular(t) for t in layer.get("transforms", [])]
    return layer


def _without_regular(transform: dict[str, Any]) -> dict[str, Any]:
    """Return a transform without the field of Rotate that chose another Hadamard matrix."""
    if transform.get("part") == "Rotate" and transform.get("regular") is False:
        raise ValueError("Rotate has regular=false, which is no longer there; remove it")
    return {key: item for key, item in transform.items() if key != "regular"}


def _listed(value: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(value[name], list) or not isinstance(value["name"], str):
        raise ValueError("recipe: name must be a string and rules a list")
    return value[name]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(value).__name__}")
    return value


def _fields(
    value: dict[str, Any], where: str, names: set[str], ignored: Set[str] = frozenset()
) -> None:
    found = set(value) - ignored
    for problem, wrong in (("unknown", found - names), ("missing", names - found)):
        if wrong:
            raise ValueError(f"{where} has {problem} fields: {', '.join(sorted(wrong))}")


def _only(value: dict[str, Any], names: set[str], where: str) -> dict[str, Any]:
    unknown = set(value) - names - {"kind", "config"}
    if unknown:
        raise ValueError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    return {name: value[name] for name in names if name in value}
