"""Which linears of a model are quantized and how: ordered rules, JSON both ways.

A linear takes the first rule whose pattern matches its whole path; one that no rule matches stays
16-bit. The built-in recipes are for the FLUX transformer of `models.flux`.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from quartz_jax.config import QuartzConfig

Range = Literal["absmax", "minmax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How one operand of a linear is stored or computed."""

    # "bf16" leaves it, "int8" and "int4" are plain integers with a scale a row, "quartz" is QuaRTZ
    kind: Literal["bf16", "int8", "int4", "quartz"]
    range: Range = "absmax"  # of int8; "minmax" only for activations
    config: QuartzConfig | None = None  # of quartz
    search: bool = False  # of quartz weights with an integer step: choose the step offline

    def __post_init__(self):
        if self.kind not in ("bf16", "int8", "int4", "quartz"):
            raise ValueError(f"kind is {self.kind!r}; use bf16, int8, int4 or quartz")
        if (self.kind == "quartz") != (self.config is not None):
            raise ValueError(f"config goes with kind 'quartz' and only that; kind is {self.kind!r}")
        if self.range not in ("absmax", "minmax"):
            raise ValueError(f"range is {self.range!r}; use absmax or minmax")
        if self.range == "minmax" and self.kind != "int8":
            raise ValueError(f"range 'minmax' is for int8, not {self.kind} (quartz: in its config)")
        if self.search and (self.config is None or self.config.step != "integer"):
            raise ValueError("search=True needs a QuartzConfig with step='integer'")

    @property
    def symmetric(self) -> bool:
        """Whether no offset is stored."""
        return (self.config.range if self.config else self.range) == "absmax"

    @property
    def bits(self) -> float:
        """Bits an element, without the scale of a row."""
        if self.config:
            return 4 + 4 / self.config.group_size
        return {"bf16": 16.0, "int8": 8.0, "int4": 4.0}[self.kind]

    def __str__(self):
        words = [self.kind]
        if self.config:
            words.append(f"g{self.config.group_size}")
            words += ["truncate"] * (self.config.rounding == "truncate")
            words += ["integer"] * (self.config.step == "integer")
            words += [f"block{self.config.scale_block}"] * bool(self.config.scale_block)
            words += ["search"] * self.search
        return " ".join(words + ["minmax"] * (not self.symmetric))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with the fields that apply to this kind."""
        if self.config:
            return {"kind": self.kind, "config": self.config.to_json(), "search": self.search}
        return {"kind": self.kind} | ({"range": self.range} if self.kind == "int8" else {})

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`; raises ValueError for an unknown or missing field."""
        fields = _fields(cls, value, required={"kind"})
        if "config" in fields:
            fields["config"] = QuartzConfig.from_json(fields["config"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Formats of the linears whose path the pattern matches."""

    pattern: str  # regular expression for a whole path, such as r"single_blocks\.\d+\.linear2"
    weight: Format  # of the weight; symmetric
    activation: Format  # of the input; bf16 makes the layer weight-only

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"pattern {self.pattern!r} is not a regular expression: {error}"
            ) from None
        if not self.weight.symmetric:
            raise ValueError(f"weight of rule {self.pattern!r} is minmax; weights must be absmax")
        if self.activation.search:
            raise ValueError(f"activation of rule {self.pattern!r} has search; only weights can")
        if self.weight.kind == "bf16" and self.activation.kind != "bf16":
            raise ValueError(f"rule {self.pattern!r} needs a bf16 activation for its bf16 weight")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        formats = {"weight": self.weight.to_json(), "activation": self.activation.to_json()}
        return {"pattern": self.pattern} | formats

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`; raises ValueError for an unknown or missing field."""
        fields = _fields(cls, value, required={"pattern", "weight", "activation"})
        formats = {key: Format.from_json(fields[key]) for key in ("weight", "activation")}
        return cls(pattern=fields["pattern"], **formats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered rules for a whole model."""

    name: str  # shown in reports and stored in checkpoints
    rules: tuple[Rule, ...]  # the first that matches a path decides

    @property
    def activation_bits(self) -> float:
        """Fewest bits an element that a linear's input has; 16 if all is weight-only."""
        return min((rule.activation.bits for rule in self.rules), default=16.0)

    def assign(self, paths: Iterable[str]) -> dict[str, Rule]:
        """Return the rule of each linear that has one, in the order of the paths.

        Args:
          paths: the paths of all linears of the model.

        Raises:
          ValueError: a rule decides no linear; it is named.
        """
        first = {
            path: next((r for r in self.rules if re.fullmatch(r.pattern, path)), None)
            for path in paths
        }
        for rule in self.rules:
            if rule not in first.values():
                raise ValueError(
                    f"recipe {self.name!r}: rule {rule.pattern!r} matches no linear of this model "
                    "that an earlier rule leaves; correct or remove it"
                )
        return {path: rule for path, rule in first.items() if rule is not None}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"name": self.name, "rules": [rule.to_json() for rule in self.rules]}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`; raises ValueError for an unknown or missing field."""
        fields = _fields(cls, value, required={"name", "rules"})
        if not isinstance(fields["rules"], list) or not isinstance(fields["name"], str):
            raise ValueError("recipe: name must be a string and rules a list")
        return cls(name=fields["name"], rules=tuple(map(Rule.from_json, fields["rules"])))


def get_recipe(name_or_path: str | Path) -> Recipe:
    """Return a built-in recipe by name, or one read from a JSON file.

    Raises:
      ValueError: neither a built-in name nor a readable recipe file.
    """
    if name_or_path in RECIPES:
        return RECIPES[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".json":
        raise ValueError(
            f"unknown recipe {str(name_or_path)!r}; use one of {', '.join(RECIPES)}, or the path "
            "of a .json file"
        )
    try:
        return Recipe.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe file {path} can't be used: {error}") from None


def _fields(cls: type, value: Any, required: set[str]) -> dict[str, Any]:
    name = cls.__name__.lower()
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, not {type(value).__name__}")
    unknown = set(value) - {field.name for field in dataclasses.fields(cls)}
    for problem, keys in (("unknown", unknown), ("missing", required - set(value))):
        if keys:
            raise ValueError(f"{name} has {problem} fields: {', '.join(sorted(keys))}")
    return dict(value)


# The linears of a FLUX transformer. Embedders and the last layer are in none of these.
_MODULATION = r"double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin"
_MLP_DOWN = r"double_blocks\.\d+\.(img|txt)_mlp\.down"
_SINGLE_OUT = r"single_blocks\.\d+\.linear2"
_OTHERS = r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.up)|single_blocks\.\d+\.linear1"
# The same by what their inputs are, for whatever has rules of its own.
LINEARS = {
    "modulation": _MODULATION,
    "mlp_down": _MLP_DOWN,
    "single_out": _SINGLE_OUT,
    "others": _OTHERS,
}

_BF16 = Format(kind="bf16")
_INT8 = Format(kind="int8")
_INT4 = Format(kind="int4")
_POWER = Format(kind="quartz", config=QuartzConfig())
_TRUNCATE = Format(kind="quartz", config=QuartzConfig(rounding="truncate"))
_INTEGER = Format(kind="quartz", config=QuartzConfig(step="integer"))
_SEARCHED = dataclasses.replace(_INTEGER, search=True)


def _flux(name: str, weight: Format, activation: Format, ranges: tuple[Range, Range]) -> Recipe:
    """Every linear of the blocks; `ranges` are those of the inputs of mlp.down and linear2."""
    down, single_out = (_with_range(activation, value) for value in ranges)
    rules = [
        Rule(pattern=_MODULATION, weight=weight, activation=_BF16),
        Rule(pattern=_MLP_DOWN, weight=weight, activation=down),
        Rule(pattern=_SINGLE_OUT, weight=weight, activation=single_out),
        Rule(pattern=_OTHERS, weight=weight, activation=activation),
    ]
    return Recipe(name=name, rules=tuple(rules))


def _with_range(activation: Format, value: Range) -> Format:
    if activation.config:
        return dataclasses.replace(
            activation, config=dataclasses.replace(activation.config, range=value)
        )
    return activation if value == "absmax" else dataclasses.replace(activation, range=value)


_A, _M = "absmax", "minmax"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="bf16", rules=()),
        # name, weights, activations, ranges of the inputs of mlp.down and linear2
        _flux("w8a8", _INT8, _INT8, (_M, _M)),
        _flux("w4a16", _POWER, _BF16, (_A, _A)),
        _flux("w4a8", _POWER, _INT8, (_M, _M)),
        _flux("w4a4", _POWER, _POWER, (_M, _A)),
        _flux("w4a4-paper", _TRUNCATE, _TRUNCATE, (_M, _A)),
        _flux("w4a8x", _SEARCHED, _INT8, (_M, _M)),
        _flux("w4a4x", _SEARCHED, _INTEGER, (_A, _A)),
        _flux("int4", _INT4, _INT4, (_A, _A)),
    )
}
