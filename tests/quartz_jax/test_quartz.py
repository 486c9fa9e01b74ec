"""The Quartz format: what it accepts, its JSON and its name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartz_jax.formats import Format, Quartz
from quartz_jax.schema import from_json, to_json


@st.composite
def variants(draw):
    """Any valid variant."""
    group_size = draw(st.sampled_from((8, 16, 32, 64)))
    step = draw(st.sampled_from(("power", "integer")))
    free = step == "power"
    return Quartz(
        group_size=group_size,
        step=step,
        levels="uniform" if free else draw(st.sampled_from(("uniform", "stretched"))),
        search=False if free else draw(st.booleans()),
        rounding=draw(st.sampled_from(("nearest", "truncate"))) if free else "nearest",
        range=draw(st.sampled_from(("absmax", "minmax"))) if free else "absmax",
        scale_block=draw(st.none() | st.integers(1, 8).map(lambda n: n * group_size)),
    )


@given(variant=variants())
def test_json_round_trip_is_the_identity(variant):
    again = from_json(Format, json.loads(json.dumps(to_json(variant))))
    assert again == variant and hash(again) == hash(variant)


@given(first=variants(), second=variants())
def test_names_tell_variants_apart(first, second):
    assert (str(first) == str(second)) == (first == second)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 16.0}, "group_size is 16.0"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": [16]}, "group_size is"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"range": "max"}, "range is 'max'"),
        ({"step": "float"}, "step is 'float'"),
        ({"step": "integer", "range": "minmax"}, "range is 'minmax' with step='integer'"),
        ({"step": "integer", "rounding": "truncate"}, "rounding is 'truncate'"),
        ({"levels": "logarithmic"}, "levels is 'logarithmic'"),
        ({"levels": "stretched"}, "step is 'power' with levels='stretched'"),
        ({"search": True}, "search is True; it needs step='integer'"),
        ({"scale_block": 24}, "scale_block is 24"),
        ({"scale_block": 0}, "scale_block is 0"),
        ({"scale_block": -16}, "scale_block is -16"),
        ({"scale_block": 32.0}, "scale_block is 32.0"),
        ({"scale_block": "32"}, "scale_block is '32'"),
    ],
)
def test_excluded_values_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Quartz(**fields)


def test_unknown_json_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="quartz has unknown fields: colour"):
        from_json(Quartz, {"part": "Quartz", "group_size": 16, "colour": "red"})


@pytest.mark.parametrize("value", [None, [16], "w4a4"])
def test_json_that_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="must be a JSON object"):
        from_json(Quartz, value)
