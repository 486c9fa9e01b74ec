"""QuartzConfig: what it accepts, and its JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartz_jax import QuartzConfig


@st.composite
def configs(draw):
    """Any valid configuration."""
    group_size = draw(st.sampled_from((8, 16, 32, 64)))
    step = draw(st.sampled_from(("power", "integer")))
    free = step == "power"
    return QuartzConfig(
        group_size=group_size,
        step=step,
        rounding=draw(st.sampled_from(("nearest", "truncate"))) if free else "nearest",
        range=draw(st.sampled_from(("absmax", "minmax"))) if free else "absmax",
        scale_block=draw(st.none() | st.integers(1, 8).map(lambda n: n * group_size)),
    )


@given(config=configs())
def test_json_round_trip_is_the_identity(config):
    assert QuartzConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@given(config=configs())
def test_configs_are_hashable(config):
    assert hash(config) == hash(QuartzConfig.from_json(config.to_json()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 12}, "group_size is 12"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": [16]}, "group_size is"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"range": "max"}, "range is 'max'"),
        ({"step": "float"}, "step is 'float'"),
        ({"step": "integer", "range": "minmax"}, "range is 'minmax' with step='integer'"),
        ({"step": "integer", "rounding": "truncate"}, "rounding is 'truncate'"),
        ({"scale_block": 24}, "scale_block is 24"),
        ({"scale_block": 0}, "scale_block is 0"),
        ({"scale_block": -16}, "scale_block is -16"),
        ({"scale_block": 32.0}, "scale_block is 32.0"),
        ({"scale_block": "32"}, "scale_block is '32'"),
    ],
)
def test_excluded_values_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        QuartzConfig(**fields)


def test_unknown_json_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown fields colour"):
        QuartzConfig.from_json({"group_size": 16, "colour": "red"})


@pytest.mark.parametrize("value", [None, [16], "w4a4"])
def test_json_that_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="must be a JSON object"):
        QuartzConfig.from_json(value)
