import dataclasses
import json

import pytest

from quartz_jax.config import QuartzConfig
from quartz_jax.recipes.recipe import RECIPES, Format, Recipe, Rule, get_recipe

BF16 = Format(kind="bf16")
INT8 = Format(kind="int8")
INT4 = Format(kind="int4")
QUARTZ = Format(kind="quartz", config=QuartzConfig())

PATHS = [
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "vector_in.out_layer",
    *(
        f"double_blocks.0.{stream}_{layer}"
        for stream in ("img", "txt")
        for layer in ("mod.lin", "attn.qkv", "attn.proj", "mlp.up", "mlp.down")
    ),
    *(f"single_blocks.11.{layer}" for layer in ("modulation.lin", "linear1", "linear2")),
    "final_layer.modulation",
    "final_layer.linear",
]


def recipe(*rules):
    rules = (Rule(pattern=pattern, weight=weight, activation=BF16) for pattern, weight in rules)
    return Recipe(name="test", rules=tuple(rules))


def test_the_first_rule_that_matches_decides():
    assigned = recipe(("a", INT8), (".", INT4)).assign(["a", "b"])
    assert {path: rule.weight for path, rule in assigned.items()} == {"a": INT8, "b": INT4}


def test_a_pattern_must_match_the_whole_path():
    assert list(recipe(("a", INT8)).assign(["ab", "a"])) == ["a"]


def test_a_linear_without_a_rule_is_not_assigned():
    assert "b" not in recipe(("a", INT8)).assign(["a", "b"])


def test_a_rule_that_matches_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'c\.qkv' matches no linear"):
        recipe(("a", INT8), (r"c.qkv", INT8)).assign(["a", "b"])


def test_a_rule_that_earlier_rules_leave_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match="'a' matches no linear"):
        recipe((".", INT8), ("a", INT8)).assign(["a", "b"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_built_in_recipe_survives_json(name):
    text = json.dumps(RECIPES[name].to_json())
    assert Recipe.from_json(json.loads(text)) == RECIPES[name]


def test_a_recipe_file_is_accepted_in_place_of_a_name(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(recipe(("a", QUARTZ)).to_json()))
    assert get_recipe(str(path)) == recipe(("a", QUARTZ))


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'w3a3'.*bf16, w8a8.*int4"):
        get_recipe("w3a3")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "x"}', '{"name": "x", "rules": [], "extra": 1}', '{"rules": 1}']
)
def test_a_malformed_recipe_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json can't be used"):
        get_recipe(path)


def test_a_missing_recipe_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json can't be used"):
        get_recipe(tmp_path / "absent.json")


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "bf16"])
def test_built_in_recipes_cover_the_blocks_and_nothing_else(name):
    assert set(RECIPES[name].assign(PATHS)) == {path for path in PATHS if "_blocks." in path}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "bf16"])
def test_modulation_is_weight_only_in_the_recipe_s_weight_format(name):
    assigned = RECIPES[name].assign(PATHS)
    lin, qkv = assigned["double_blocks.0.img_mod.lin"], assigned["double_blocks.0.img_attn.qkv"]
    assert (lin.weight, lin.activation) == (qkv.weight, BF16)


def test_bf16_leaves_everything():
    assert RECIPES["bf16"].assign(PATHS) == {}


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("w8a8", "int8", "int8"),
        ("w4a16", "quartz g16", "bf16"),
        ("w4a8", "quartz g16", "int8"),
        ("w4a4", "quartz g16", "quartz g16"),
        ("w4a4-paper", "quartz g16 truncate", "quartz g16 truncate"),
        ("w4a8x", "quartz g16 integer search", "int8"),
        ("w4a4x", "quartz g16 integer search", "quartz g16 integer"),
        ("int4", "int4", "int4"),
    ],
)
def test_formats_of_the_built_in_recipes(name, weight, activation):
    rule = RECIPES[name].assign(PATHS)["double_blocks.0.txt_mlp.up"]
    assert (str(rule.weight), str(rule.activation)) == (weight, activation)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "int3"}, "kind is 'int3'"),
        ({"kind": "quartz"}, "config goes with kind 'quartz'"),
        ({"kind": "int8", "config": QuartzConfig()}, "config goes with kind 'quartz'"),
        ({"kind": "int8", "range": "max"}, "range is 'max'"),
        ({"kind": "int4", "range": "minmax"}, "'minmax' is for int8"),
        ({"kind": "quartz", "config": QuartzConfig(), "search": True}, "search=True needs"),
    ],
)
def test_impossible_formats_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "("}, "not a regular expression"),
        ({"weight": dataclasses.replace(INT8, range="minmax")}, "weights must be absmax"),
        ({"weight": BF16, "activation": INT8}, "needs a bf16 activation"),
        (
            {"activation": Format(kind="quartz", config=QuartzConfig(step="integer"), search=True)},
            "only weights can",
        ),
    ],
)
def test_impossible_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Rule(**{"pattern": "a", "weight": INT8, "activation": BF16} | fields)
