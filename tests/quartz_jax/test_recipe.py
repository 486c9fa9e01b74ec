"""Rules, what they match in models of every kind, names, and JSON of every version."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from blocks import build as build_foreign
from blocks import rule
from flax import nnx

from models.flux import FluxTransformer
from models.text_encoders import CLIPTextEncoder, T5Encoder
from models.text_encoders.decoder import Decoder, DecoderConfig
from quartz_jax import Int, LayerRecipe, Match, Quartz, Recipe, Rule, get_recipe, schema, sites
from quartz_jax.engine.linear import how_it_runs
from quartz_jax.formats import IF4, MXFP4, NVFP4, FittedTable
from quartz_jax.recipes import RECIPES, ROLES, Site
from quartz_jax.recipes.names import BENCH, FORMATS, split_names
from quartz_jax.rounding import Gptq, Nearest
from quartz_jax.transforms import LowRank, Rotate, Shift, Smooth

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from small_flux import SIZES

INT8, INT4, QUARTZ = Int(width=8), Int(width=4), Quartz()
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "recipes_v2.json").read_text())
DECODER = DecoderConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
QUANTIZING = [name for name in RECIPES if name != "bf16"]


def site(path, **fields):
    fields = {"kind": "linear", "n": 8, "k": 8, "block": None, "role": "linear"} | fields
    return Site(path=path, **fields)


def recipe(*rules):
    return Recipe(name="test", rules=tuple(rules))


def assign(rules, *paths):
    return recipe(*rules).assign([site(path) for path in paths])


def models():
    """Sites of one model of each kind, without arrays."""
    build = {
        "flux": lambda: FluxTransformer(SIZES["transformer"], rngs=nnx.Rngs(0)),
        "t5": lambda: T5Encoder(SIZES["text_encoder_2"], rngs=nnx.Rngs(0)),
        "clip": lambda: CLIPTextEncoder(SIZES["text_encoder"], rngs=nnx.Rngs(0)),
        "decoder": lambda: Decoder(DECODER, rngs=nnx.Rngs(0)),
        "foreign": build_foreign,
    }
    return {name: sites(nnx.eval_shape(make)) for name, make in build.items()}


MODELS = models()
FLUX = {s.path: s for s in MODELS["flux"]}


def test_the_first_rule_that_matches_decides():
    assigned = assign([rule("a", INT8), rule(".", INT4)], "a", "b")
    assert {path: layer.weight for path, layer in assigned.items()} == {"a": INT8, "b": INT4}


def test_a_path_must_match_whole():
    assert list(assign([rule("a", INT8)], "ab", "a")) == ["a"]


def test_a_linear_without_a_rule_or_with_one_for_nothing_is_not_assigned():
    assert list(assign([rule("a", INT8), rule("c")], "a", "b", "c")) == ["a"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([rule("a", INT8), rule(r"c.qkv", INT8)], r"'c\.qkv' matches no linear"),
        ([rule(".", INT8), rule("a", INT8)], "'a' matches no linear.*an earlier rule leaves"),
        ([Rule(match=Match(role="head"), layer=LayerRecipe(weight=INT8))], "for role 'head'"),
    ],
)
def test_rules_that_decide_nothing_are_refused_by_name(rules, message):
    with pytest.raises(ValueError, match=message):
        assign(rules, "a", "b")


def test_a_role_rule_may_match_nothing_beside_one_that_does():
    rules = [Rule(match=Match(role=role), layer=LayerRecipe(weight=INT8)) for role in ROLES]
    assert list(assign(rules, "a")) == ["a"]


@pytest.mark.parametrize(
    ("match", "paths"),
    [
        ({"role": "mlp_out"}, {"x.0.down", "x.1.down"}),
        ({"role": ("mlp_out", "head")}, {"x.0.down", "x.1.down", "out"}),
        ({"blocks": (1, 2)}, {"x.1.up", "x.1.down"}),
        ({"role": "mlp_out", "blocks": (0, 1)}, {"x.0.down"}),
        ({"path": r"x\..*", "role": "mlp_in"}, {"x.0.up", "x.1.up"}),
        ({"kind": "conv"}, set()),
        ({}, {"x.0.up", "x.0.down", "x.1.up", "x.1.down", "out"}),
    ],
)
def test_a_match_needs_all_that_it_gives(match, paths):
    kinds = {"up": "mlp_in", "down": "mlp_out"}
    found = [
        site(f"x.{i}.{name}", role=role, block=i) for i in range(2) for name, role in kinds.items()
    ]
    found.append(site("out", role="head"))
    assert {s.path for s in found if Match(**match)(s)} == paths


def test_flux_states_the_role_of_every_linear():
    roles = {path: s.role for path, s in FLUX.items()}
    expected = {
        "double_blocks.1.img_mod.lin": "modulation",
        "double_blocks.1.txt_attn.qkv": "attention_in",
        "double_blocks.1.img_attn.proj": "attention_out",
        "double_blocks.1.txt_mlp.up": "mlp_in",
        "double_blocks.1.img_mlp.down": "mlp_out",
        "single_blocks.2.modulation.lin": "modulation",
        "single_blocks.2.linear1": "mixed_in",
        "single_blocks.2.linear2": "mixed_out",
        "final_layer.linear": "head",
        "final_layer.modulation": "embed",
        "img_in": "embed",
    }
    assert {path: roles[path] for path in expected} == expected
    assert FLUX["double_blocks.1.img_mlp.down"].block == 1
    assert FLUX["img_in"].block is None
    wide = FLUX["double_blocks.1.img_mlp.up"]
    assert (wide.n, wide.k) == (4 * wide.k, FLUX["img_in"].n)


@pytest.mark.parametrize("name", QUANTIZING)
def test_presets_cover_flux_s_blocks_and_leave_the_rest(name):
    assigned = RECIPES[name].assign(MODELS["flux"])
    assert set(assigned) == {path for path in FLUX if "_blocks." in path}
    plain = assigned["double_blocks.0.img_attn.qkv"]
    for path in ("double_blocks.0.img_mod.lin", "single_blocks.0.modulation.lin"):
        # Weight-only, by the same rounding, and in groups of 8 where levels are stretched.
        weight = plain.weight
        if getattr(weight, "levels", None) == "stretched":
            weight = dataclasses.replace(weight, group_size=8)
        expected = dataclasses.replace(plain, weight=weight, activation=None, transforms=())
        assert assigned[path] == expected


@pytest.mark.parametrize("name", QUANTIZING)
def test_presets_leave_the_overflowing_inputs_of_t5_alone(name):
    for path, layer in RECIPES[name].assign(MODELS["t5"]).items():
        role = next(s.role for s in MODELS["t5"] if s.path == path)
        plain = next(r.layer for r in RECIPES[name].rules if r.match(site("", role="mlp_in")))
        assert layer.activation == (None if role == "outlier_out" else plain.activation)


@pytest.mark.parametrize("model", ["clip", "decoder", "foreign"])
@pytest.mark.parametrize("name", QUANTIZING)
def test_presets_serve_other_models(model, name):
    paths = {s.path for s in MODELS[model] if s.role not in ("embed", "head")}
    assert set(RECIPES[name].assign(MODELS[model])) == paths
    assert paths


def test_a_model_that_states_some_roles_keeps_the_others_out():
    class Half(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
            self.b.role = "mlp_in"

    assert {s.path: s.role for s in sites(Half())} == {"a": "embed", "b": "mlp_in"}


def test_presets_whose_errors_hide_those_of_8_bit_attention_have_it():
    found = {name for name, recipe in RECIPES.items() if recipe.attention == "int8_fp8"}
    ours = {"w4a8x", "w4a4x", "w4a8x-gptq", "w4a4x-gptq", "w4a8x-branch"}
    assert found == ours | {"w4a4"}


def test_bf16_leaves_everything():
    assert all(RECIPES["bf16"].assign(found) == {} for found in MODELS.values())


STRETCHED, SEARCHED = "quartz g16 stretched", "quartz g16 stretched search"


@pytest.mark.parametrize(
    ("name", "weight", "activation", "behind_gelu"),
    [
        ("w8a8", "int8", "int8", "int8 minmax"),
        ("w4a16", "quartz g16", "bf16", "bf16"),
        ("w4a8", "quartz g16", "int8", "int8 minmax"),
        ("w4a4", "quartz g16", "quartz g16", "quartz g16"),
        ("w4a4-paper", "quartz g16 truncate", "quartz g16 truncate", "quartz g16 truncate"),
        ("int4", "int4", "int4", "int4"),
        ("w4a8x", SEARCHED, "int8", "int8 minmax"),
        ("w4a4x", SEARCHED, STRETCHED, STRETCHED),
        ("w4a8x-gptq", f"rotate gptq {SEARCHED}", "int8", "int8"),
        ("w4a4x-gptq", f"rotate gptq {SEARCHED}", STRETCHED, STRETCHED),
        ("w4a8x-branch", f"smooth lowrank gptq {SEARCHED}", "int8", "int8"),
    ],
)
def test_what_the_presets_do(name, weight, activation, behind_gelu):
    assigned = RECIPES[name].assign(MODELS["flux"])
    plain, last = (assigned[f"double_blocks.0.txt_mlp.{x}"] for x in ("up", "down"))
    assert (plain.words(), str(plain.activation or "bf16")) == (weight, activation)
    for layer in (last, assigned["single_blocks.0.linear2"]):
        assert str(layer.activation or "bf16") == behind_gelu
        assert layer.weight == plain.weight


def test_every_preset_is_described_here():
    marks = test_what_the_presets_do.pytestmark
    assert {row[0] for mark in marks for row in mark.args[1]} == set(QUANTIZING)


# Layers that can't be quantized: what stands in a model's place, and what is said of it.


class Scaled(nnx.Linear):
    """A linear that computes something more."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Stated(nnx.Linear):
    """A linear that says that it computes nothing more."""

    quantizable = True


@nnx.vmap(in_axes=0, out_axes=0)
def stack(key):
    return nnx.Linear(4, 4, rngs=nnx.Rngs(key))


OBSTACLES = {
    "is a Scaled, and what that adds": lambda r: Scaled(4, 4, rngs=r),
    "is an nnx.LinearGeneral": lambda r: nnx.LinearGeneral(4, (2, 2), rngs=r),
    "is an nnx.Einsum": lambda r: nnx.Einsum("ab,bc->ac", (4, 4), rngs=r),
    r"has shape \[3, 4, 4\]: scanned stacks": lambda r: stack(
        jax.random.split(jax.random.key(0), 3)
    ),
}


@pytest.mark.parametrize("message", OBSTACLES)
def test_what_cannot_be_quantized_is_refused_by_path(message):
    class Holder(nnx.Module):
        def __init__(self):
            self.plain = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.odd = OBSTACLES[message](nnx.Rngs(0))

    found = sites(Holder())
    with pytest.raises(ValueError, match=f"would quantize odd, but it.*{message}"):
        recipe(rule(".*", INT8)).assign(found)
    assert list(recipe(rule("odd"), rule(".*", INT8)).assign(found)) == ["plain"]


def test_a_linear_that_is_the_model_is_refused():
    with pytest.raises(ValueError, match="quantize the model, but it is the model itself"):
        recipe(rule(".*", INT8)).assign(sites(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))


def test_a_subclass_that_says_it_adds_nothing_can_be_quantized():
    model = nnx.Sequential(Stated(4, 4, rngs=nnx.Rngs(0)))
    assert list(recipe(rule(".*", INT8)).assign(sites(model))) == ["layers.0"]


# Names


@pytest.mark.parametrize(
    "name", [*dict.fromkeys([*RECIPES, *split_names(BENCH), *(x for x in FORMATS if x != "bf16")])]
)
def test_every_name_resolves_survives_json_and_says_how_it_runs(name):
    found = get_recipe(name)
    assert Recipe.from_json(json.loads(json.dumps(found.to_json()))) == found
    for layer in found.assign(MODELS["flux"]).values():
        how = how_it_runs(abstract(layer.weight), layer.activation)
        assert how in ("int8", "int8 blocks", "bf16", "simulated", "weight-only")
        assert how == "weight-only" or how == EXECUTION.get(name.split("+")[-1], "int8")


# By the formats that a name ends with; all others are int8.
EXECUTION = {
    "int4-g64": "simulated",
    "int4-g16": "simulated",
    "if4": "simulated",
    "sdr": "bf16",
    "sdr-g32": "bf16",
    "mxfp4": "bf16",
    "nvfp4": "bf16",
    "nvfp4-4or6": "bf16",
    "razer": "bf16",
    "hif4": "bf16",
    "int4-g64/quartz-g32-block64": "simulated",
    "quartz-g32-block64": "int8 blocks",
}


def abstract(format_):
    return jax.eval_shape(format_.store, jax.ShapeDtypeStruct((16, 128), jnp.float32))


def test_names_compose():
    found = get_recipe("rotate+gptq+int4-g64/nvfp4").rules[-1].layer
    assert found == LayerRecipe(
        weight=Int(width=4, block=64, scale="float16"),
        activation=NVFP4(),
        transforms=(Rotate(),),
        rounding=Gptq(),
    )
    assert get_recipe("rotate16+int4/bf16").rules[-1].layer == LayerRecipe(
        weight=INT4, transforms=(Rotate(block=16),)
    )
    assert get_recipe("svdquant+if4").rules[-1].layer.transforms == (Smooth(), LowRank())
    assert get_recipe("asym-w4a8").rules[-1].layer == LayerRecipe(
        weight=FittedTable(), activation=INT8
    )


def test_inputs_behind_gelu_are_one_sided_unless_they_are_rotated():
    def down(name):
        return get_recipe(name).assign(MODELS["flux"])["double_blocks.0.img_mlp.down"]

    assert down("smooth+int4-g64").transforms == (Shift(), Smooth())
    assert down("smooth+int4-g64").activation.range == "unsigned"
    assert down("rotate+int4-g64").transforms == (Rotate(),)
    assert down("rotate+int4-g64").activation.range == "absmax"
    assert down("quartz").activation.range == "minmax"
    assert down("nvfp4").activation == NVFP4()


def test_a_list_of_names_keeps_its_order_and_knows_the_bench():
    assert split_names("quartz, int8,quartz") == ["quartz", "int8"]
    assert split_names("bench") == BENCH.split(",")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w3a3", r"unknown recipe 'w3a3'.*bf16, w8a8.*int4"),
        ("smooth+int5", r"unknown recipe 'smooth\+int5': 'int5' is none of"),
        ("spin+nvfp4", "'spin' is none of"),
        ("bf16/int8", "'bf16' is none of"),
        ("gptq", "'gptq' is none of"),
    ],
)
def test_an_unknown_name_says_what_is_known(name, message):
    with pytest.raises(ValueError, match=message):
        get_recipe(name)


# Earlier versions


def formats_of(assigned):
    return {path: (layer.weight, layer.activation) for path, layer in assigned.items()}


def as_it_was(name, layer):
    """Return the formats of a layer of a built-in recipe with what has changed since undone."""
    weight, activation = layer.weight, layer.activation
    if name in ("w4a8x", "w4a4x"):  # stretched since, and finer in modulation
        weight = dataclasses.replace(weight, levels="uniform", group_size=16)
        if isinstance(activation, Quartz):
            activation = dataclasses.replace(activation, levels="uniform")
    return weight, activation


@pytest.mark.parametrize("old", GOLDEN["recipes"], ids=lambda r: r["name"])
def test_recipes_of_version_2_mean_the_same_formats(old):
    found = formats_of(Recipe.from_json(old).assign(MODELS["flux"]))
    now = get_recipe(old["name"]).assign(MODELS["flux"])
    now = {path: as_it_was(old["name"], layer) for path, layer in now.items()}
    if old["name"] in ("w4a4", "w4a4-paper"):  # absmax behind GELU since: images chose it
        for path in found:
            if path.endswith("_mlp.down"):
                weight, activation = found[path]
                assert activation.range == "minmax"
                found[path] = weight, dataclasses.replace(activation, range="absmax")
    assert found == now


@pytest.mark.parametrize("old", GOLDEN["t5"], ids=lambda r: r["name"])
def test_recipes_of_version_2_for_t5_mean_the_same_formats(old):
    found = Recipe.from_json(old).assign(MODELS["t5"])
    assert formats_of(found) == formats_of(get_recipe(old["name"]).assign(MODELS["t5"]))


@pytest.mark.parametrize("old", GOLDEN["methods"], ids=lambda r: r["name"])
def test_methods_of_version_2_mean_what_their_names_do(old):
    found = Recipe.from_json(old).assign(MODELS["flux"])
    assert found == get_recipe(old["name"]).assign(MODELS["flux"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "reads up to 3"),
        ({"format_version": "3"}, "format_version is '3'"),
        ({"extra": 1}, "unknown fields: extra"),
        ({"rules": [{"match": {}}]}, r"rules\[0\] has missing fields: layer"),
        ({"rules": [{"match": {"role": "nose"}, "layer": {}}]}, "role is 'nose'"),
        ({"rules": [{"match": {"path": "("}, "layer": {}}]}, "not a regular expression"),
        (
            {"rules": [{"match": {}, "layer": {"weight": {"part": "Int9"}}}]},
            "weight.part is 'Int9'",
        ),
    ],
)
def test_json_that_is_no_recipe_is_refused_with_the_place(change, message):
    value = recipe(rule("a", INT8)).to_json() | change
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "x"}', '{"name": "x", "rules": [], "extra": 1}', "[" * 10**5]
)
def test_a_malformed_recipe_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json can't be used"):
        get_recipe(path)


def test_a_missing_recipe_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json can't be used"):
        get_recipe(tmp_path / "absent.json")


def test_a_recipe_file_is_accepted_in_place_of_a_name(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(recipe(rule("a", QUARTZ)).to_json()))
    assert get_recipe(str(path)) == recipe(rule("a", QUARTZ))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": Int(width=8, range="minmax")}, "weights must be symmetric"),
        ({"weight": Int(range="unsigned")}, "weights must be symmetric"),
        ({"weight": Quartz(range="minmax")}, "weights must be symmetric"),
        ({"weight": None, "activation": INT8}, "weight is None"),
        ({"weight": None, "transforms": (Smooth(),)}, "weight is None"),
        ({"activation": Quartz(step="integer", search=True)}, "only weights can be searched"),
        ({"weight": Quartz(scale_block=32), "activation": Quartz(scale_block=64)}, "must be the"),
        ({"weight": "int8"}, "weight is 'int8'; it must be a number format"),
        ({"transforms": (Nearest(),)}, "which is no transform"),
        ({"activation": QUARTZ, "wide": 1.0}, "wide is 1.0; it must be a share, from 0 to below 1"),
        ({"activation": QUARTZ, "wide": True}, "wide is True; it must be a share"),
        ({"activation": INT8, "wide": 0.1}, "wide is 0.1 and activation int8; only groups of a Qu"),
        ({"wide": 0.1}, "wide is 0.1 and activation None; only groups of a Quartz activation"),
        ({"rounding": Smooth()}, "it must be a Rounding"),
    ],
)
def test_impossible_layers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerRecipe(**{"weight": INT8} | fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gptq(damping=0), "damping is 0"),
        (lambda: Smooth(alpha=2), "alpha is 2"),
        (lambda: Rotate(block=2), "block is 2"),
        (lambda: LowRank(rank=0), "rank is 0"),
        (lambda: Match(role="nose"), "role is 'nose'; it must be one of embed"),
        (lambda: Match(path="("), "not a regular expression"),
        (lambda: Match(path="(" * 900 + ")" * 900), "not a regular expression"),
        (lambda: Match(path="a" * 2001), r"'a+'\.\.\. has 2001 characters; at most 2000 may be"),
        (lambda: Match(path=3), "path 3 is not a regular expression"),
    ],
)
def test_impossible_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r"(.*)*\1x", r"((\w|\d|[a-z_]|\.)+)+#"])
def test_a_pattern_of_too_many_ways_ends(pattern):
    """Python's own engine would take hours for the first."""
    site = Site(path="single_blocks." * 20, kind="linear", n=1, k=1, block=0, role="linear")
    match = Match(path=pattern)
    start = time.monotonic()
    try:
        assert not match(site)
    except ValueError as error:
        assert "takes too long to match" in str(error)
    assert time.monotonic() - start < 5


def test_needs_are_those_of_the_layers_that_ask():
    found = get_recipe("w4a8x-gptq").needs(MODELS["flux"])
    assert found["double_blocks.0.img_attn.qkv"] == {"gram", "mean"}
    assert get_recipe("w4a8x").needs(MODELS["flux"]) == {}
    assert get_recipe("w4a8x-branch").calibrated
    assert not get_recipe("w4a8x").calibrated
    needs = get_recipe("smooth+quartz").needs(MODELS["flux"])
    assert needs["single_blocks.0.linear1"] == {"absmax", "rows"}
    assert "single_blocks.0.modulation.lin" not in needs


def test_defect_12_a_name_or_word_that_is_taken_is_refused():
    """The registry overwrote a part whose name came again."""
    with pytest.raises(ValueError, match=r"'Smooth' is quartz_jax\.transforms\.smooth\.Smooth"):

        @schema.part()
        class Smooth:
            pass

    with pytest.raises(ValueError, match=r"'rotate' is .*Rotate already; name .*Other otherwise"):

        @schema.part("rotate")
        class Other:
            pass

    assert schema.from_json(MXFP4, {"part": "MXFP4"}) == MXFP4()
    assert schema.parts(IF4) == {"IF4": IF4}
