"""The published protocol's networks, random ones from files, against the libraries and numpy."""

import importlib.util
import shutil

import numpy as np
import published_files
import pytest
import scipy.linalg
from PIL import Image

from quartz_jax.evaluation import metrics_torch as published

if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("the extra published isn't installed", allow_module_level=True)
published.import_libraries()

import torch  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of all three networks, by the names of `open_networks`."""
    folder = tmp_path_factory.mktemp("networks")
    return {
        "inception": published_files.save_inception(folder / "inception.pth"),
        "clip": published_files.save_clip(folder / "clip"),
        "lpips": published_files.save_alexnet(folder / "alexnet.pth"),
    }


@pytest.fixture(scope="module")
def networks(files):
    return published.open_networks(**files)


def random_images(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def test_features_are_the_library_s_of_images_resized_whole(files, monkeypatch):
    from torch_fidelity import FeatureExtractorInceptionV3

    monkeypatch.setattr(published, "_BATCH", 2)
    monkeypatch.setattr(published, "_LAYER", "64")  # early, for time
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*s, 3), np.uint8) for s in ((299, 299), (40, 70), (500, 9))]
    network = FeatureExtractorInceptionV3("x", ["64"], str(files["inception"]))
    found = published.Inception(files["inception"]).features(iter(images))
    assert (found.shape, found.dtype) == ((3, 64), np.float32)
    for row, image in zip(found, images, strict=True):
        pixels = np.array(Image.fromarray(image).resize((299, 299), Image.Resampling.BICUBIC))
        wanted = network(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0][0].numpy()
        np.testing.assert_allclose(row, wanted, rtol=1e-3, atol=1e-4 * row.max())


def test_fid_s_features_are_the_last(networks):
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    assert networks.inception.features([image]).shape == (1, 2048)


def test_the_frechet_distance_is_that_of_the_normal_distributions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 8)), 1 + rng.normal(size=(20, 8)) @ rng.normal(size=(8, 8))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    mean = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    wanted = mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert published.frechet_distance(x, y) == pytest.approx(wanted, rel=1e-6)
    assert published.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two images or more, not 1 and 20"):
        published.frechet_distance(x[:1], y)


def test_the_clip_score_is_a_hundred_times_the_cosine(files, networks):
    from transformers import CLIPModel, CLIPProcessor

    model, prompts = CLIPModel.from_pretrained(files["clip"]), ["a cat", "a dog on a red sofa"]
    processor, images = CLIPProcessor.from_pretrained(files["clip"]), random_images(2, 48, 40, 3)
    wanted = []
    for prompt, image in zip(prompts, images, strict=True):
        pixels = processor(images=np.round(image * 255).astype(np.uint8), return_tensors="pt")
        a = model.get_image_features(**pixels).pooler_output[0].detach().numpy()
        b = model.get_text_features(**processor(text=prompt, return_tensors="pt"))
        b = b.pooler_output[0].detach().numpy()
        wanted.append(100 * max(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0))
    assert min(wanted) > 0  # else it would show little
    np.testing.assert_allclose(networks.clip.score(images, prompts), wanted, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_is_too_long_for_clip_is_cut(networks):
    images, text = random_images(1, 32, 32, 3), "a cat and a dog " * 20
    assert networks.clip.score(images, [text]) == networks.clip.score(images, [text + "and a cow"])


def test_lpips_is_zero_for_equal_images_and_each_pair_s_own(networks):
    x, y = random_images(2, 2, 64, 64, 3)
    assert (networks.lpips.distance(x, x) == 0).all()
    found = networks.lpips.distance(x, y)
    assert (found > 0).all()
    for i in range(2):
        alone = networks.lpips.distance(x[i : i + 1], y[i : i + 1])
        np.testing.assert_allclose(alone, found[i : i + 1], rtol=1e-5)


def test_networks_that_were_not_given_are_none(files):
    found = published.open_networks(None, None, files["lpips"])
    assert (found.inception, found.clip, list(found.hashes)) == (None, None, ["lpips"])


@pytest.mark.parametrize("name", ["inception", "lpips", "clip"])
def test_absent_files_are_refused(tmp_path, name):
    given = dict.fromkeys(("inception", "clip", "lpips")) | {name: tmp_path / "absent"}
    with pytest.raises((OSError, ValueError), match="absent"):
        published.open_networks(**given)


@pytest.mark.parametrize(("name", "other"), [("inception", "lpips"), ("lpips", "inception")])
def test_weights_of_another_network_are_refused(files, name, other):
    given = dict.fromkeys(("inception", "clip", "lpips")) | {name: files[other]}
    with pytest.raises(ValueError, match=rf"{files[other].name} doesn't hold"):
        published.open_networks(**given)


@pytest.mark.parametrize("name", ["inception", "lpips"])
def test_files_that_are_no_weights_are_refused(tmp_path, name):
    (tmp_path / "x.pth").write_text("nothing")
    given = dict.fromkeys(("inception", "clip", "lpips")) | {name: tmp_path / "x.pth"}
    with pytest.raises(ValueError, match=r"x.pth doesn't hold weights saved by torch"):
        published.open_networks(**given)


def test_half_a_clip_is_refused(files, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(files["clip"])
    model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="'clip_text_model' model; give a folder of a whole CLIP"):
        published.open_networks(None, tmp_path / "text", None)
    shutil.copy(files["clip"] / "config.json", tmp_path / "text")
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of a CLIP model|doesn't hold"):
        published.open_networks(None, tmp_path / "text", None)
