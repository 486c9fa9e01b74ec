import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

import models
from quartz_jax import QuantizedLinear, dequantize, get_recipe, pipelines, quantize_model
from quartz_jax.cli import generate, inspect, quantize
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.model import stored_arrays
from quartz_jax.io import files
from quartz_jax.io.files import work_folder

RECIPES = "transformer=w4a4,text_encoder_2=w8a8"


def arrays(folder, component="transformer"):
    build = functools.partial(models.build_component, dtype=jnp.bfloat16)
    model = checkpoint.load(folder, build, component)[0]
    return stored_arrays(nnx.state(model))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_folder_holds_a_checkpoint_of_the_recipe(quantized, tiny):
    manifest = checkpoint.read_manifest(quantized)
    assert (manifest.recipe.name, manifest.base_name) == ("w4a8x", tiny.name)


def test_the_folder_holds_the_base_s_other_components(quantized, tiny):
    names = {path.name for path in tiny.iterdir()}
    assert {path.name for path in quantized.iterdir()} == names | {"quartz.json"}


def test_the_folder_holds_no_16_bit_transformer(quantized):
    assert not list((quantized / "transformer").rglob("*.safetensors"))


def test_the_report_is_printed(tiny, tmp_path, capsys):
    quantize.main(["--model", str(tiny), "--recipe", "w8a8", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert ["double_blocks.0.img_attn.qkv", "int8", "int8"] in [x.split()[:3] for x in lines]
    assert lines[-1].startswith("total")


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        quantize.main(["--model", "unread", "--out", str(tmp_path)])


def test_overwrite_replaces_an_existing_folder(tiny, tmp_path):
    argv = ["--model", str(tiny), "--recipe", "int4", "--out", str(tmp_path), "--overwrite"]
    quantize.main(argv)
    assert checkpoint.read_manifest(tmp_path).recipe.name == "int4"


def test_a_recipe_file_is_stored_whole(tiny, tmp_path):
    rule = {"pattern": r"single_blocks\.\d+\.linear1", "weight": {"kind": "int8"}}
    recipe = {"name": "mine", "rules": [rule | {"activation": {"kind": "bf16"}}]}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    argv = ["--model", tiny, "--recipe", tmp_path / "mine.json", "--out", tmp_path / "out"]
    quantize.main([str(x) for x in argv])
    assert checkpoint.read_manifest(tmp_path / "out").recipe.name == "mine"


def test_the_arrays_are_those_of_the_model_quantized_in_memory(small, tmp_path):
    quantize.main(["--model", str(small), "--out", str(tmp_path / "out")])
    model = models.load_component(small / "transformer", dtype=jnp.bfloat16)
    model, report = quantize_model(model, get_recipe("w4a8x"))
    assert_equal(arrays(tmp_path / "out"), stored_arrays(nnx.state(model)))
    stored = checkpoint.read_manifest(tmp_path / "out").report
    assert stored.bytes == report.bytes
    assert {x.path: x.bytes for x in stored.layers} == {x.path: x.bytes for x in report.layers}


@pytest.mark.parametrize("model", ["", "flux1-dev.safetensors"], ids=["folder", "file"])
def test_single_files_give_the_arrays_of_the_diffusers_folder(small, single_files, tmp_path, model):
    out = {name: tmp_path / name for name in ("files", "folder")}
    quantize.main(["--model", str(small), "--out", str(out["folder"])])
    argv = ["--model", str(single_files / model), "--text-encoders", str(small)]
    quantize.main([*argv, "--out", str(out["files"])])
    assert_equal(*map(arrays, out.values()))
    names = [{path.name for path in folder.iterdir()} for folder in out.values()]
    assert names[0] == names[1]
    vaes = [models.load_component(folder / "vae") for folder in out.values()]
    assert vaes[0].config == vaes[1].config
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(vae) for vae in vaes))
    opened = pipelines.open_checkpoint(out["files"])
    assert opened.report.recipe == "w4a8x"
    assert opened.pipeline.scheduler == models.load_component(small / "scheduler")


def test_a_transformer_alone_is_converted_and_sampled_from_with_the_rest_beside(
    small, single_files, tmp_path
):
    (tmp_path / "file").mkdir()  # not beside its autoencoder
    file, shas = shutil.copy(single_files / "flux1-dev.safetensors", tmp_path / "file"), {}
    for name, more in {"alone": [], "whole": ["--text-encoders", str(small)]}.items():
        model = tmp_path / name
        quantize.main(["--model", str(file), *more, "--out", str(model)])
        beside = ["--text-encoders", str(small)] if name == "alone" else []
        picture = tmp_path / f"{name}.png"
        argv = ["--prompt", "a", "--size", "32x32", "--steps", "1", "--out", str(picture)]
        generate.main(["--model", str(model), *beside, *argv])
        shas[name] = picture.read_bytes()
    assert not (tmp_path / "alone" / "vae").exists()
    assert shas["alone"] == shas["whole"]
    with pytest.raises(ValueError, match=r"lacks the component folders .* \(--text-encoders\)"):
        generate.main(["--model", str(tmp_path / "alone"), "--prompt", "a"])


@pytest.mark.parametrize(("recipe", "bound"), [("w4a16", 1e-5), ("w8a8", 0.03)])
def test_a_quantized_t5_is_loaded_back_and_used(small, tmp_path, recipe, bound):
    """The bound of w8a8 is that of 8-bit inputs; w4a16 has 16-bit ones and differs by rounding."""
    recipes = f"transformer=w4a8x,text_encoder_2={recipe}"
    out, picture = tmp_path / "out", tmp_path / "x.png"
    quantize.main(["--model", str(small), "--recipe", recipes, "--out", str(out)])
    assert not list((out / "text_encoder_2").rglob("*.safetensors"))
    encoder = pipelines.open_checkpoint(out).pipeline.text_encoder_2.load()
    expected = models.load_component(small / "text_encoder_2", dtype=jnp.float32)
    linears = dict(nnx.iter_modules(expected))
    quantized = {p: x for p, x in nnx.iter_modules(encoder) if isinstance(x, QuantizedLinear)}
    assert len(quantized) == 14
    for path, linear in quantized.items():
        linears[path].kernel.set_value(dequantize(linear.weight.get_value()).T)
    ids = jnp.arange(12).reshape(2, 6)
    error = jnp.linalg.norm(encoder(ids) - expected(ids)) / jnp.linalg.norm(expected(ids))
    assert error < bound
    argv = ["--prompt", "a", "--size", "32x32", "--steps", "1", "--out", str(picture)]
    generate.main(["--model", str(out), *argv])
    assert picture.exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(small, tmp_path, capsys):
    quantize.main(
        ["--model", str(small), "--recipe", RECIPES, "--out", str(tmp_path / "out"), "--dry-run"]
    )
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for part in ("transformer: recipe w4a4, 29 layers", "text_encoder_2: recipe w8a8, 14 layers"):
        assert part in text
    assert ["single_blocks.2.linear2", "quartz", "g16"] in [
        x.split()[:3] for x in text.splitlines()
    ]
    assert "vae: " in text and " bytes at most; on the disk arrays are compressed" in text


def test_sizes_of_the_plan_the_report_and_inspect_agree(small, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--model", str(small), "--out", str(out)]
    quantize.main([*argv, "--dry-run"])
    plan = capsys.readouterr().out
    quantize.main(argv)
    table = capsys.readouterr().out
    inspect.main([str(out)])
    described = capsys.readouterr().out
    report = checkpoint.read_manifest(out).report
    assert f"transformer: recipe w4a8x, 29 layers, {report.bytes:,} bytes of" in plan
    rows = {line.split()[0]: line.split() for line in plan.splitlines()}
    for layer in report.layers:
        assert f"{layer.bytes:,}" in rows[layer.path]
        assert f"{layer.bytes:,}" in next(x for x in table.splitlines() if layer.path in x).split()
    assert f"{report.bytes:,}" in table.splitlines()[-1].split()
    assert f"{report.bytes:,} bytes in memory" in described
    on_disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert f"total: {on_disk:,} bytes" in described
    limit = int(plan.splitlines()[-1].split()[1].replace(",", ""))
    assert report.bytes <= limit
    assert on_disk <= limit


def test_killed_at_any_moment_and_run_again_it_gives_the_same(small, tmp_path):
    out = tmp_path / "killed"
    quantize.main(["--model", str(small), "--out", str(tmp_path / "whole")])
    command = [sys.executable, str(ROOT / "scripts" / "quantize.py"), "--model", str(small)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    records = work_folder(out) / "records"
    with subprocess.Popen([*command, "--out", str(out)], env=env) as process:
        while not list(records.glob("transformer.*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not list(tmp_path.rglob("killed*/**/quartz.json"))
    quantize.main(["--model", str(small), "--out", str(out)])
    assert_equal(arrays(out), arrays(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_inspect_says_what_a_checkpoint_is(run_script, quantized):
    done = run_script("inspect.py", quantized, "--layers")
    assert done.returncode == 0, done.stderr
    for part in (
        "recipe w4a8x",
        "base SHA-256",
        "format version 3",
        "double_blocks.0.img_attn.qkv",
    ):
        assert part in done.stdout


def test_inspect_says_which_size_a_model_and_its_checkpoint_draw(small, tmp_path, capsys):
    folder, out = shutil.copytree(small, tmp_path / "one"), tmp_path / "out"
    index = json.loads((folder / "model_index.json").read_text())
    index["_generation_defaults"] = {"width": 48, "height": 32}
    (folder / "model_index.json").write_text(json.dumps(index))
    quantize.main(["--model", str(folder), "--out", str(out)])
    told = {}
    for path in (small, folder, out):
        capsys.readouterr()
        inspect.main([str(path)])
        told[path] = capsys.readouterr().out
    line = "draws images of 48x32 pixels, and no other size well"
    assert [line in x for x in told.values()] == [False, True, True]
    assert "one: FLUX.1, not quantized" in told[folder] and "vae: " in told[folder]


@pytest.mark.parametrize(
    ("path", "line"),
    [("", "expected a quantized checkpoint"), ("README.md", "README.md is a file; expected")],
)
def test_inspect_refuses_what_is_no_checkpoint(run_script, tmp_path, path, line):
    (tmp_path / "README.md").touch()
    done = run_script("inspect.py", tmp_path / path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert line in done.stderr


def test_inspect_refuses_a_checkpoint_without_its_description(run_script, quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "copy")
    (folder / "quartz.json").unlink()
    done = run_script("inspect.py", folder)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "transformer" in done.stderr


def test_a_model_that_a_checkpoint_was_not_made_of_is_told(tiny, quantized, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipelines.warn_of_other_base(quantized, tiny)
        monkeypatch.setattr(files, "hash_file", None)  # nothing is read twice
        pipelines.warn_of_other_base(quantized, tiny)
    monkeypatch.undo()
    other = shutil.copytree(tiny, tmp_path / "other")
    (weights,) = (other / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.warns(
        UserWarning, match=r"other isn't what .* was made of \(tiny\): its transformer"
    ):
        pipelines.warn_of_other_base(quantized, other)


def test_a_command_warns_in_one_line(run_script, tiny, tmp_path):
    index = json.loads((tiny / "model_index.json").read_text())
    folder = shutil.copytree(tiny, tmp_path / "one")
    index["_generation_defaults"] = {"width": 48, "height": 48, "num_inference_steps": 1}
    (folder / "model_index.json").write_text(json.dumps(index))
    argv = ("--model", folder, "--recipe", "bf16", "--prompt", "a", "--size", "32x32")
    done = run_script("generate.py", *argv, "--out", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    said = [x for x in done.stderr.splitlines() if "draws" in x or "sampler.py" in x]
    assert said == ["warning: this model draws 48x48; of 32x32, expect blurs and pieces"]


def test_the_command_exits_with_2_and_one_line_on_bad_input(run_script, tmp_path):
    done = run_script("quantize.py", "--recipe", "w3a3", "--out", tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: unknown recipe 'w3a3'")


def test_a_calibrated_checkpoint_is_made_loaded_and_says_what_it_saw(small, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a cat\na dog\n")
    argv = ["--model", small, "--recipe", "w4a8x-gptq", "--calibration", prompts, "--out", out]
    more = ["--calibration-size", "32x32", "--calibration-steps", "2", "--seed", "3"]
    quantize.main([str(x) for x in (*argv, *more)])
    component = checkpoint.read_manifest(out).components["transformer"]
    assert component.calibration.samples == 2  # both images at once, at two steps
    assert component.calibration.steps[0] == 0
    assert component.calibration.seed == 3
    assert all(layer.execution != "simulated" for layer in component.report.layers)
    pipeline = pipelines.load_pipeline(out)
    image = pipeline(["a cat"], height=32, width=32, num_inference_steps=1, output_type="np")
    assert image.shape == (1, 32, 32, 3)
