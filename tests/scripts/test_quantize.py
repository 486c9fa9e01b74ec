import json

import pytest
import quantize

from quartz_jax import checkpoint


def test_the_folder_holds_a_checkpoint_of_the_recipe(quantized, tiny):
    manifest = checkpoint.read_manifest(quantized)
    assert (manifest.recipe.name, manifest.base_name) == ("w4a4", tiny.name)


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


def test_the_command_exits_with_2_and_one_line_on_bad_input(run_script, tmp_path):
    done = run_script("quantize.py", "--recipe", "w3a3", "--out", tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: unknown recipe 'w3a3'")
