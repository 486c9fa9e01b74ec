"""Methods: what is done to which linears, with JSON both ways."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from quartz_jax.formats import NumberFormat
from quartz_jax.rounding.gptq import Gptq, Nearest
from quartz_jax.schema import from_json, part, to_json


@part
class LayerMethod:
    """How one linear is quantized: transforms in order, then rounding to the formats."""

    weight: NumberFormat
    activation: NumberFormat | None = None  # of the input; None leaves it 16-bit
    transforms: tuple = ()  # Shift, Smooth, ReverseSmooth, Rotate, LowRank
    rounding: Nearest | Gptq = Nearest()  # of the weights

    def __post_init__(self):
        for name, value in {"weight": self.weight, "activation": self.activation}.items():
            if not isinstance(value, NumberFormat) and not (name == "activation" and value is None):
                raise ValueError(f"{name} is {value!r}; it must be a number format")
        for transform in self.transforms:
            if not hasattr(transform, "fit"):
                raise ValueError(f"transforms holds {transform!r}, which is no transform")

    @property
    def rank(self) -> int:
        """Of the 16-bit branch; 0 without one."""
        return sum(getattr(transform, "rank", 0) for transform in self.transforms)


@part
class MethodRule:
    """The linears that a method treats alike."""

    pattern: str  # regular expression for a whole path
    method: LayerMethod

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"pattern {self.pattern!r} is no regular expression: {error}"
            ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Ordered rules for a whole model; a linear that none matches stays 16-bit."""

    name: str  # shown in reports
    rules: tuple[MethodRule, ...]  # the first that matches a path decides

    @property
    def calibrated(self) -> bool:
        """Whether any part needs recorded inputs."""
        parts = [p for r in self.rules for p in (*r.method.transforms, r.method.rounding)]
        return any(type(p).__name__ in _CALIBRATED for p in parts)

    def assign(self, paths: Iterable[str]) -> dict[str, LayerMethod]:
        """Return what is done to each linear that a rule matches, in the order of the paths.

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
                    f"method {self.name!r}: rule {rule.pattern!r} matches no linear of this model "
                    "that an earlier rule leaves; correct or remove it"
                )
        return {path: rule.method for path, rule in first.items() if rule is not None}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"name": self.name, "method": to_json(self.rules)}

    @classmethod
    def from_json(cls, value: Any) -> "Method":
        """Undo `to_json`; raises ValueError for anything else."""
        if not isinstance(value, dict) or set(value) != {"name", "method"}:
            raise ValueError("a method is a JSON object with the fields name and method")
        return cls(name=value["name"], rules=from_json(value["method"]))


_CALIBRATED = ("Smooth", "ReverseSmooth", "LowRank", "Gptq")
