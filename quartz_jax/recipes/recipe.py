"""What is done to which layers of a model: ordered rules, JSON both ways.

A layer takes the first rule that matches it; one that no rule matches stays 16-bit.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import regex

from pallas_kernels.arguments import CHOICES
from quartz_jax import schema
from quartz_jax.formats import Format, Int, Quartz, Stored
from quartz_jax.io.files import read_json
from quartz_jax.recipes.earlier import from_version_2
from quartz_jax.recipes.fold import fold
from quartz_jax.recipes.sites import ROLES, Site
from quartz_jax.rounding import Nearest, Rounding
from quartz_jax.transforms import Layer, Transform, Wide
from quartz_jax.transforms.base import HIGHEST, Need
from quartz_jax.transforms.wide import rounded_input, widen

FORMAT_VERSION = 3  # of a recipe's JSON
MAIN = ""  # key of the recipe for the component sampled with, whatever its family calls it
_LONGEST_PATTERN = 2000  # characters
_MATCH_SECONDS = 1.0  # for a pattern and a path; what takes longer would take hours


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecipe:
    """What is done to one layer: transforms in order, then rounding to the formats."""

    weight: Format | None = None  # of the weight; None leaves the whole layer 16-bit
    activation: Format | None = None  # of the input; None leaves it 16-bit
    transforms: tuple[Transform, ...] = ()
    rounding: Rounding = Nearest()  # of the weight  # noqa: RUF009 (frozen)
    # Of the input's groups, the share that keeps eight bits where the others have four: those that
    # calibration finds the dearest, beside the others in one dot
    wide: float = 0.0

    def __post_init__(self):
        for name, kind in (("weight", Format), ("activation", Format)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}; it must be a number format or None")
        for transform in self.transforms:
            if not isinstance(transform, Transform):
                raise ValueError(f"transforms holds {transform!r}, which is no transform")
        if not isinstance(self.rounding, Rounding):
            raise ValueError(f"rounding is {self.rounding!r}; it must be a Rounding")
        if self.weight is None and (self.activation or self.transforms):
            raise ValueError("weight is None, so that nothing else can be done to the layer")
        if isinstance(self.weight, Quartz | Int) and self.weight.range != "absmax":
            raise ValueError(f"weight is {self.weight}; weights must be symmetric (absmax)")
        if getattr(self.activation, "search", False):
            raise ValueError(f"activation is {self.activation}; only weights can be searched")
        self._check_wide()
        blocks = [f.scale_block for f in (self.weight, self.activation) if f and f.scale_block]
        if len(set(blocks)) > 1:
            raise ValueError(
                f"weight has scale_block={blocks[0]} and activation {blocks[1]}; both must be the "
                "same where both have one"
            )

    def _check_wide(self) -> None:
        if isinstance(self.wide, bool) or not 0 <= self.wide < 1:
            raise ValueError(f"wide is {self.wide!r}; it must be a share, from 0 to below 1")
        kind, sizes = self.activation, CHOICES["group_size"]
        if not self.wide or (
            isinstance(kind, Quartz) and kind.scale_block is None and kind.group_size in sizes
        ):
            return
        raise ValueError(
            f"wide is {self.wide} and activation {kind}; only groups of a Quartz activation with "
            f"one scale a row, of {', '.join(map(str, sizes))} channels, can keep eight bits"
        )

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics of its inputs that it reads; the mean too, where a Gram matrix shifts."""
        needs = frozenset().union(self.rounding.needs, *(t.needs for t in self.transforms))
        needs |= {"absmax"} if self.wide else frozenset()
        return needs | {"mean"} if "gram" in needs else needs

    def fit(self, layer: Layer) -> Layer:
        """Return the layer behind all transforms; traceable."""
        for i, transform in enumerate(self.transforms):
            layer = transform.fit(layer, self._from(i + 1))
        if not self.wide:
            return layer
        assert isinstance(self.activation, Quartz)
        return widen(layer, self.wide, self.activation.group_size)

    def store(self, layer: Layer) -> Stored:
        """Return the weight of a fitted layer in its format; traceable."""
        assert self.weight is not None
        return self.rounding.store(layer, self.weight)

    def error(self, layer: Layer) -> jax.Array:
        """Return the squared error of a candidate's output on its rows, once the rest is done.

        Transforms take their quick forms, and rounding is to nearest: what is compared is
        candidates, not the last word on each.
        """
        quick = dataclasses.replace(self, transforms=tuple(t.quick() for t in self.transforms))
        fitted = quick.fit(layer)
        rows, weight = fitted.seen.rows, fitted.weight
        assert rows is not None
        last = fitted.ops[-1] if fitted.ops else None
        wide = last.groups if isinstance(last, Wide) else None
        given = rounded_input(rows, self.activation, wide)
        # x w - x' w' = (x - x') w + x' (w - w'): products of small differences
        error = jnp.matmul(rows - given, weight.T, precision=HIGHEST)
        rest = jnp.matmul(given, (weight - self.rounded(weight)).T, precision=HIGHEST)
        return jnp.sum((error + rest) ** 2)

    def rounded(self, weight: jax.Array) -> jax.Array:
        """Return a weight [n, k] rounded to nearest, float32."""
        assert self.weight is not None
        return self.weight(weight)

    def _from(self, index: int) -> "LayerRecipe":
        return dataclasses.replace(self, transforms=self.transforms[index:])

    def input_words(self) -> str:
        """Return what the input becomes, in words."""
        if self.activation is None:
            return "bf16"
        return f"{self.activation}{f' {self.wide:.0%} wide' if self.wide else ''}"

    def words(self) -> str:
        """Return what is done to the weight, in words."""
        if self.weight is None:
            return "bf16"
        steps = [*self.transforms, *([] if self.rounding == Nearest() else [self.rounding])]
        return " ".join([*(type(step).__name__.lower() for step in steps), str(self.weight)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """Which layers a rule is for: those that have all that is given."""

    role: str | tuple[str, ...] | None = None  # what the layer is in the model, see `sites.ROLES`
    path: str | None = None  # regular expression for the whole path
    kind: Literal["linear", "conv"] | None = None
    blocks: tuple[int, int] | None = None  # first and behind the last block of its list

    def __post_init__(self):
        unknown = set(self.roles or ()) - set(ROLES)
        if unknown:
            raise ValueError(
                f"role is {sorted(unknown)[0]!r}; it must be one of {', '.join(ROLES)}"
            )
        if self.path is not None:
            _check_pattern(self.path)

    @property
    def roles(self) -> tuple[str, ...] | None:
        """The roles as a tuple."""
        return (self.role,) if isinstance(self.role, str) else self.role

    def __call__(self, site: Site) -> bool:
        """Whether it matches a layer."""
        return (
            (self.roles is None or site.role in self.roles)
            and (self.path is None or _matches(self.path, site.path))
            and (self.kind is None or site.kind == self.kind)
            and (self.blocks is None or site.block in range(*self.blocks))
        )

    def __str__(self):
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return ", ".join(f"{key} {value!r}" for key, value in given.items()) or "everything"


def _check_pattern(pattern: str) -> None:
    """Raise ValueError unless a pattern is a regular expression of bearable length."""
    shown = repr(pattern) if len(str(pattern)) <= 100 else f"{str(pattern)[:100]!r}..."
    if isinstance(pattern, str) and len(pattern) > _LONGEST_PATTERN:
        raise ValueError(
            f"path {shown} has {len(pattern)} characters; at most {_LONGEST_PATTERN} may be"
        )
    try:
        regex.compile(pattern)
    except (regex.error, TypeError, RecursionError) as error:
        raise ValueError(f"path {shown} is not a regular expression: {error}") from None


def _matches(pattern: str, path: str) -> bool:
    """Whether a regular expression is for a whole path.

    Raises:
      ValueError: it tries more ways than can be waited for.
    """
    try:
        return regex.fullmatch(pattern, path, timeout=_MATCH_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"path {pattern!r} takes too long to match {path!r}: repetitions within repetitions "
            "have too many ways; write it without"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What is done to the layers that match."""

    match: Match
    layer: LayerRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered rules for a whole model."""

    name: str  # shown in reports and stored in checkpoints
    rules: tuple[Rule, ...]  # the first that matches a layer decides
    # what attention reads: 16-bit floats, or int8 queries and keys and float8 values where the
    # device has kernels for them
    attention: Literal["bf16", "int8_fp8"] = "bf16"

    def assign(self, sites: Iterable[Site]) -> dict[str, LayerRecipe]:
        """Return what is done to each layer that is quantized, by path, in the order of sites.

        Rotations are folded where they say so and the model lets them.

        Args:
          sites: all layers of the model, `recipes.sites.sites`.

        Raises:
          ValueError: a rule with a path decides no layer, none of the rules does, or one decides a
            layer that can't be quantized; the layer and its class are named.
        """
        return self._folded(sites)[0]

    def online(self, sites: Iterable[Site]) -> dict[str, str]:
        """Return why layers whose rotation was to be folded rotate online all the same, by path.

        Those have a reason that read what attention makes. Arguments and errors as for `assign`.
        """
        return self._folded(sites)[1]

    def _folded(self, sites: Iterable[Site]) -> tuple[dict[str, LayerRecipe], dict[str, str]]:
        sites = list(sites)
        return fold(self._assigned(sites), sites)

    def _assigned(self, sites: list[Site]) -> dict[str, LayerRecipe]:
        """Return what the rules say of each layer."""
        first = {s.path: next((r for r in self.rules if r.match(s)), None) for s in sites}
        decided = [rule for rule in first.values() if rule is not None]
        for rule in self.rules:
            if rule.match.path is not None and rule not in decided:
                raise ValueError(
                    f"recipe {self.name!r}: rule {rule.match.path!r} matches no linear of this "
                    "model that an earlier rule leaves; correct or remove it"
                )
        if self.rules and not decided:
            raise ValueError(
                f"recipe {self.name!r} matches no linear of this model; its rules are for "
                + "; ".join(str(rule.match) for rule in self.rules)
            )
        assigned = {
            path: rule.layer
            for path, rule in first.items()
            if rule is not None and rule.layer.weight is not None
        }
        for site in sites:
            if site.path in assigned and site.obstacle:
                raise ValueError(
                    f"recipe {self.name!r} would quantize {site.path or 'the model'}, but "
                    f"{site.obstacle}; replace it, or put a rule with weight null for it first"
                )
        return assigned

    def needs(self, sites: Iterable[Site]) -> dict[str, frozenset[Need]]:
        """Return which statistics each layer's recipe reads, by path; layers with none left out."""
        assigned = self.assign(sites)
        return {path: layer.needs for path, layer in assigned.items() if layer.needs}

    @property
    def calibrated(self) -> bool:
        """Whether any rule reads statistics of inputs."""
        return any(rule.layer.needs for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"format_version": FORMAT_VERSION} | schema.to_json(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Undo `to_json`; recipes and methods of earlier versions too.

        Raises:
          ValueError: an unknown or missing field, or a newer version.
        """
        if not isinstance(value, dict):
            raise ValueError(f"recipe must be a JSON object, not {type(value).__name__}")
        version = value.get("format_version", 2)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"recipe.format_version is {version!r}; this quartz-jax reads up to "
                f"{FORMAT_VERSION}"
            )
        value = {key: item for key, item in value.items() if key != "format_version"}
        value = value if version == FORMAT_VERSION else from_version_2(value)
        return schema.from_json(cls, value)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a JSON file.

    Raises:
      ValueError: the file can't be read, or holds none.
    """
    try:
        return Recipe.from_json(read_json(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe file {path} can't be used: {error}") from None
