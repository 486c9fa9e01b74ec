"""The commands on the families after FLUX.1: quantize, inspect, generate, evaluate, bad input."""

import dataclasses
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from small_families import SMALL

from models.stored_files import read_json
from models.text_encoders import T5Config
from quartz_jax import get_recipe, pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import evaluate, generate, inspect, quantize
from quartz_jax.conversion import checkpoint

T5 = T5Config(vocab_size=9, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)
RECIPES = "transformer=w4a8x,text_encoder=w4a16"
KINDS = ("klein", "Z-Image-Turbo")  # one of each family, where the other behaves alike
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "layers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with random weights, by name."""
    parent = tmp_path_factory.mktemp("models")
    for name, small in SMALL.items():
        small.write(parent / name)
    return {name: parent / name for name in SMALL}


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    """Folders of quantized models, by name."""
    parent = tmp_path_factory.mktemp("quantized")
    for name in KINDS:
        call(quantize, "--model", models[name], "--recipe", RECIPES, "--out", parent / name)
    return {name: parent / name for name in KINDS}


@pytest.fixture
def draw(tmp_path):
    """Generate a picture in two steps; gives its bytes."""

    def draw(model, *argv):
        out = tmp_path / "picture.png"
        common = ("--prompt", "a cat", "--size", "32x16", "--steps", 2, "--out", out)
        call(generate, "--model", model, *common, *argv)
        return out.read_bytes()

    return draw


def call(command, *argv):
    command.main([str(x) for x in argv])


@pytest.fixture
def refused(capsys):
    """Run a command that must refuse; gives its line."""

    def refused(command, *argv):
        assert cli.run(command.main, [str(x) for x in argv]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
        return err

    return refused


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_draws_the_bytes_of_its_model_whenever_it_is_asked(
    models, checkpoints, draw, name
):
    drawn = draw(checkpoints[name])
    assert draw(checkpoints[name]) == drawn
    assert draw(models[name], "--recipe", RECIPES) == drawn
    assert draw(models[name], "--recipe", "bf16") != drawn
    assert draw(checkpoints[name], "--seed", 1) != drawn


@pytest.mark.parametrize("name", KINDS)
def test_inspect_says_what_both_quantized_models_are(checkpoints, capsys, name):
    call(inspect, checkpoints[name])
    printed = capsys.readouterr().out
    for part in ("recipe w4a8x", "recipe w4a16", "every file is as it was written"):
        assert part in printed


def test_references_and_a_negative_prompt_shape_the_picture(models, draw, photo):
    """Of the base model, which takes both."""
    base, more = models["klein-base"], ("--recipe", "bf16")
    references = ("--image", photo, "--image", photo)
    plain, seen = draw(base, *more), draw(base, *more, *references)
    steered = draw(base, *more, *references, "--negative-prompt", "blurry")
    assert len({plain, seen, steered}) == 3


def test_a_negative_prompt_needs_a_model_that_is_guided(models, draw):
    guided, more = models["Z-Image"], ("--recipe", "bf16")
    assert draw(guided, *more) != draw(guided, *more, "--negative-prompt", "blurry")
    with pytest.raises(ValueError, match="add --true-cfg"):
        draw(models["Z-Image-Turbo"], "--negative-prompt", "blurry")


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_shapes_the_picture_of_checkpoint_and_model_alike(
    models, checkpoints, draw, tmp_path, name
):
    adapter = save_adapter(tmp_path / "adapter.safetensors", SMALL[name])
    adapted = draw(checkpoints[name], "--lora", adapter)
    assert adapted == draw(models[name], "--recipe", RECIPES, "--lora", adapter)
    assert adapted != draw(checkpoints[name])


def save_adapter(path, small):
    """Save random factors for the linears in the blocks, in diffusers' naming."""
    rng = np.random.default_rng(0)
    component, factors = small.family.components["transformer"], {}
    tensors = component.tensors(small.sizes["transformer"], component.folder)
    for name, (leaf, shape) in tensors.items():
        if leaf == "kernel" and name.startswith(BLOCKS):
            module = f"transformer.{name.removesuffix('.weight')}"
            for part, size in (("A", (2, shape[1])), ("B", (shape[0], 2))):
                values = rng.normal(0, 0.3, size).astype(np.float32)
                factors[f"{module}.lora_{part}.weight"] = values
    save_file(factors, path)
    return path


@pytest.mark.parametrize("name", ["klein-base", "Z-Image-Turbo"])
def test_a_calibrated_conversion_goes_on_after_an_interruption(models, tmp_path, monkeypatch, name):
    """To the same arrays as in one go; what it saw is in the manifest."""
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    recipe = of_roles("w4a8x-gptq", ["modulation", "attention_out"])
    (tmp_path / "few.json").write_text(json.dumps(recipe))
    argv = ["--model", models[name], "--recipe", tmp_path / "few.json"]
    argv += ["--calibration", tmp_path / "p.txt"]
    argv += ["--calibration-size", "32x16", "--calibration-steps", 1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        call(quantize, *argv, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for folder in ("out", "whole"):
        call(quantize, *argv, "--out", tmp_path / folder)
    found, expected = (arrays(tmp_path / folder) for folder in ("out", "whole"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    component = checkpoint.read_manifest(tmp_path / "out").components["transformer"]
    assert component.calibration.size == (32, 16)
    assert all(layer.execution != "simulated" for layer in component.report.layers)


def test_a_conversion_holds_no_more_than_two_blocks(tmp_path):
    """The one that is quantized, and the next, which is read meanwhile."""
    small = SMALL["klein"]
    deep = dataclasses.replace(small.sizes["transformer"], num_single_layers=12)
    small._replace(sizes=small.sizes | {"transformer": deep}).write(tmp_path / "model")
    plan = pipelines.plan_conversion(tmp_path / "model", cli.component_recipes("w8a8"))
    (source,) = plan.sources
    sizes = [sum(source.read(x).nbytes for x in part.params) for part in source.parts]
    held = Held(source.read)
    dataclasses.replace(plan, sources=(dataclasses.replace(source, read=held),)).run(tmp_path / "x")
    first, second = sorted(sizes)[-2:]
    assert held.total == sum(sizes)
    assert held.most <= first + second < held.total / 2


class Held:
    """Reads parameters, and counts the bytes of those that are still held by anyone."""

    def __init__(self, read):
        self.read, self.now, self.most, self.total = read, 0, 0, 0

    def __call__(self, path):
        values = self.read(path)
        self.total += values.nbytes
        self.now += values.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(values, self.let_go, values.nbytes)
        return values

    def let_go(self, size):
        self.now -= size


def of_roles(name, roles):
    """Return what a recipe does to most layers, for a few roles: each shape is compiled for."""
    recipe = get_recipe(name).to_json()
    (rule,) = (x for x in recipe["rules"] if "attention_out" in x["match"]["role"])
    return recipe | {"name": "few", "rules": [rule | {"match": rule["match"] | {"role": roles}}]}


def interrupt_after(patch, parts):
    """Let a conversion store so many parts, and then be interrupted."""
    real, calls = checkpoint.write_part, []

    def write(*args):
        calls.append(args)
        if len(calls) > parts:
            raise KeyboardInterrupt
        return real(*args)

    patch.setattr(checkpoint, "write_part", write)


def arrays(folder):
    return nnx.state(pipelines.open_checkpoint(folder).pipeline.transformer.load())


@pytest.mark.parametrize("name", KINDS)
def test_evaluate_compares_recipe_and_checkpoint_with_bf16(models, checkpoints, tmp_path, name):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    prompts = ("--prompts", tmp_path / "prompts.txt", "--networks", tmp_path / "none")
    sampling = ("--count", 2, "--batch", 2, "--steps", 1, "--size", "32x16")
    rows = ("--recipes", "w8a8", "--checkpoint", checkpoints[name])
    out = tmp_path / "out.json"
    call(evaluate, "--model", models[name], *prompts, *sampling, *rows, "--out", out)
    results = json.loads(out.read_text())["recipes"]
    scores = {row: np.mean(found["scores"]["psnr"]) for row, found in results.items()}
    assert len(scores) == 3
    assert scores["bf16"] > scores["w8a8"] > min(scores.values())


@pytest.fixture
def broken(models, tmp_path):
    """Return a copy of a model to break."""
    return lambda name: shutil.copytree(models[name], tmp_path / "broken")


def change(path, **values):
    path.write_text(json.dumps(read_json(path) | values))


@pytest.mark.parametrize("name", KINDS)
def test_an_encoder_of_other_sizes(refused, tmp_path, name):
    small = SMALL[name]
    wider = dataclasses.replace(small.sizes["text_encoder"], hidden_size=64)
    small._replace(sizes=small.sizes | {"text_encoder": wider}).write(tmp_path / "model")
    argv = ("--model", tmp_path / "model", "--out", tmp_path / "x")
    assert "text_encoder gives" in refused(quantize, *argv)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("file", "values", "line"),
    [
        ("text_encoder/config.json", T5.to_json(), "text_encoder is no text_encoder of"),
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "_class_name is 'Flux2Pipeline'"),
        ("tokenizer/tokenizer.json", {"added_tokens": []}, "tokenizer has no token for <|im_start"),
    ],
)
def test_a_model_that_is_another_or_unsupported(
    broken, refused, tmp_path, name, file, values, line
):
    folder = broken(name)
    change(folder / file, **values)
    for command in (quantize, generate):
        prompt = ("--prompt", "a") if command is generate else ()
        argv = ("--model", folder, *prompt, "--out", tmp_path / "x.png")
        assert line in refused(command, *argv)
    assert [x.name for x in tmp_path.iterdir()] == ["broken"]


def test_an_unsupported_variant_of_z_image(broken, refused, tmp_path):
    folder = broken("Z-Image")
    change(folder / "transformer" / "config.json", siglip_feat_dim=1152)
    argv = ("--model", folder, "--out", tmp_path / "x")
    assert "siglip_feat_dim = 1152 is not supported" in refused(quantize, *argv)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_encoder(broken, refused, tmp_path, name):
    folder = broken(name)
    shutil.rmtree(folder / "text_encoder")
    argv = ("--model", folder, "--prompt", "a", "--out", tmp_path / "x.png")
    assert "text_encoder" in refused(generate, *argv)
