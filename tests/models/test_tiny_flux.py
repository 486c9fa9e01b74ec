"""The embedded model: its files, its parity with diffusers, and the parts that trained it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load_pipeline
from models import training as loop
from models.flux.latents import pack
from models.tiny_flux import architecture, dataset

PHOTO_FOLDER = architecture.FOLDER.parent / "tiny_flux_photo"


@pytest.mark.parametrize("folder", [architecture.FOLDER, PHOTO_FOLDER], ids=lambda x: x.name)
def test_weights_fit_the_repository(folder):
    sizes = [file.stat().st_size for file in folder.rglob("*.safetensors")]
    assert len(sizes) == 4 and sum(sizes) < 60e6 and max(sizes) < 50e6


@pytest.mark.parametrize(
    ("folder", "prompts"),
    [
        (architecture.FOLDER, ["A pizza, 3d style", "a rocket, noto style"]),
        (PHOTO_FOLDER, ["a photo of a goldfish", "A photo of a Yorkshire terrier"]),
    ],
    ids=["emoji", "photo"],
)
def test_final_latents_equal_those_of_diffusers(folder, prompts):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = load_pipeline(folder, dtype=jnp.float32)
    noise = pipeline.initial_noise(jax.random.key(3), 2, 96, 128)
    options = {"height": 96, "width": 128, "num_inference_steps": 2, "guidance_scale": 2.5}
    ours = pipeline(prompts, latents=noise, output_type="latent", progress=False, **options)
    theirs = diffusers.FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    # diffusers pads to 512 otherwise
    options |= {"max_sequence_length": pipeline.tokenizer_2.model_max_length}
    start = torch.tensor(np.array(noise))
    wanted = theirs(prompts, latents=start, output_type="latent", **options).images.numpy()
    assert np.linalg.norm(ours - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_capitals_make_no_difference():
    pipeline = load_pipeline(architecture.FOLDER, dtype=jnp.float32)
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        ids = dataset.token_ids(tokenizer, ["A Pizza, 3D style", "a pizza, 3d style"])
        np.testing.assert_array_equal(*ids)


def test_every_word_of_a_caption_is_one_token():
    captions = ["a red panda, 3d style", "an unusual hat, noto style"]
    tokenizer = dataset.train_t5_tokenizer(captions, vocab_size=120, length=12)
    assert tokenizer.tokenize(captions[1]) == [
        *("▁an", "▁unusual", "▁hat"),
        *("▁,", "▁noto", "▁style"),
    ]


def test_latents_are_packed_as_diffusers_packs_them():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    channels_first = torch.tensor(latents).permute(0, 3, 1, 2)
    wanted = diffusers.FluxPipeline._pack_latents(channels_first, 2, 3, 4, 6)
    np.testing.assert_array_equal(pack(jnp.asarray(latents)), wanted.numpy())


def regression(params, frozen, data, key):
    rows = loop.draw(key, data, 8)
    return ((rows["x"] @ params["w"] - rows["y"]) ** 2).mean()


def regression_data():
    x = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    return {"x": x, "y": x @ np.arange(5, dtype=np.float32)}


def run_regression(folder, **changes):
    config = loop.TrainingConfig(
        steps=12, minutes=60, batch_size=8, learning_rate=0.1, warmup=2, scan=4
    )
    params = {"w": jnp.zeros(5)}
    return loop.train("test", config, regression, params, regression_data(), folder, **changes)


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, finished = run_regression(tmp_path / "whole")
    assert finished
    _, finished = run_regression(tmp_path / "parts", stop_after=0)
    assert not finished
    with pytest.raises(ValueError, match="parts holds a stage that isn't finished"):
        loop.restore_ema(tmp_path / "parts", {"w": jnp.zeros(5)})
    resumed, finished = run_regression(tmp_path / "parts")
    assert finished
    np.testing.assert_array_equal(whole["w"], resumed["w"])
    restored = loop.restore_ema(tmp_path / "parts", {"w": jnp.zeros(5)})
    np.testing.assert_array_equal(restored["w"], resumed["w"])


def test_a_finished_training_that_is_gone_on_with_and_stopped_is_unfinished_again(tmp_path):
    run_regression(tmp_path)
    loop.check_finished(tmp_path)
    with pytest.raises(FloatingPointError):
        longer = loop.TrainingConfig(steps=24, minutes=60, batch_size=8, learning_rate=1.0)
        nowhere = {"x": np.full((8, 5), np.nan, np.float32), "y": np.zeros(8, np.float32)}
        loop.train("test", longer, regression, {"w": jnp.zeros(5)}, nowhere, tmp_path)
    with pytest.raises(ValueError, match="isn't finished"):
        loop.check_finished(tmp_path)


def test_training_moves_towards_the_solution(tmp_path):
    trained, _ = run_regression(tmp_path)
    target = np.arange(5, dtype=np.float32)
    assert np.linalg.norm(trained["w"] - target) < np.linalg.norm(target)
