"""DiT's pipeline against diffusers' in float32, names of classes, and refusals."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import models
from models.dit.family import DIT
from models.dit.labels import Labels
from models.stored_files import CheckpointError
from quartz_jax.cli import generate, quantize
from quartz_jax.pipelines import calibration_prompts

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from transformer_cases import CASES  # noqa: E402 (needs torch)

LABELS = {
    "0": "tench, Tinca tinca",
    "7": "cock",
    "134": "crane",
    "207": "Golden  Retriever",
    "517": "crane",
}
SIDES = (16, 24)  # pixels; the transformer was made for the first


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    config = CASES["DiT"].config | {"num_embeds_ada_norm": 1000, "sample_size": 8}
    pipeline = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(**config),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        id2label=LABELS,
    )
    for module in (pipeline.transformer, pipeline.vae):
        for parameter in module.eval().parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    """A model as published: a class's former name, and labels in model_index.json."""
    folder = tmp_path_factory.mktemp("model")
    peer.save_pretrained(folder)
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    edit(folder / "model_index.json", id2label=LABELS)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return models.load_pipeline(folder, jnp.float32)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def images(ours, peer, monkeypatch, side, guidance, scheduler=None):
    """Return our images and diffusers' of two classes from the same noise."""
    shape = (2, *ours.canvas(side, side).shape)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    drawn = diffusers.pipelines.dit.pipeline_dit
    monkeypatch.setattr(drawn, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    if scheduler is not None:
        monkeypatch.setattr(peer, "scheduler", scheduler)
    call = {"num_inference_steps": 3, "output_type": "np"}
    expected = peer(peer.get_label_ids(["cock", "tench"]), guidance_scale=guidance, **call).images
    found = ours(
        ["cock", "tench"],
        latents=jnp.asarray(noise),
        height=side,
        width=side,
        true_cfg_scale=guidance,
        progress=False,
        **call,
    )
    return found, expected


@pytest.mark.parametrize(("side", "guidance"), [(SIDES[0], 4.0), (SIDES[1], 4.0), (SIDES[0], 1.0)])
def test_images_are_diffusers(ours, peer, monkeypatch, side, guidance):
    found, expected = images(ours, peer, monkeypatch, side, guidance)
    assert found.shape == (2, side, side, 3)
    assert np.std(expected) > 0.02  # pictures of something
    assert relative_error(found, expected) <= 1e-4


def test_images_are_diffusers_with_another_scheduler(ours, peer, monkeypatch, folder, tmp_path):
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(peer.scheduler.config)
    scheduler.save_pretrained(tmp_path)
    changed = dataclasses.replace(ours, scheduler=models.load_component(tmp_path))
    found, expected = images(changed, peer, monkeypatch, SIDES[0], 2.0, scheduler)
    assert relative_error(found, expected) <= 1e-4


def test_every_component_is_found_by_its_class(folder):
    kinds = {x: type(models.load_component(folder / x)) for x in ("transformer", "vae")}
    assert kinds == {name: DIT.components[name].module for name in kinds}
    assert models.load_component(folder / "scheduler").class_name == "DDIMScheduler"


def test_a_scheduler_of_models_that_predict_otherwise_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "scheduler").unlink()
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(
        CheckpointError, match=r"FlowMatch\w+ goes along a velocity, and DiT predicts"
    ):
        models.load_pipeline(tmp_path, jnp.float32)


def test_defaults_are_the_schedule_s_and_the_size_that_it_was_trained_with(ours):
    found = ours.defaults
    assert (found.num_inference_steps, found.true_cfg_scale) == (50, 4.0)
    assert (found.height, found.width) == (SIDES[0], SIDES[0])


def test_the_model_s_own_defaults_come_before_its_size(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model_index.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index["_generation_defaults"] = {"height": 24}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = models.load_pipeline(tmp_path, jnp.float32).defaults
    assert (found.height, found.width) == (24, SIDES[0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("207", 207),
        (" 0 ", 0),
        ("golden retriever", 207),
        ("TENCH", 0),
        ("Tinca tinca", 0),
        ("tench, Tinca tinca", 0),
        ("", 1000),
    ],
)
def test_a_class_is_known_by_number_and_by_name(ours, text, number):
    assert ours.encode_prompts([text])["class_labels"].tolist() == [number]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1000", "class 1000 is out of range; give 0 to 999"),
        ("9" * 5000, "class 9+ is out of range"),
        ("-1", "'-1' is no class"),
        ("golden retreiver", "no class of this model; give a number .* 'golden retriever'"),
        ("crane", "class 'crane' is the name of 134 and 517; give the number"),
        ("²", "'²' is no class"),
    ],
)
def test_a_text_that_is_no_class_is_refused_in_one_line(ours, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        ours(text, height=16, width=16, progress=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_without_names_a_number_is_asked_for():
    with pytest.raises(ValueError, match=r"number from 0 to 9 .*no id2label"):
        Labels().find("cock", 10)


def test_names_of_classes_that_a_model_lacks_are_not_proposed():
    labels = Labels(names=(("cock", 7), ("crane", 134)))
    with pytest.raises(ValueError, match=r"no class of this model; .* such as 'cock'$"):
        labels.find("crane", 10)


@pytest.mark.parametrize("value", [["tench"], {"a": "tench"}, {"0": 1}])
def test_malformed_labels_are_refused_when_the_model_is_found(folder, tmp_path, value):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model_index.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": value}))
    with pytest.raises(CheckpointError, match=r"model_index.json: id2label must be an object"):
        models.find_model(tmp_path)


def test_calibration_is_on_classes_spread_over_all(ours):
    texts = calibration_prompts(ours)
    numbers = [int(text) for text in texts]
    assert len(set(numbers)) == len(texts) == 64
    gaps = np.diff(sorted(numbers[:16]), prepend=0, append=1000)
    assert gaps.max() < 150
    assert ours.encode_prompts(texts)["class_labels"].tolist() == numbers


def test_a_calibrated_recipe_is_made_and_the_checkpoint_draws_a_named_class(folder, tmp_path):
    options = ["--calibration-samples", "2", "--calibration-steps", "1"]
    quantize.main(
        ["--model", f"{folder}", "--recipe", "w4a8x-gptq", "--out", f"{tmp_path}/q", *options]
    )
    call = ["--prompt", "tench", "--steps", "2", "--out", f"{tmp_path}/x.png"]
    generate.main(["--model", f"{tmp_path}/q", *call])
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (SIDES[0], SIDES[0])
