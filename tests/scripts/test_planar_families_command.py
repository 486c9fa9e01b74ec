"""The commands on DiT, PixArt, SD3.5 and FLUX.1 Redux: quantize, inspect, generate, bad input."""

import json
import shutil

import pytest
from small_families import SMALL
from test_families_command import call, of_roles

from models.stored_files import read_json
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import generate, inspect, quantize
from quartz_jax.conversion import checkpoint

PROMPTS = {"DiT": "7", "PixArt": "a cat", "SD3.5": "a cat", "FLUX.1 Redux": "a cat"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with random weights, by name."""
    parent = tmp_path_factory.mktemp("models")
    for name in PROMPTS:
        SMALL[name].write(parent / name)
    return {name: parent / name for name in PROMPTS}


@pytest.fixture
def draw(tmp_path, photo):
    """Generate a picture in two steps; gives its bytes."""

    def draw(name, model, *argv):
        out = tmp_path / "picture.png"
        common = ("--prompt", PROMPTS[name], "--size", "16x16", "--steps", 2, "--out", out)
        seen = ("--image", photo) if name == "FLUX.1 Redux" else ()
        call(generate, "--model", model, *common, *seen, *argv)
        return out.read_bytes()

    return draw


@pytest.fixture
def refused(capsys):
    """Run a command that must refuse; gives its line."""

    def refused(command, *argv):
        assert cli.run(command.main, [str(x) for x in argv]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
        return err

    return refused


@pytest.mark.parametrize("name", PROMPTS)
def test_a_checkpoint_draws_the_bytes_of_its_model(models, draw, capsys, tmp_path, name):
    call(quantize, "--model", models[name], "--recipe", "w4a8x", "--out", tmp_path / "x")
    call(inspect, tmp_path / "x")
    printed = capsys.readouterr().out
    assert "recipe w4a8x" in printed and "every file is as it was written" in printed
    drawn = draw(name, tmp_path / "x")
    assert draw(name, models[name], "--recipe", "w4a8x") == drawn
    assert draw(name, models[name], "--recipe", "bf16") != drawn


@pytest.mark.parametrize("name", PROMPTS)
def test_a_calibrated_conversion_goes_through_the_family_s_denoiser(models, tmp_path, name):
    (tmp_path / "p.txt").write_text(f"{PROMPTS[name]}\n{PROMPTS[name]}\n")
    (tmp_path / "few.json").write_text(json.dumps(of_roles("w4a8x-gptq", ["attention_out"])))
    argv = ["--model", models[name], "--recipe", tmp_path / "few.json"]
    argv += ["--calibration", tmp_path / "p.txt", "--calibration-steps", 1]
    call(quantize, *argv, "--calibration-size", "16x16", "--out", tmp_path / "x")
    component = checkpoint.read_manifest(tmp_path / "x").components["transformer"]
    assert (component.calibration.size, component.calibration.samples) == ((16, 16), 1)
    layers = [x for x in component.report.layers if x.path.endswith(("proj", "to_out", "out"))]
    assert layers and all(layer.execution != "simulated" for layer in component.report.layers)


def split(model, parent):
    """Return Redux's parts and FLUX.1 in folders of their own, as they are published."""
    redux, dev = parent / "redux", shutil.copytree(model, parent / "dev")
    redux.mkdir()
    for name in ("image_encoder", "image_embedder", "model_index.json"):
        shutil.move(dev / name, redux / name)
    index = read_json(redux / "model_index.json") | {"_class_name": "FluxPipeline"}
    (dev / "model_index.json").write_text(json.dumps(index))
    return redux, dev


def test_redux_is_quantized_with_the_flux_1_it_goes_with(models, draw, tmp_path):
    redux, dev = split(models["FLUX.1 Redux"], tmp_path)
    given = ("--model", redux, "--text-encoders", dev)
    call(quantize, *given, "--recipe", "w8a8", "--out", tmp_path / "x")
    whole = draw("FLUX.1 Redux", models["FLUX.1 Redux"], "--recipe", "w8a8")
    assert draw("FLUX.1 Redux", tmp_path / "x") == whole


def test_pictures_count_as_much_as_their_scales_say(models, draw, photo):
    name, model = "FLUX.1 Redux", models["FLUX.1 Redux"]
    plain, same, less = (
        draw(name, model, "--recipe", "bf16", *more)
        for more in ((), ("--image-scale", 1), ("--image-scale", 0.5))
    )
    halves = ("--image", photo, "--image-scale", 0.25, "--image-scale", 0.25)
    assert plain == same != less == draw(name, model, "--recipe", "bf16", *halves)


@pytest.mark.parametrize(
    ("name", "argv", "line"),
    [
        ("DiT", ("--prompt", "10"), "class 10"),
        ("PixArt", ("--prompt", "a", "--image-scale", 1), "reference_scales: this model takes"),
        ("FLUX.1 Redux", ("--prompt", "a"), "references holds no image"),
    ],
)
def test_what_a_family_can_t_draw(models, refused, tmp_path, name, argv, line):
    out = ("--size", "16x16", "--out", tmp_path / "x.png")
    assert line in refused(generate, "--model", models[name], *argv, *out)


SCHEDULERS = {
    "PNDMScheduler": "PNDMScheduler",
    "FlowMatchEulerDiscreteScheduler": "goes along",
    "DDIMScheduler": "goes along",
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_unsupported_scheduler(models, refused, tmp_path, name, kind):
    flow = name in ("SD3.5", "FLUX.1 Redux")
    if kind == ("FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"):
        pytest.skip("the family's own")
    folder = shutil.copytree(models[name], tmp_path / "broken")
    values = {"_class_name": kind, "num_train_timesteps": 1000, "clip_sample": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    line = refused(quantize, "--model", folder, "--out", tmp_path / "x")
    assert SCHEDULERS[kind] in line


@pytest.mark.parametrize("name", PROMPTS)
def test_each_missing_component_is_named(models, refused, tmp_path, name):
    family = SMALL[name].family
    for part in (*family.components, *family.tokenizers, "scheduler"):
        folder = shutil.copytree(models[name], tmp_path / part)
        shutil.rmtree(folder / part)
        argv = ("--model", folder, "--prompt", PROMPTS[name], "--out", tmp_path / "x.png")
        assert part in refused(generate, *argv).partition(str(folder))[2], part
