import json

import generate
import pytest
from PIL import Image

from quartz_jax.metrics import PSNR_OF_EQUAL

KEYS = ["recipe", "seed", "seconds", "transformer_bytes", "transformer_bytes_bf16"]
KEYS += ["psnr", "ssim", "out"]


@pytest.fixture
def make(tiny, tmp_path, capsys):
    """Generate two images of 48x32 pixels; gives the PNG's path and the JSON object."""

    def make(*argv, model=tiny, name="image.png"):
        out = tmp_path / "new" / name
        common = ["--model", model, "--prompt", "a cat", "dog", "--steps", 2, "--size", "48x32"]
        generate.main([str(x) for x in [*common, "--out", out, "--json", *argv]])
        return out, json.loads(capsys.readouterr().out.splitlines()[-1])

    return make


def test_a_picture_has_one_tile_a_prompt(make):
    with Image.open(make()[0]) as image:
        assert (image.format, image.size) == ("PNG", (2 * 48, 32))


def test_json_holds_what_was_done(make):
    out, result = make("--seed", 3)
    assert list(result) == KEYS
    assert (result["recipe"], result["seed"], result["out"]) == ("w4a4", 3, str(out))
    assert (result["psnr"], result["ssim"]) == (None, None)
    assert result["transformer_bytes"] < result["transformer_bytes_bf16"]


def test_the_same_seed_gives_the_same_bytes(make):
    assert make()[0].read_bytes() == make(name="again.png")[0].read_bytes()


def test_another_seed_gives_another_picture(make):
    assert make()[0].read_bytes() != make("--seed", 1, name="again.png")[0].read_bytes()


def test_a_saved_checkpoint_gives_the_same_bytes(make, quantized):
    out, result = make(model=quantized, name="loaded.png")
    original, expected = make()
    assert out.read_bytes() == original.read_bytes()
    assert result["transformer_bytes"] == expected["transformer_bytes"]


def test_compare_puts_bf16_beside_the_recipe_under_labels(make):
    out, result = make("--compare")
    with Image.open(out) as image:
        width, height = image.size
        assert (width, height > 2 * 32) == (2 * 48, True)
        label = image.crop((0, 0, width, height - 2 * 32)).convert("L")
        assert label.getextrema() == (0, 255)
    assert 10 < result["psnr"] < 60
    assert 0 < result["ssim"] < 1


def test_bf16_compared_with_itself_is_equal(make):
    result = make("--compare", "--recipe", "bf16")[1]
    assert result["psnr"] == pytest.approx(PSNR_OF_EQUAL)
    assert result["transformer_bytes"] == result["transformer_bytes_bf16"]


def test_the_command_exits_with_2_and_one_line_on_bad_input(run_script, tmp_path):
    done = run_script("generate.py", "--out", tmp_path / "image.png", "--prompt")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: no prompt was given")
