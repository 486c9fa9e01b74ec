"""Bad input to the scripts: one clear line, exit code 2, nothing half-written."""

import hashlib
import json
import os
import shutil

import make_synthetic
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from quartz_jax.cli import arguments as cli
from quartz_jax.cli import evaluate, generate, inspect, quantize, report

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a main that must refuse; gives its line. The output folder must stay as it was."""

    def refused(main, *argv):
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert cli.run(main, [str(x) for x in argv]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines()), err[:7]) == ("", 1, "error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return refused


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(tiny, tmp_path / "broken")


def test_unknown_recipe(refused, tmp_path):
    argv = ("--prompt", "a", "--recipe", "w3a3", "--out", tmp_path / "x.png")
    assert "unknown recipe 'w3a3'" in (line := refused(generate.main, *argv))
    assert "use one of bf16" in line
    argv = ("--recipe", "w3a3", "--out", tmp_path / "x")
    assert "unknown recipe 'w3a3'" in refused(quantize.main, *argv)


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("transformer=w4a8x,unet=w4a8x", "components are text_encoder, text_encoder_2, vae"),
        ("transformer=w4a8x,transformer=w8a8", "names a component twice"),
        ("transformer=w4a8x,text_encoder_2", "write COMPONENT=RECIPE"),
    ],
)
def test_recipes_by_component_that_make_no_sense(refused, tmp_path, recipe, line):
    assert line in refused(quantize.main, "--recipe", recipe, "--out", tmp_path / "x")


def test_a_calibrated_recipe_for_sampling_at_once(refused, tmp_path):
    argv = drawn(tmp_path, "--recipe", "w4a8x-gptq")
    assert "make a checkpoint with quantize.py" in refused(generate.main, *argv)


def test_a_calibrated_recipe_for_a_component_without_samples(refused, small, tmp_path):
    argv = ("--model", small, "--recipe", "text_encoder_2=w4a8x-gptq", "--out", tmp_path / "x")
    assert "there are no samples for this component" in refused(quantize.main, *argv)


@pytest.mark.parametrize("name", ["bf16", "w4a4"])
def test_a_recipe_file_under_the_name_of_another_row(refused, tmp_path, name):
    rule = {"match": {"role": "linear"}, "layer": {"weight": {"part": "Int", "width": 8}}}
    value = {"format_version": 3, "name": name, "rules": [rule]}
    (tmp_path / "mine.json").write_text(json.dumps(value))
    argv = ("--recipes", f"w4a4,{tmp_path / 'mine.json'}", "--out", tmp_path / "x.json")
    line = refused(evaluate.main, "--prompts", __file__, *argv)
    assert f"{name!r} is the name of several rows" in line


def test_a_rule_that_matches_nothing(refused, tiny, tmp_path):
    rule = {"pattern": "blocks", "weight": {"kind": "int8"}, "activation": {"kind": "bf16"}}
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"name": "mine", "rules": [rule]}))
    argv = ("--model", tiny, "--recipe", recipe, "--out", tmp_path / "x")
    assert "rule 'blocks' matches no linear" in refused(quantize.main, *argv)


@pytest.mark.parametrize("main", [quantize.main, generate.main])
def test_a_folder_without_model_index(refused, tmp_path, main):
    prompt = ("--prompt", "a") if main == generate.main else ()
    argv = ("--model", tmp_path / "absent", "--out", tmp_path / "x.png", *prompt)
    assert "model_index.json does not exist" in refused(main, *argv)


def test_a_missing_tensor_is_named(refused, broken, tmp_path):
    tensors = load_file(broken / WEIGHTS)
    del tensors["proj_out.weight"]
    save_file(tensors, broken / WEIGHTS)
    line = refused(quantize.main, "--model", broken, "--out", tmp_path / "x")
    assert "missing proj_out.weight" in line


def test_a_misshapen_tensor_is_named(refused, broken, tmp_path):
    tensors = load_file(broken / WEIGHTS) | {"proj_out.bias": np.zeros(3, np.float32)}
    save_file(tensors, broken / WEIGHTS)
    line = refused(quantize.main, "--model", broken, "--out", tmp_path / "x")
    assert "misshapen proj_out.bias: [3], expected [16]" in line


def test_corrupt_safetensors(refused, broken, tmp_path):
    (broken / WEIGHTS).write_bytes(b"broken")
    line = refused(quantize.main, "--model", broken, "--out", tmp_path / "x")
    assert f"{WEIGHTS} is not a readable safetensors file" in line


def test_a_truncated_shard(refused, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "broken")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refused(quantize.main, "--model", folder, "--out", tmp_path / "x")
    assert f"{shard.name} is not a readable safetensors file" in line


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_an_index_that_names_a_missing_shard(refused, small, tmp_path, component):
    folder = shutil.copytree(small, tmp_path / "broken")
    shards = sorted((folder / component).glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    line = refused(quantize.main, "--model", folder, "--out", tmp_path / "x")
    assert f"names missing shards: {shards[1].name}" in line


@pytest.mark.parametrize(
    ("folder", "file", "line"),
    [
        ("scheduler", None, "scheduler/scheduler_config.json does not exist"),
        ("scheduler", "scheduler_config.json", "scheduler_config.json can't be read as JSON"),
        ("tokenizer", None, "tokenizer holds no tokenizer that loads"),
        ("tokenizer_2", "tokenizer.json", "tokenizer_2 holds no tokenizer that loads"),
    ],
)
def test_what_is_only_carried_is_checked_too(refused, broken, tmp_path, folder, file, line):
    if file:
        (broken / folder / file).write_text("{")
    else:
        shutil.rmtree(broken / folder)
        (broken / folder).mkdir()
    for more in ((), ("--dry-run",)):
        argv = ("--model", broken, "--out", tmp_path / "x", *more)
        assert line in refused(quantize.main, *argv)


def test_another_family_in_a_folder(refused, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "broken")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config["_class_name"] = "SanaTransformer2DModel"
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    line = refused(quantize.main, "--model", folder, "--out", tmp_path / "x")
    assert "class SanaTransformer2DModel is not supported" in line


def test_another_family_in_a_file(refused, small, tmp_path):
    save_file({"y_embedder.y_embedding": np.zeros(2, np.float32)}, tmp_path / "sana.safetensors")
    argv = ("--model", tmp_path / "sana.safetensors", "--text-encoders", small)
    line = refused(quantize.main, *argv, "--out", tmp_path / "x")
    assert "holds no FLUX.1 transformer or " in line
    assert "transformer: sana.safetensors is of an unknown kind, with tensors such as y_emb" in line


def test_the_autoencoder_s_file_of_a_folder(refused, tiny, tmp_path):
    file = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    line = refused(quantize.main, "--model", file, "--out", tmp_path / "x")
    assert f"{file.name} is an autoencoder of diffusers: give the model's folder" in line


def test_a_single_file_without_text_encoders(refused, single_files, tmp_path):
    line = refused(generate.main, *drawn(tmp_path, "--model", single_files))
    assert "lacks the component folders text_encoder, text_encoder_2, tokenizer, tokeni" in line
    assert "--text-encoders" in line
    argv = ("--model", single_files, "--recipe", "text_encoder_2=w4a16", "--out", tmp_path / "x")
    assert "holds no text_encoder_2, which a recipe is for" in refused(quantize.main, *argv)
    argv = ("--model", single_files, "--schedule", "folder", "--out", tmp_path / "x")
    assert "schedule is 'folder'; name the folder" in refused(quantize.main, *argv)


def test_text_encoders_for_a_checkpoint_that_has_them(refused, tiny, quantized, tmp_path):
    argv = ("--model", quantized, "--text-encoders", tiny)
    assert "leave out --text-encoders" in refused(generate.main, *drawn(tmp_path, *argv))


def test_a_tokenizer_whose_ids_its_encoder_has_not(refused, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "broken")
    path = folder / "tokenizer" / "tokenizer.json"
    value = json.loads(path.read_text())
    last = max(value["model"]["vocab"], key=value["model"]["vocab"].get)
    value["model"]["vocab"][last] = 10**6
    path.write_text(json.dumps(value))
    line = refused(quantize.main, "--model", folder, "--out", tmp_path / "x", "--dry-run")
    assert "tokenizer gives ids up to 1000000, and its encoder takes" in line


def test_text_encoders_for_a_folder_that_has_them(refused, small, tmp_path):
    argv = ("--model", small, "--text-encoders", small, "--out", tmp_path / "x")
    assert "leave out --text-encoders" in refused(quantize.main, *argv)


def test_not_enough_disk(refused, small, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    line = refused(quantize.main, "--model", small, "--out", tmp_path / "x")
    assert "GB and its disk has 0.00 GB free; make room" in line


def test_an_infinite_weight(refused, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "broken")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("attn.to_out.0.weight"))
    tensors[name][0, 0] = np.inf
    save_file(tensors, shard)
    done = cli.run(quantize.main, ["--model", str(folder), "--out", str(tmp_path / "x")])
    assert done == 2
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_checkpoint_of_a_newer_format_version(refused, quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "newer")
    text = json.loads((folder / "quartz.json").read_text()) | {"format_version": 4}
    (folder / "quartz.json").write_text(json.dumps(text))
    line = refused(generate.main, "--model", folder, "--prompt", "a", "--out", tmp_path / "x.png")
    assert "format_version is 4" in line
    assert "install a newer one" in line


@pytest.mark.parametrize("main", [generate.main, evaluate.main])
def test_a_width_that_is_no_multiple_of_16(refused, tmp_path, main):
    argv = ("--prompt", "a") if main == generate.main else ("--prompts", __file__)
    argv += ("--size", "100x64", "--out", tmp_path / "x")
    assert "width is 100; it must be a positive multiple of 16" in refused(main, *argv)


@pytest.mark.parametrize("size", ["64", "64x", "axb", "-64x64", "0x64"])
def test_a_size_that_is_none(refused, tmp_path, size):
    line = refused(generate.main, f"--size={size}", "--prompt", "a", "--out", tmp_path / "x.png")
    assert "WIDTHxHEIGHT" in line or "width is 0" in line


@pytest.mark.parametrize("prompts", [[], ["--prompt"], ["--prompt", "a", " "]])
def test_empty_prompts(refused, tmp_path, prompts):
    line = refused(generate.main, *prompts, "--out", tmp_path / "x.png")
    assert "no prompt was given" in line or "prompt is empty" in line


def test_an_empty_file_of_prompts(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    argv = ("--prompts", tmp_path / "empty.txt", "--out", tmp_path / "x.json")
    assert "no prompt was given" in refused(evaluate.main, *argv)


@pytest.mark.parametrize("script", ["generate", "quantize", "evaluate"])
def test_an_output_under_a_file(refused, tmp_path, script):
    mains = {"generate": generate.main, "quantize": quantize.main, "evaluate": evaluate.main}
    needed = {"generate": ("--prompt", "a"), "quantize": (), "evaluate": ("--prompts", __file__)}
    (tmp_path / "file").write_text("")
    line = refused(mains[script], *needed[script], "--out", tmp_path / "file" / "x")
    assert "can't be written" in line


def test_an_output_file_that_is_a_folder(refused, tmp_path):
    assert "is a folder" in refused(generate.main, "--prompt", "a", "--out", tmp_path)


def test_an_output_folder_that_exists(refused, tmp_path):
    assert "exists already" in refused(quantize.main, "--out", tmp_path)


@pytest.mark.parametrize("main", [quantize.main, make_synthetic.main])
def test_overwriting_what_the_command_did_not_make(refused, broken, monkeypatch, main):
    monkeypatch.delattr(make_synthetic, "write_random_model")  # tens of GB, were it called
    assert "didn't make" in refused(main, "--out", broken, "--overwrite")


@pytest.mark.parametrize("out", ["", "broken/transformer", "broken/vae"])
def test_an_output_that_would_replace_a_part_of_its_model(refused, broken, tmp_path, out):
    (tmp_path / out / "quartz.json").touch()  # a checkpoint, for all that is known
    line = refused(quantize.main, "--model", broken, "--out", tmp_path / out, "--overwrite")
    assert line.startswith(f"error: output {tmp_path / out} holds {broken}/")
    assert "which it is made from" in line


@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_an_output_inside_a_component_of_its_model(refused, broken, component):
    argv = ("--model", broken, "--out", broken / component / "x")
    assert f"lies in {broken / component}, which it is made" in refused(quantize.main, *argv)


def test_another_recipe_than_the_checkpoint_s_own(refused, quantized, tmp_path):
    argv = ("--model", quantized, "--recipe", "w8a8", "--prompt", "a", "--out", tmp_path / "x.png")
    assert "is quantized as 'w4a8x'; leave out --recipe" in refused(generate.main, *argv)


def test_comparing_a_checkpoint_with_nothing_or_a_model_with_another(
    refused, tiny, quantized, tmp_path
):
    argv = drawn(tmp_path, "--model", quantized, "--compare")
    assert "name the 16-bit model to compare it with" in refused(generate.main, *argv)
    argv = drawn(tmp_path, "--model", tiny, "--compare", quantized)
    assert "leave out what --compare names" in refused(generate.main, *argv)
    argv = drawn(tmp_path, "--model", quantized, "--compare", tmp_path / "absent")
    assert "model_index.json does not exist" in refused(generate.main, *argv)


def test_quantizing_what_is_quantized(refused, quantized, tmp_path):
    line = refused(quantize.main, "--model", quantized, "--out", tmp_path / "x")
    assert "is quantized already" in line


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_a_number_of_steps_that_is_not_positive(refused, steps):
    assert f"--steps: invalid positive value: '{steps}'" in refused(generate.main, "--steps", steps)


def test_an_unknown_argument(refused):
    assert "unrecognized arguments: --promt" in refused(generate.main, "--promt", "a")


def drawn(tmp_path, *argv):
    return ("--prompt", "a", "--out", tmp_path / "x.png", *argv)


def test_more_scales_than_adapters(refused, tmp_path, adapter):
    argv = ("--lora", adapter, "--lora-scale", "1", "--lora-scale", "2")
    line = refused(generate.main, *drawn(tmp_path, *argv))
    assert "--lora-scale was given 2 times, --lora 1" in line


@pytest.mark.parametrize("option", ["--guidance", "--true-cfg"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_guidance_that_is_no_finite_number(refused, option, value):
    line = refused(generate.main, f"{option}={value}")
    assert f"{option}: {value} is no finite number" in line


def test_a_scale_that_is_no_finite_number(refused, tmp_path, adapter):
    argv = drawn(tmp_path, "--lora", adapter, "--lora-scale", "nan")
    assert "--lora-scale: nan is no finite number" in refused(generate.main, *argv)


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
@pytest.mark.parametrize("script", [generate, make_synthetic, evaluate])
def test_a_seed_that_has_no_noise_of_its_own(refused, tmp_path, script, seed):
    option = "--seed0" if script == evaluate else "--seed"
    needed = {evaluate: ("--prompts", tmp_path), make_synthetic: ("--out", __file__)}
    line = refused(script.main, f"{option}={seed}", *needed.get(script, ()))
    assert f"{option}: {seed} is outside 0 to 4294967295" in line


@pytest.mark.parametrize("name", ["x.jpg", "x"])
def test_an_image_under_another_name_than_a_png_s(refused, tmp_path, name):
    line = refused(generate.main, "--prompt", "a", "--out", tmp_path / name)
    assert "give a name ending in .png" in line


def test_an_adapter_s_folder(refused, tmp_path, tiny):
    argv = drawn(tmp_path, "--model", tiny, "--lora", tmp_path)
    assert f"LoRA {tmp_path} is a folder" in refused(generate.main, *argv)


def test_an_adapter_that_is_absent_or_no_safetensors(refused, tmp_path, tiny):
    for path in (tmp_path / "absent.safetensors", __file__):
        argv = drawn(tmp_path, "--model", tiny, "--lora", path)
        assert f"LoRA {path} can't be read as safetensors" in refused(generate.main, *argv)


def test_an_adapter_with_unknown_keys_or_a_wrong_rank(refused, tmp_path, tiny, quantized, adapter):
    tensors = load_file(adapter)
    name = "lora_unet_single_blocks_0_linear2"
    tensors[f"{name}.lora_up.weight"] = np.zeros((64, 3), np.float32)
    tensors["lora_unet_single_blocks_9_linear2.alpha"] = np.zeros((), np.float32)
    save_file(tensors, tmp_path / "bad.safetensors")
    for model in (tiny, quantized):
        argv = drawn(tmp_path, "--model", model, "--lora", tmp_path / "bad.safetensors")
        line = refused(generate.main, *argv)
        assert "unknown key lora_unet_single_blocks_9_linear2.alpha" in line
        assert f"{name}: lora_up is [64, 3], expected [64, 4]" in line


def test_an_image_that_can_t_be_read(refused, tmp_path, tiny, photo):
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:300])
    for path in (tmp_path / "absent.png", __file__, tmp_path, tmp_path / "cut.jpg"):
        line = refused(generate.main, *drawn(tmp_path, "--model", tiny, "--init-image", path))
        assert f"image {path} can't be read" in line


@pytest.mark.parametrize("strength", ["0", "-0.5", "1.01", "nan"])
def test_a_strength_outside_its_range(refused, tmp_path, photo, strength):
    argv = drawn(tmp_path, "--init-image", photo, f"--strength={strength}")
    assert "must be above 0 and at most 1" in refused(generate.main, *argv)


def test_an_output_in_place_of_its_input(refused, tmp_path, tiny):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    (tmp_path / "e.json").write_text("{}")
    argv = drawn(tmp_path, "--model", tiny, "--init-image", tmp_path / "x.png")
    assert "which it is made from" in refused(generate.main, *argv)
    argv = ("--results", tmp_path / "e.json", "--out", tmp_path / "e.json")
    assert "which it is made from" in refused(report.main, *argv)


def test_a_strength_without_an_image(refused, tmp_path):
    assert "add --init-image" in refused(generate.main, *drawn(tmp_path, "--strength", "0.5"))


def test_a_negative_prompt_that_nothing_looks_at(refused, tiny, tmp_path):
    argv = drawn(tmp_path, "--model", tiny, "--negative-prompt", "blurry")
    assert "add --true-cfg" in refused(generate.main, *argv)


@pytest.mark.skipif(os.name == "nt", reason="links and names as POSIX has them")
@pytest.mark.parametrize("script", ["generate", "quantize", "evaluate"])
@pytest.mark.parametrize("name", ["loop.png", "q\udce9.png"])
def test_an_output_that_leads_nowhere(refused, tmp_path, script, name):
    mains = {"generate": generate.main, "quantize": quantize.main, "evaluate": evaluate.main}
    needed = {"generate": ("--prompt", "a"), "quantize": (), "evaluate": ("--prompts", __file__)}
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    line = refused(mains[script], *needed[script], "--out", tmp_path / name)
    assert "a link to itself" in line or "isn't UTF-8" in line


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_are_no_time(refused, minutes):
    assert "is no finite number above 0" in refused(evaluate.main, f"--minutes={minutes}")


def test_a_checkpoint_of_a_component_that_there_is_none_of(refused, quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "odd")
    value = json.loads((folder / "quartz.json").read_text())
    value["components"]["unet"] = value["components"]["transformer"]
    del value["sha256"]
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    value["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "quartz.json").write_text(json.dumps(value))
    line = refused(generate.main, *drawn(tmp_path, "--model", folder))
    assert "holds unet: components are text_encoder" in line


def test_inspecting_a_checkpoint_that_was_changed(refused, quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "changed")
    assert cli.run(inspect.main, [str(folder)]) == 0
    (folder / "vae" / "config.json").write_text("{}")
    assert "vae is corrupt or was replaced" in refused(inspect.main, folder)
