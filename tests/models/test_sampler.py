"""What the sampler does for any family, seen on a toy: files, guidance, noise of steps, classes."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from toy_family import TOY, TRANSFORMER, ToyConfig

import models
from models import families
from models.component import Naming
from models.noise_schedulers import DDIMScheduler
from models.schedulers import FlowMatchEulerScheduler
from models.stored_files import CheckpointError, open_checkpoint
from models.synthetic import write_random_model

LATENTS = {"progress": False, "output_type": "latent"}


@pytest.fixture(scope="module")
def known():
    """The toy among the known families."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", (*families.FAMILIES, TOY))
        yield


@pytest.fixture(scope="module")
def folder(known, tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "model"
    write_random_model(path, TOY, TOY.sizes["toy"])
    return path


@pytest.fixture(scope="module")
def sampler(folder):
    return models.load_pipeline(folder, jnp.float32)


def test_a_family_is_found_by_its_index_and_samples_by_its_defaults(folder, sampler):
    assert models.find_model(folder).family is TOY
    images = sampler(["3", "7"], progress=False, output_type="np")
    assert images.shape == (2, 16, 32, 3) and np.isfinite(images).all()
    assert sampler.defaults.num_inference_steps == 3
    assert "encode prompts" not in sampler.times.seconds  # there is no encoder


def test_guidance_in_two_calls_is_that_in_one(sampler):
    apart = dataclasses.replace(sampler, guidance_in_two_calls=True)
    one, two, none = (
        x(["3", "7"], true_cfg_scale=scale, **LATENTS)
        for x, scale in ((sampler, 3.0), (apart, 3.0), (sampler, 1.0))
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)  # sums of 32 in another order
    assert not np.allclose(one, none, atol=1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noisy(FlowMatchEulerScheduler):
    """Adds noise in each step, and counts the steps in its memory."""

    stochastic: ClassVar[bool] = True

    def memory(self, sample):
        return jnp.zeros((), jnp.int32)

    def step(self, sample, prediction, level, memory, noise):
        sample, _ = super().step(sample, prediction, level, None, None)
        return sample + 0.1 * noise, memory + 1


def test_noise_of_steps_depends_on_seed_and_place_and_not_on_the_batch(sampler):
    noisy = dataclasses.replace(sampler, scheduler=Noisy())
    options = LATENTS | {"true_cfg_scale": 1.0}
    two, again, three = (noisy(x, **options) for x in (["1"] * 2, ["1"] * 2, ["1"] * 3))
    np.testing.assert_array_equal(two, again)
    np.testing.assert_array_equal(two, three[:2])
    plain = dataclasses.replace(sampler, scheduler=FlowMatchEulerScheduler())
    added = np.asarray(two - plain(["1"] * 2, **options))
    assert added.std() == pytest.approx(0.1 * 3**0.5, rel=0.1)  # three steps' noise
    assert abs(np.corrcoef(added[0].ravel(), added[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("apart", [False, True])
def test_an_image_has_the_same_bits_alone_and_among_others(sampler, guidance, apart):
    """On a CPU: with guidance in one call, in two and without."""
    sampler = dataclasses.replace(sampler, guidance_in_two_calls=apart)
    options = {"true_cfg_scale": guidance, "progress": False, "output_type": "np"}
    noise = sampler.initial_noise(jax.random.key(5), 3, 16, 32)
    together = sampler(["3", "7", "1"], latents=noise, **options)
    alone = [sampler([x], latents=noise[i : i + 1], **options) for i, x in enumerate("371")]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_component_is_replaced_by_its_name(sampler):
    mine = sampler.replace()
    mine.transformer = nnx.clone(sampler.transformer)
    assert mine.models["transformer"] is mine.transformer is not sampler.transformer
    changed = jax.tree.map(lambda x: 2 * x, nnx.state(mine.transformer))
    nnx.update(mine.transformer, changed)
    assert not np.array_equal(mine(["3"], **LATENTS), sampler(["3"], **LATENTS))


def test_single_steps_are_those_of_the_whole(sampler):
    canvas, noise = sampler.canvas(16, 32), sampler.initial_noise(jax.random.key(0), 1, 16, 32)
    conditions = sampler.encode_prompts(["3"])
    whole = sampler.denoise(
        noise, conditions, height=16, width=32, num_inference_steps=3, progress=False
    )
    levels = sampler.denoiser.levels(sampler.scheduler, 3, canvas, 1.0)
    latents = noise
    with sampler.steps(conditions, canvas) as steps:
        for level in levels:
            velocity = steps.predict(latents, level)
            moved = latents + (level["next"] - level["time"]) * velocity
            latents, _ = steps(latents, None, level)
            np.testing.assert_allclose(latents, moved, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(latents, whole)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prompts": "cat"}, "class 'cat' is out of range; give 0 to 9"),
        ({"prompts": "10"}, "class '10' is out of range"),
        ({"guidance_scale": 2.0}, "no guidance embedding"),
        ({"prompts": "1\ud800"}, "isn't valid Unicode"),
        ({"negative_prompt": "\udfff"}, "isn't valid Unicode"),
        ({"references": Image.new("I;16", (8, 8))}, "references has mode 'I;16', deeper than 8"),
        ({"references": [np.zeros((8, 8, 3))]}, "references is a ndarray; give an image"),
        ({"mask": Image.new("F", (8, 8))}, "mask has mode 'F', deeper than 8"),
        ({"mask": Image.new("LA", (8, 8))}, "mask has transparent pixels"),
        ({"image": [np.zeros((8, 8, 3))]}, "image is a ndarray; give an image"),
    ],
)
def test_what_the_family_refuses_is_named_before_any_work(sampler, arguments, told):
    with pytest.raises(ValueError, match=told):
        sampler(**{"prompts": "1", **LATENTS, **arguments})


def test_more_steps_than_a_scheduler_has_are_refused_before_the_encoders_run(sampler, monkeypatch):
    monkeypatch.setattr(type(sampler), "encode_prompts", lambda *args: pytest.fail("it encodes"))
    ours = dataclasses.replace(sampler, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="num_inference_steps is 2000; it must be 1 to 1000"):
        ours("1", num_inference_steps=2000, **LATENTS)


def test_calls_that_overlap_end_their_own_loading(sampler):
    first, second = sampler._loading_ahead(), sampler._loading_ahead()
    with first:
        second.__enter__()
    second.__exit__(None, None, None)
    assert sampler._ahead is None


def test_components_by_name_are_attributes_and_replaced(sampler):
    assert sampler.transformer is sampler.models["transformer"]
    assert sampler.replace(transformer=None).models["vae"] is sampler.vae
    with pytest.raises(ValueError, match="no component unet; components are transformer, vae"):
        sampler.replace(unet=None)
    with pytest.raises(AttributeError, match="tokenizer"):
        _ = sampler.tokenizer


def test_a_component_is_loaded_and_exported_by_its_class(folder, tmp_path):
    module = models.load_component(folder / "transformer", jnp.float32)
    models.export_component(module, tmp_path / "copy", jnp.float32)
    again = models.load_component(tmp_path / "copy", jnp.float32)
    np.testing.assert_array_equal(module.up.kernel[...], again.up.kernel[...])


def test_a_scheduler_that_is_not_known_is_named(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(text) | {"_class_name": "KarrasVeScheduler"}))
        with pytest.raises(CheckpointError, match="scheduler 'KarrasVeScheduler' is not supported"):
            models.load_pipeline(folder)
    finally:
        path.write_text(text)


def test_a_family_without_single_files_writes_none(known, tmp_path):
    with pytest.raises(ValueError, match="Toy has no single files"):
        write_random_model(tmp_path / "x", TOY, TOY.sizes["toy"], layout="file")
    assert not (tmp_path / "x").exists()


def test_a_single_file_is_of_the_family_whose_sizes_it_has(tmp_path, monkeypatch):
    """FLUX.1's telling tensor is there, and what FLUX.1 needs beside it isn't."""
    telling = "double_blocks.0.img_attn.qkv.weight"
    file = Naming(
        telling=telling, rules=lambda config, names: (), config=lambda shapes, path: ToyConfig()
    )
    parts = {**TOY.components, "transformer": dataclasses.replace(TRANSFORMER, file=file)}
    single = dataclasses.replace(TOY, components=parts)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, single))
    path = tmp_path / "toy.safetensors"
    save_file({telling: np.zeros((2, 2), np.float32)}, path)
    assert families.of_file(path, open_checkpoint(path)) is single
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES[:-1])
    assert families.of_file(path, open_checkpoint(path)) is families.FAMILIES[0]
