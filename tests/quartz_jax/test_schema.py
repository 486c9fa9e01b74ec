"""JSON of parts: both ways the same, and every refusal says where."""

import abc
import dataclasses
import json
from typing import Any, Literal

import pytest

from quartz_jax import formats, schema
from quartz_jax.formats import NVFP4, Format, Quartz
from quartz_jax.schema import from_json, part, parts, to_json, words


class Shape(abc.ABC):
    """What parts of these tests are of."""

    @abc.abstractmethod
    def area(self) -> float:
        """So that the class is abstract."""


@part(word="square-of-tests")
class Square(Shape):
    """A part with a word."""

    side: float = 1.0

    def __post_init__(self):
        if self.side < 0:
            raise ValueError(f"side is {self.side}; it must not be negative")

    def area(self):
        return self.side**2


@part()
class Pair(Shape):
    """A part that holds others."""

    first: Shape
    second: Shape | None = None

    def area(self):
        return self.first.area()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """Not a part: its class follows from where it stands."""

    number: int
    share: float = 0.5
    name: str = ""
    on: bool = False
    kind: Literal["a", "b"] = "a"
    shapes: tuple[Shape, ...] = ()
    pair: tuple[int, str] = (0, "")
    named: dict[str, float] = dataclasses.field(default_factory=dict)
    either: int | str | None = None
    other: Any = None


VALUES = [
    Plain(number=1),
    Plain(
        number=2,
        share=0.25,
        name="x",
        on=True,
        kind="b",
        shapes=(
            Square(side=2.0),
            Pair(first=Square(), second=Pair(first=Square())),
        ),
        pair=(3, "three"),
        named={"a": 1.5},
        either="word",
        other={"anything": [1, None]},
    ),
]


@pytest.mark.parametrize("value", VALUES)
def test_both_ways_through_a_file_is_the_identity(value):
    assert from_json(Plain, json.loads(json.dumps(to_json(value)))) == value


def test_parts_are_named_and_plain_objects_are_not():
    written = to_json(Plain(number=1, shapes=(Square(side=3.0),)))
    assert "part" not in written
    assert written["shapes"] == [{"part": "Square", "side": 3.0}]


def test_absent_fields_take_their_defaults_and_whole_numbers_do_for_floats():
    assert from_json(Plain, {"number": 1}) == Plain(number=1)
    share = from_json(Plain, {"number": 1, "share": 1}).share
    assert share == 1.0 and type(share) is float


SQUARE = {"part": "Square"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"^plain is \[\]; it must be a JSON object$"),
        ({}, r"^plain has missing fields: number$"),
        ({"number": 1, "b": 1, "a": 2}, r"^plain has unknown fields: a, b$"),
        ({"number": 1.5}, r"^plain\.number is 1\.5; it must be a whole number$"),
        ({"number": True}, r"^plain\.number is True; it must be a whole number$"),
        ({"number": 1, "share": "1"}, r"^plain\.share is '1'; it must be a number$"),
        ({"number": 1, "name": 1}, r"^plain\.name is 1; it must be a string$"),
        ({"number": 1, "on": 1}, r"^plain\.on is 1; it must be true or false$"),
        ({"number": 1, "kind": "c"}, r"^plain\.kind is 'c'; it must be one of 'a', 'b'$"),
        ({"number": 1, "shapes": {}}, r"^plain\.shapes is \{\}; it must be a list$"),
        ({"number": 1, "shapes": [SQUARE, 1]}, r"^plain\.shapes\[1\] is 1; it must be a JSON ob"),
        ({"number": 1, "pair": [1]}, r"^plain\.pair is \[1\]; it must be a list of 2$"),
        ({"number": 1, "pair": [1, 2]}, r"^plain\.pair\[1\] is 2; it must be a string$"),
        ({"number": 1, "named": []}, r"^plain\.named is \[\]; it must be a JSON object$"),
        ({"number": 1, "named": {"a": "b"}}, r"^plain\.named\.a is 'b'; it must be a number$"),
        ({"number": 1, "either": 1.5}, r"^plain\.either is 1\.5; .* or plain\.either is 1\.5; it"),
        (
            {"number": 1, "shapes": [{"part": "Circle"}]},
            r"^plain\.shapes\[0\]\.part is 'Circle'; it must be one of Pair, Square$",
        ),
        (
            {"number": 1, "shapes": [{"part": "Int"}]},  # a part, but of another kind
            r"^plain\.shapes\[0\]\.part is 'Int'; it must be one of Pair, Square$",
        ),
        (
            {"number": 1, "shapes": [{"part": "Pair", "first": {**SQUARE, "side": -1}}]},
            r"^plain\.shapes\[0\]\.first: side is -1\.0; it must not be negative$",
        ),
        (
            {"number": 1, "shapes": [{"part": "Pair"}]},
            r"^plain\.shapes\[0\] has missing fields: first$",
        ),
        ({"number": "x" * 100}, r"^plain\.number is 'x{56}\.\.\.; it must be a whole number$"),
    ],
)
def test_what_is_refused_says_where_and_what_to_do(value, message):
    with pytest.raises(ValueError, match=message):
        from_json(Plain, value)


def test_messages_take_the_name_of_what_is_read():
    with pytest.raises(ValueError, match=r"^rules\[3\]\.weight: width is 9; it must be one of"):
        from_json(Format, {"part": "Int", "width": 9}, where="rules[3].weight")


def test_a_clash_of_names_is_refused_and_the_first_stays():
    with pytest.raises(ValueError, match=r"'Int' is quartz_jax\.formats\.integer\.Int already"):

        @part()
        class Int:
            """Another one."""

    assert parts(Format)["Int"] is formats.Int


def test_a_clash_of_words_is_refused_and_the_first_stays():
    with pytest.raises(ValueError, match=r"'square-of-tests' is .*Square already"):

        @part(word="square-of-tests")
        class SquareAgain:
            """Another one."""

    assert words(Shape) == {"square-of-tests": Square}


def test_a_module_that_is_read_again_replaces_its_own_parts():
    again = part()(type("Pair", (), {"__module__": __name__, "__qualname__": "Pair"}))
    assert schema._PARTS["Pair"] is again
    schema._PARTS["Pair"] = Pair


def test_parts_are_frozen_and_take_keywords_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Square().side = 2
    with pytest.raises(TypeError):
        Square(2.0)


def test_parts_of_a_kind_are_listed_alone():
    assert set(parts(Shape)) == {"Square", "Pair"}
    assert {"Quartz", "Int", "NVFP4"} <= set(parts(Format))
    assert parts(Format)["Quartz"] is Quartz and parts(Format)["NVFP4"] is NVFP4
