"""Rotations folded into attention's values: exact, quantized, converted, saved, with adapters."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import layer_of, seen_of

from models.attention import Mixture, dot_product_attention, fused_mixture
from models.linear import Linear, Part
from models.lora import Adapter, Branch, add_lora
from pallas_kernels.quantize.channels import hadamard
from quartz_jax import (
    Int,
    LayerRecipe,
    Match,
    Quartz,
    Recipe,
    Rule,
    get_recipe,
    observe,
    place,
    quantize_model,
    sites,
)
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.calibrate import Calibration
from quartz_jax.conversion.checkpoint import CalibrationRecord
from quartz_jax.conversion.model import abstract_quantized, stored_arrays
from quartz_jax.conversion.stream import Conversion, Source
from quartz_jax.rounding import Gptq
from quartz_jax.transforms import BlockRotation, Folded, Rotate, Smooth, Turned, TurnedRows

INT8 = Int(width=8)
STRETCHED = Quartz(step="integer", levels="stretched")
HEADS, HEAD, HIDDEN = 2, 64, 128
FOLD = Rotate(block=16, fold=64)
X = jax.random.normal(jax.random.key(1), (2, 6, HIDDEN))


def layer(*transforms, weight=INT8, activation=INT8, **fields):
    return LayerRecipe(weight=weight, activation=activation, transforms=transforms, **fields)


def recipe(given, *first):
    return Recipe(name="test", rules=(*first, Rule(match=Match(), layer=given)))


def rule(path, given):
    return Rule(match=Match(path=path), layer=given)


class Block(nnx.Module):
    """Attention, then attention and an MLP side by side, as single-stream blocks have them."""

    def __init__(self, rngs):
        options = {"rngs": rngs, "bias_init": nnx.initializers.normal(1.0)}
        self.qkv = Linear(HIDDEN, 3 * HIDDEN, role="attention_in", **options)
        self.proj = Linear(HIDDEN, HIDDEN, role="attention_out", **options)
        self.linear1 = Linear(HIDDEN, 5 * HIDDEN, role="mixed_in", **options)
        self.linear2 = Linear(3 * HIDDEN, HIDDEN, role="mixed_out", **options)
        pairs = ("qkv", "proj"), ("linear1", "linear2")
        self.mixtures = tuple(fused_mixture((pair,), HIDDEN, HEAD) for pair in pairs)

    def __call__(self, x):
        x = x + self.proj(attended(self.qkv(x)))
        wide = self.linear1(x)
        mlp = Part(array=wide, start=3 * HIDDEN, size=2 * HIDDEN, activation="gelu")
        return x + self.linear2((Part(array=attended(wide), size=HIDDEN), mlp))


def attended(wide):
    split = wide[..., : 3 * HIDDEN].reshape(*wide.shape[:2], 3, HEADS, HEAD)
    out = dot_product_attention(*jnp.moveaxis(split, 2, 0))
    return out.reshape(*out.shape[:2], HIDDEN)


class Model(nnx.Module):
    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.layers = nnx.List(Block(rngs) for _ in range(2))

    def __call__(self, x):
        for block in self.layers:
            x = block(x)
        return x

    def start(self, *, x):
        return x

    def blocks(self):
        return [(f"layers.{i}", block) for i, block in enumerate(self.layers)]

    @staticmethod
    def advance(block, carry):
        return block(carry)


@functools.cache
def model():
    """A model of bfloat16 values, computing in float32."""
    built = Model()
    nnx.update(
        built, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(built))
    )
    return built


def relative(found, wanted):
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def quantized(given, of=None):
    of = of or model()
    needs = given.needs(sites(of))
    return quantize_model(of, given, observe(of, [{"x": X}], needs) if needs else None)


def call(quantized, x=X):
    return nnx.jit(lambda m, x: m(x))(quantized, x)


def test_folding_is_exact_to_float64s_rounding():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        values, weight = rng.normal(size=(9, 192)), rng.normal(size=(32, 320))
        mlp = rng.normal(size=(7, 128))
        attention = rng.random((3, 7, 9))
        rows, op = (
            TurnedRows(size=64, first=0, rows=192),
            BlockRotation(size=16, first=192, folded=64),
        )

        def multiply(values, weight):
            heads = np.asarray(values).reshape(9, 3, 64)
            mixed = np.einsum("hqk,khd->qhd", attention, heads).reshape(7, 192)
            return np.concatenate([mixed, mlp], axis=1) @ np.asarray(weight).T

        wanted = multiply(values, weight)
        found = multiply(rows.turned(jnp.asarray(values)), op.given(jnp.asarray(weight)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.parametrize("size", [16, 64])
def test_the_ops_are_what_they_say_of_a_layers_input_and_output(size):
    """As for every registered transform: exact, statistics, transposes."""
    plain = layer_of(0, n=128, k=192)
    plain = dataclasses.replace(plain, seen=seen_of(plain.seen.rows))
    steps = (
        Turned(size=size, first=64, rows=64),
        Folded(size=16, first=128, folded=size),
        Smooth(alpha=0.5),
    )
    found = layer(*steps).fit(plain)
    rows = plain.seen.rows
    assert relative(found(rows), plain(rows)) < 2**-16
    np.testing.assert_allclose(
        found.bias[64:128], plain.bias[64:128] @ hadamard_of(size), atol=1e-3
    )
    turned, rotation, _ = found.ops
    behind = seen_of(rotation(rows)[0])
    apart = rotation.see(dataclasses.replace(plain.seen, rows=None))
    for seen in (rotation.see(plain.seen), dataclasses.replace(apart, rows=behind.rows)):
        for name in ("rows", "mean", "gram"):
            wanted = getattr(behind, name)
            np.testing.assert_allclose(getattr(seen, name), wanted, rtol=1e-4, atol=1e-4)
        assert (seen.absmax >= behind.absmax * (1 - 1e-5)).all()
    w = plain.weight
    moved = rotation(rows)[0] @ w.T, rows @ rotation.back(w).T
    np.testing.assert_allclose(*moved, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(turned.after(turned.turned(w.T)), w.T, atol=1e-5)


def hadamard_of(size):
    return np.kron(np.eye(64 // size), hadamard(size))


def test_what_becomes_of_each_layer():
    assigned = recipe(layer(FOLD)).assign(sites(model()))
    rotate = Rotate(block=16, fold=64)
    turned = Turned(size=64, first=2 * HIDDEN, rows=HIDDEN)
    assert {path.split(".")[-1]: x.transforms for path, x in assigned.items()} == {
        "qkv": (turned, rotate),
        "proj": (Folded(size=64, first=HIDDEN, folded=64),),
        "linear1": (turned, rotate),
        "linear2": (Folded(size=16, first=HIDDEN, folded=64),),
    }
    assert recipe(layer(FOLD)).online(sites(model())) == {}
    ops = {p.split(".")[-1]: x.words() for p, x in assigned.items()}
    assert ops["linear2"].startswith("folded ") and ops["qkv"].startswith("turned rotate ")


def test_only_what_is_folded_is_left_out_at_run_time():
    given, _ = quantized(recipe(layer(FOLD)))
    text = str(jax.make_jaxpr(lambda x: given.layers[0].proj(x))(X))
    plain, _ = quantized(recipe(layer()))
    assert text == str(jax.make_jaxpr(lambda x: plain.layers[0].proj(x))(X))
    mixed = str(jax.make_jaxpr(lambda x: given.layers[0].linear2(x))(jnp.ones((6, 3 * HIDDEN))))
    assert mixed != str(
        jax.make_jaxpr(lambda x: plain.layers[0].linear2(x))(jnp.ones((6, 3 * HIDDEN)))
    )


@functools.cache
def plain_error():
    """Of int8 weights and inputs without a rotation."""
    return relative(call(quantized(recipe(layer()))[0]), model()(X))


@pytest.mark.parametrize("transforms", [(FOLD,), (FOLD, Smooth(alpha=0.5))], ids=str)
def test_a_folded_model_is_as_near_as_one_without_rotations(transforms):
    wanted = model()(X)
    found, report = quantized(recipe(layer(*transforms)))
    assert relative(call(found), wanted) < 1.5 * plain_error()
    assert max(x.relative_error for x in report.layers) < 0.02
    proj = found.layers[0].proj
    proj.ops.set_value((BlockRotation(size=64),))  # once more online: undone
    assert relative(call(found), wanted) > 10 * plain_error()


def test_placed_and_simulated_are_the_same_model():
    given, _ = quantized(recipe(layer(FOLD, weight=STRETCHED)))
    wanted = call(given)
    np.testing.assert_array_equal(call(place(given)[0]), wanted)
    simulated = call(place(given, simulate=True)[0])
    assert relative(simulated, wanted) < 1e-4  # an input at a boundary may round otherwise


CALIBRATED = recipe(
    layer(FOLD, weight=STRETCHED, rounding=Gptq()),
    rule(r"layers\.1\.linear2", layer(FOLD, Smooth(alpha=0.5), weight=STRETCHED, rounding=Gptq())),
)
RECORD = CalibrationRecord(
    prompts_sha256="0" * 64, samples=1, steps=(0,), seed=0, propagate=False, size=None
)


def convert(folder, given, **record):
    file = folder / "model.safetensors"
    file.write_bytes(b"weights")
    params = {
        ".".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(model()))
    }
    record = dataclasses.replace(RECORD, **record)
    source = Source(
        name="transformer",
        recipe=given,
        model=nnx.eval_shape(Model),
        read=params.__getitem__,
        config={},
        files=(file,),
        calibration=Calibration(make=lambda: [{"x": np.asarray(X)}], record=record),
    )
    return Conversion(base_name="base", sources=(source,), carried=())


def loaded(folder):
    return checkpoint.load(folder, lambda _: Model())[0]


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("given", [recipe(layer(FOLD)), CALIBRATED], ids=["plain", "calibrated"])
def test_a_streamed_conversion_gives_the_arrays_of_the_one_in_memory(tmp_path, given):
    convert(tmp_path, given).run(tmp_path / "out")
    wanted, _ = quantized(given)
    found = loaded(tmp_path / "out")
    assert_equal(stored_arrays(nnx.state(found)), stored_arrays(nnx.state(wanted)))
    np.testing.assert_array_equal(call(found), call(wanted))


def test_blocks_that_see_what_quantized_ones_make_see_the_model(tmp_path):
    """Were values and what reads them not rotated alike, the second block would see garbage."""
    convert(tmp_path, CALIBRATED, propagate=True).run(tmp_path / "out")
    assert relative(call(loaded(tmp_path / "out")), model()(X)) < 0.1


def test_saved_is_loaded_and_shapes_are_known_without_data(tmp_path):
    given, report = quantized(CALIBRATED)
    shapes = abstract_quantized(Model, CALIBRATED)
    assert jax.tree.structure(nnx.state(shapes)) == jax.tree.structure(nnx.state(given))
    again = Recipe.from_json(json.loads(json.dumps(CALIBRATED.to_json())))
    assert again == CALIBRATED and again.assign(sites(model())) == CALIBRATED.assign(
        sites(nnx.eval_shape(Model))
    )
    assert {x.path for x in report.layers if x.weight.startswith("folded ")} == {
        f"layers.{i}.{name}" for i in (0, 1) for name in ("proj", "linear2")
    }


def test_a_checkpoint_of_a_model_that_now_states_other_values_is_refused(tmp_path):
    """Its arrays would fit, and its pictures be noise."""
    convert(tmp_path, recipe(layer(FOLD))).run(tmp_path / "out")
    changed = Model()
    changed.layers[1].mixtures = changed.layers[1].mixtures[:1]
    with pytest.raises(ValueError, match=r"layers.1.linear1 had a rotation folded into it when"):
        checkpoint.load(tmp_path / "out", lambda _: changed)
    assert loaded(tmp_path / "out").layers[0].proj.folded


def test_adapters_beside_folded_layers_add_what_they_add_to_the_linears():
    rng = np.random.default_rng(0)
    shapes = {
        "qkv": (HIDDEN, 3 * HIDDEN),
        "proj": (HIDDEN, HIDDEN),
        "linear2": (3 * HIDDEN, HIDDEN),
    }
    branches = {
        f"layers.0.{name}": Branch(
            down=rng.normal(size=(k, 3)).astype(np.float32) / k**0.5,
            up=rng.normal(size=(3, n)).astype(np.float32),
        )
        for name, (k, n) in shapes.items()
    }
    adapter = Adapter(path=None, branches=branches)
    wanted = add_lora(model(), [adapter], dtype=jnp.float32)(X)
    assert relative(wanted, model()(X)) > 0.3
    given, _ = quantized(recipe(layer(FOLD)))
    found = call(add_lora(given, [adapter], dtype=jnp.float32))
    plain = call(add_lora(quantized(recipe(layer()))[0], [adapter], dtype=jnp.float32))
    assert relative(found, wanted) < 1.5 * relative(plain, wanted)


def reason(given, of=None):
    found = given.online(sites(of or model()))
    return {path.removeprefix("layers."): x for path, x in found.items()}


def test_what_rotates_online_all_the_same_is_named_with_the_reason():
    sixteen_bit = reason(recipe(layer(FOLD), rule(r".*0\.qkv", LayerRecipe())))
    assert sixteen_bit == {"0.proj": "layers.0.qkv isn't quantized"}
    small = reason(recipe(layer(Rotate(block=64, fold=16))))
    assert small["0.proj"] == "blocks in heads of 64 channels are of 16, online of 64"
    second = reason(recipe(layer(FOLD), rule(r".*0\.proj", layer(Smooth(alpha=0.5), FOLD))))
    assert second == {"0.proj": "its rotation isn't the first of its transforms"}

    class Silent(Model):
        def __init__(self):
            super().__init__()
            for block in self.layers:
                block.mixtures = block.mixtures[1:]

    assert reason(recipe(layer(FOLD)), Silent())["0.proj"] == "the model states no values for it"
    found, _ = quantized(recipe(layer(FOLD)), Silent())
    assert relative(call(found), Silent()(X)) < 1.5 * plain_error()


def test_a_plan_says_what_is_folded_and_what_is_not_and_why(tmp_path):
    text = convert(tmp_path, recipe(layer(FOLD), rule(r".*0\.qkv", layer()))).plan()
    lines = [line.split() for line in text.splitlines()]
    assert ["layers.1.proj", "folded", "int8"] in [x[:3] for x in lines]
    assert "online" not in text
    text = convert(tmp_path, recipe(layer(FOLD), rule(r".*\.qkv", LayerRecipe()))).plan()
    for i in (0, 1):
        line = f"  rotated online, since layers.{i}.qkv isn't quantized: layers.{i}.proj"
        assert line in text.splitlines()


@pytest.mark.parametrize(("word", "size"), [("fold16", 16), ("fold64", 64)])
def test_names_of_recipes_have_words_for_it(word, size):
    found = get_recipe(f"{word}+gptq+quartz-stretched/int8").rules[-1].layer
    assert found.transforms == (Rotate(block=16, fold=size),)


def test_two_streams_whose_outputs_rotate_otherwise_rotate_online():
    class Joint(nnx.Module):
        def __init__(self):
            options = {"rngs": nnx.Rngs(0)}
            for stream in "ab":
                setattr(self, f"qkv_{stream}", Linear(64, 192, role="attention_in", **options))
                setattr(self, f"out_{stream}", Linear(64, 64, role="attention_out", **options))
            pairs = (("qkv_a", "out_a"), ("qkv_b", "out_b"))
            self.mixtures = (fused_mixture(pairs, 64, 64),)

    one = rule("out_a", layer(Rotate(block=16, fold=16)))
    found = recipe(layer(FOLD), one).online(sites(Joint()))
    assert set(found) == {"out_a", "out_b"}
    assert found["out_a"] == "out_a and out_b rotate otherwise"
    other = recipe(layer(FOLD), rule("out_a", layer())).online(sites(Joint()))
    assert other == {"out_b": "out_a doesn't begin with a rotation that folds"}
    both = recipe(layer(FOLD)).assign(sites(Joint()))
    assert all(isinstance(x.transforms[0], Folded | Turned) for x in both.values())


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ({"values": (("nothing", 0),)}, "mixtures of layers.0: 'nothing' is no linear of it"),
        ({"values": (("qkv", 300),)}, "'qkv' has 384 channels, which 128 from 300 on"),
        ({"columns": 256}, "'proj' has 128 channels, which 256 from 0 on"),
        ({"head_dim": 48}, "in heads of 48, don't fit"),
    ],
)
def test_a_wrong_statement_is_refused_by_name(stated, match):
    right = {"values": (("qkv", 256),), "rows": 128, "outputs": ("proj",), "columns": 128}
    wrong = Model()
    wrong.layers[0].mixtures = (Mixture(**{"head_dim": 64} | right | stated),)
    with pytest.raises(ValueError, match=match):
        sites(wrong)


def test_values_of_two_mixtures_are_refused():
    wrong = Model()
    wrong.layers[0].mixtures *= 2
    with pytest.raises(ValueError, match=r"mixtures of layers.0 have layers.0.\w+, as others do"):
        sites(wrong)


@pytest.mark.parametrize("fold", [-1, 2, True, 16.0])
def test_a_fold_that_is_no_block_is_refused(fold):
    with pytest.raises(ValueError, match="fold is"):
        Rotate(block=16, fold=fold)


def test_a_folded_rotation_behind_another_transform_is_refused():
    with pytest.raises(ValueError, match="must be the first transform"):
        layer(Smooth(alpha=0.5), Folded(size=16, first=16, folded=16)).fit(layer_of(0))
