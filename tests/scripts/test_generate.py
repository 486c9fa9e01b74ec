import json

import numpy as np
import pytest
from PIL import Image

from quartz_jax.cli import generate
from quartz_jax.evaluation.metrics import PSNR_OF_EQUAL

KEYS = ["recipe", "seed", "seconds", "transformer_bytes", "transformer_bytes_bf16"]
KEYS += ["psnr", "ssim", "out", "stages", "peak_bytes", "programs"]


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
    assert (result["recipe"], result["seed"], result["out"]) == ("w4a8x", 3, str(out))
    assert (result["psnr"], result["ssim"]) == (None, None)
    assert result["transformer_bytes"] < result["transformer_bytes_bf16"]


def test_the_stages_add_up_to_the_whole(make):
    result = make()[1]
    stages = result["stages"]
    median = stages.pop("median step")
    assert sum(stages.values()) == pytest.approx(result["seconds"])
    assert all(seconds > 0 for seconds in stages.values())
    assert median == stages["other steps"]  # of two steps one is the first
    loaded = {f"load {name}" for name in ("text_encoder", "text_encoder_2", "transformer", "vae")}
    work = {"encode prompts", "first step", "other steps", "decode", "rest"}
    assert set(stages) == loaded | work


@pytest.mark.parametrize("what", ["text", "image", "adapter"])
def test_the_same_seed_gives_the_same_bytes(make, photo, adapter, what):
    argv = {"text": [], "image": ["--init-image", photo], "adapter": ["--lora", adapter]}[what]
    assert make(*argv)[0].read_bytes() == make(*argv, name="again.png")[0].read_bytes()


def test_another_seed_gives_another_picture(make):
    assert make()[0].read_bytes() != make("--seed", 1, name="again.png")[0].read_bytes()


def test_a_saved_checkpoint_gives_the_same_bytes(make, quantized):
    out, result = make(model=quantized, name="loaded.png")
    original, expected = make()
    assert out.read_bytes() == original.read_bytes()
    assert result["transformer_bytes"] == expected["transformer_bytes"]


def test_keeping_the_models_loaded_gives_the_same_bytes(make, photo):
    argv = ("--init-image", photo)
    frugal, kept = make(*argv), make(*argv, "--keep-loaded", name="kept.png")
    assert frugal[0].read_bytes() == kept[0].read_bytes()
    # the autoencoder encodes first and decodes last: kept, it is loaded once
    assert set(frugal[1]["stages"]) == set(kept[1]["stages"])


def test_expanding_the_weights_gives_the_same_bytes(make, quantized):
    packed = make(model=quantized)[0]
    expanded = make("--expand", model=quantized, name="expanded.png")[0]
    assert expanded.read_bytes() == packed.read_bytes()


def test_an_adapter_on_a_checkpoint_is_that_on_the_quantized_model(make, quantized, adapter):
    argv = ("--lora", adapter, "--lora-scale", 0.5)
    out = make(*argv, model=quantized, name="loaded.png")[0]
    assert out.read_bytes() == make(*argv)[0].read_bytes()
    assert out.read_bytes() != make(name="plain.png")[0].read_bytes()


def test_several_adapters_add_up(make, adapter):
    once = make("--lora", adapter, "--recipe", "bf16")[0]
    halves = ("--lora", adapter, "--lora-scale", 0.25, "--lora", adapter, "--lora-scale", 0.75)
    twice = make(*halves, "--recipe", "bf16", name="twice.png")[0]
    with Image.open(once) as one, Image.open(twice) as two:
        difference = np.abs(np.asarray(one, np.int16) - np.asarray(two, np.int16))
    assert difference.max() <= 1  # rounding


def test_more_strength_leaves_less_of_the_image(make, photo):
    """The tiny model's autoencoder is random, so its picture of the photo is what to compare."""
    weak, strong = (
        make("--init-image", photo, "--strength", s, "--steps", 10, name=f"{s}.png")[1]
        for s in (0.1, 1.0)
    )
    assert weak["stages"]["other steps"] == 0  # one step of ten
    assert strong["stages"]["other steps"] > 0


def test_compare_puts_bf16_beside_the_recipe_under_labels(make):
    out, result = make("--compare")
    with Image.open(out) as image:
        width, height = image.size
        assert (width, height > 2 * 32) == (2 * 48, True)
        label = image.crop((0, 0, width, height - 2 * 32)).convert("L")
        assert label.getextrema() == (0, 255)
    assert 10 < result["psnr"] < 60
    assert 0 < result["ssim"] < 1


def test_a_checkpoint_is_compared_with_its_16_bit_model(make, tiny, quantized):
    out, result = make("--compare", tiny, model=quantized)
    whole, expected = make("--compare", name="whole.png")
    assert out.read_bytes() == whole.read_bytes()
    assert (result["psnr"], result["ssim"]) == (expected["psnr"], expected["ssim"])


def test_bf16_compared_with_itself_is_equal(make):
    result = make("--compare", "--recipe", "bf16")[1]
    assert result["psnr"] == pytest.approx(PSNR_OF_EQUAL)
    assert result["transformer_bytes"] == result["transformer_bytes_bf16"]


def test_a_second_process_traces_and_compiles_nothing(run_script, tiny, tmp_path):
    """The first start fills the caches, the second only reads them; the picture is the same."""

    def run():
        common = ["--model", tiny, "--prompt", "a", "--size", "32x32", "--steps", "2", "--json"]
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}
        done = run_script("generate.py", *common, "--out", tmp_path / "x.png", **cache)
        assert done.returncode == 0, done.stderr
        picture = (tmp_path / "x.png").read_bytes()
        return json.loads(done.stdout.splitlines()[-1])["programs"], picture

    first, picture = run()
    traced = first.pop("traced")
    assert traced == 4 and "kept" not in first  # two encoders, the step and the autoencoder
    assert first["compiled"] > 10 * first["from_cache"]  # a few are the same program twice
    assert list((tmp_path / "cache" / "quartz-jax").rglob("*-cache"))
    second, again = run()
    assert second.pop("from_cache") <= sum(first.values())  # tracing runs some small ones
    assert second == {"compiled": 0, "kept": traced}
    assert again == picture


def test_the_command_exits_with_2_and_one_line_on_bad_input(run_script, tmp_path):
    done = run_script("generate.py", "--out", tmp_path / "image.png", "--prompt")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: no prompt was given")


def test_a_model_that_paints_in_a_mask_takes_image_and_mask(make, photo, tmp_path_factory, capsys):
    diffusers = pytest.importorskip("diffusers")
    from tiny_pipeline import make_tiny_flux

    model = tmp_path_factory.mktemp("fill")
    make_tiny_flux(model, kind=diffusers.FluxFillPipeline, extra_channels=16 + 256)
    with pytest.raises(ValueError, match="references holds 0 images; give one, the picture"):
        make(model=model)
    out, _ = make("--image", photo, "--mask", photo, model=model)
    other, _ = make("--image", photo, "--mask", out, model=model, name="other.png")
    assert out.read_bytes() != other.read_bytes()


def test_one_file_a_prompt_holds_what_the_sheet_does(make):
    sheet, _ = make()
    out, result = make("--separate", name="each.png")
    files = [out.with_name(f"each-{i}.png") for i in (1, 2)]
    assert result["out"] == [str(file) for file in files]
    assert not out.exists()
    with Image.open(sheet) as image:
        for i, file in enumerate(files):
            with Image.open(file) as one:
                tile = image.crop((i * 48, 0, (i + 1) * 48, 32))
                assert one.size == (48, 32) and one.tobytes() == tile.tobytes()


def test_one_file_a_prompt_is_compared_too(make):
    out, _ = make("--separate", "--compare", name="each.png")
    with Image.open(out.with_name("each-2.png")) as image:
        assert image.size[0] == 2 * 48 and image.size[1] > 32


def test_a_negative_prompt_changes_the_picture(make):
    plain = make("--true-cfg", 3)[0]
    other = make("--true-cfg", 3, "--negative-prompt", "a blurry dog", name="other.png")[0]
    assert plain.read_bytes() != other.read_bytes()


def test_what_an_adapter_holds_for_text_encoders_is_left_out_when_asked(make, adapter, tmp_path):
    from safetensors.numpy import load_file, save_file

    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    path = tmp_path / "both.safetensors"
    save_file(load_file(adapter) | {key: np.zeros((4, 8), np.float32)}, path)
    with pytest.raises(ValueError, match="--lora-transformer-only"):
        make("--lora", path)
    alone = make("--lora", adapter)[0]
    left_out = make("--lora", path, "--lora-transformer-only", name="left_out.png")[0]
    assert left_out.read_bytes() == alone.read_bytes()
