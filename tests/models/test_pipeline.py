"""The FLUX pipeline's parts, repeatability, laziness and refusals; parity is in test_parity."""

import dataclasses
import gc
import json
import shutil
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import models
import models.sampler
from models import noise_schedulers, stages
from models.flux.latents import image_ids, pack, unpack
from models.pictures import to_pixels
from models.stages import Deferred
from models.stored_files import CheckpointError

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tiny_pipeline import make_tiny_flux  # noqa: E402 (needs diffusers)

PROMPTS = ["a cat, 3d style", "two red hats on a table, flat"]
SIZE = {"height": 32, "width": 48}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return tmp_path_factory.mktemp("schnell")


@pytest.fixture(scope="module", autouse=True)
def peer(schnell):
    return make_tiny_flux(schnell, dev=False)


@pytest.fixture(scope="module")
def pipeline(schnell):
    return models.load_pipeline(schnell, dtype=jnp.float32)


def test_packing_matches_diffusers(peer):
    latents = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype(np.float32)
    channels_first = torch.from_numpy(latents.transpose(0, 3, 1, 2))
    expected = peer._pack_latents(channels_first.contiguous(), 2, 3, 6, 4)
    np.testing.assert_array_equal(pack(latents), expected)


def test_unpack_inverts_pack():
    latents = np.random.default_rng(0).normal(size=(2, 6, 4, 3))
    np.testing.assert_array_equal(unpack(pack(latents), 3, 2), latents)


def test_image_ids_match_diffusers(peer):
    expected = peer._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32)
    np.testing.assert_array_equal(image_ids(3, 2), expected)


@pytest.mark.parametrize("image", [None, PHOTO], ids=["text", "image"])
def test_same_seed_gives_the_same_bytes(pipeline, image):
    options = {**SIZE, "seed": 3, "num_inference_steps": 2, "progress": False, "image": image}
    first, again = (pipeline(PROMPTS, **options) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]


def test_noise_of_an_image_does_not_depend_on_the_batch(pipeline):
    two, three = (pipeline.initial_noise(jax.random.key(0), n, **SIZE) for n in (2, 3))
    np.testing.assert_array_equal(two, three[:2])
    assert not np.array_equal(three[0], three[1])


def test_all_steps_are_one_program_where_weights_are_committed_to_a_device(schnell):
    pipeline = models.load_pipeline(schnell, dtype=jnp.float32)
    graphdef, state = nnx.split(pipeline.transformer)
    moved = nnx.merge(graphdef, jax.device_put(state, jax.devices()[1]))
    pipeline = pipeline.replace(transformer=moved)
    static = pipeline.denoiser, pipeline.scheduler
    step = models.sampler.compiled(models.sampler.denoising_step, moved, *static).func
    step.clear_cache()
    pipeline("a cat", **SIZE, num_inference_steps=3, progress=False, output_type="latent")
    assert step._cache_size() == 1


def test_weights_are_not_baked_into_the_compiled_step(schnell):
    pipeline = models.load_pipeline(schnell, dtype=jnp.float32)
    options = {**SIZE, "num_inference_steps": 1, "progress": False, "output_type": "latent"}
    before = pipeline("a cat", **options)
    bias = pipeline.transformer.final_layer.linear.bias
    bias[...] = bias[...] + 1.0
    np.testing.assert_allclose(pipeline("a cat", **options), before - 1.0, atol=1e-5)


def test_the_call_does_the_stages_in_turn(pipeline):
    """With an image: what `__call__` gives is what its parts give, from noise of the same seed."""
    options = {**SIZE, "num_inference_steps": 4, "progress": False}
    key, shape = jax.random.key(5), pipeline.initial_noise(jax.random.key(5), 2, **SIZE).shape
    found = pipeline(PROMPTS, image=PHOTO, strength=0.5, seed=5, output_type="latent", **options)
    encoder_noise = models.sampler._noise(jax.random.fold_in(key, np.uint32(2**31)), shape)
    pixels = np.stack([to_pixels(PHOTO, **SIZE)] * 2)
    expected = pipeline.denoise(
        pipeline.initial_noise(key, 2, **SIZE),
        pipeline.encode_prompts(PROMPTS),
        image_latents=pipeline.encode_images(pixels, encoder_noise),
        strength=0.5,
        **options,
    )
    np.testing.assert_array_equal(found, expected)


def test_an_image_for_each_prompt(pipeline):
    other = Image.new("RGB", (8, 8), "red")
    options = {**SIZE, "num_inference_steps": 2, "progress": False, "output_type": "latent"}
    options["strength"] = 0.5
    both = pipeline(PROMPTS, image=[PHOTO, other], **options)
    same = pipeline(PROMPTS, image=PHOTO, **options)
    np.testing.assert_array_equal(both[0], same[0])
    assert not np.allclose(both[1], same[1], atol=1e-3)


def test_a_second_call_of_the_same_shapes_traces_nothing(pipeline, monkeypatch):
    """Neither other weights of the same kind nor another scale, seed or image trace again."""
    traced = []
    for name in ("denoising_step", "_apply", "_encode", "_decode"):
        function = getattr(models.sampler, name)

        def counted(*args, name=name, function=function):
            traced.append(name)
            return function(*args)

        monkeypatch.setattr(models.sampler, name, counted)
    options = {**SIZE, "num_inference_steps": 2, "progress": False, "true_cfg_scale": 2.0}
    pipeline(PROMPTS, image=PHOTO, seed=0, **options)
    assert sorted(traced) == ["_apply", "_apply", "_decode", "_encode", "denoising_step"]
    options |= {"true_cfg_scale": 3.0, "num_inference_steps": 3, "strength": 1.0}
    pipeline(["other", "texts"], image=PHOTO.rotate(90), seed=1, **options)
    assert len(traced) == 5


def device_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def parameter_bytes(module):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module)))


def test_deferred_models_are_on_the_device_one_at_a_time(schnell, pipeline):
    seen = {}

    def deferred(name):
        def load():
            seen[name] = device_bytes() - before
            return models.load_component(schnell / name, jnp.float32)

        return Deferred(config=getattr(pipeline, name).config, load=load)

    names = ("text_encoder", "text_encoder_2", "transformer", "vae")
    frugal = models.load_pipeline(schnell, jnp.float32, **{name: deferred(name) for name in names})
    options = {**SIZE, "num_inference_steps": 2, "progress": False, "output_type": "np"}
    gc.collect()
    before = device_bytes()
    found = frugal(PROMPTS, **options)
    assert list(seen) == list(names)
    # what is there before a model loads is prompts and latents, none of the earlier models
    assert max(seen.values()) < min(parameter_bytes(getattr(pipeline, name)) for name in names) / 2
    np.testing.assert_array_equal(found, pipeline(PROMPTS, **options))
    assert set(frugal.times.seconds) == {f"load {name}" for name in names} | {
        "encode prompts",
        "step",
        "decode",
    }
    assert [len(frugal.times.seconds[name]) for name in ("step", "load vae")] == [2, 1]


def test_models_that_are_loaded_ahead_give_the_same_pictures(schnell, pipeline, monkeypatch):
    names, loads = ("text_encoder", "text_encoder_2", "transformer", "vae"), []

    def deferred(name):
        def load():
            loads.append((name, threading.current_thread() is threading.main_thread()))
            return models.load_component(schnell / name, jnp.float32)

        return Deferred(config=getattr(pipeline, name).config, load=load, bytes=10)

    monkeypatch.setattr(stages, "memory_limit", lambda: 50)  # room for three
    lazy = models.load_pipeline(schnell, jnp.float32, **{name: deferred(name) for name in names})
    options = {**SIZE, "num_inference_steps": 2, "progress": False, "output_type": "np"}
    found = lazy(PROMPTS, **options)
    np.testing.assert_array_equal(found, pipeline(PROMPTS, **options))
    assert loads == [(name, name == "vae") for name in names]


def test_a_loaded_copy_loads_nothing_again(schnell, pipeline):
    loads = []

    def load():
        loads.append(1)
        return pipeline.vae

    given = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    vae = Deferred(config=pipeline.vae.config, load=load)
    lazy = models.load_pipeline(
        schnell, jnp.float32, vae=vae, transformer=pipeline.transformer, **given
    )
    kept = lazy.load()
    kept("a", image=PHOTO, **SIZE, num_inference_steps=2, progress=False)
    assert len(loads) == 1
    lazy("a", image=PHOTO, **SIZE, num_inference_steps=2, progress=False)
    assert len(loads) == 3  # to encode and to decode


def test_bfloat16_pipeline_keeps_float32_latents(schnell):
    pipeline = models.load_pipeline(schnell)
    options = {**SIZE, "num_inference_steps": 2, "progress": False, "output_type": "latent"}
    latents = pipeline("a cat", **options)
    assert latents.dtype == jnp.float32
    assert np.all(np.isfinite(latents))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a cat", 3]}, "prompts holds 3"),
        ({"width": 40}, "width is 40.* multiple of 16"),
        ({"height": 0}, "height is 0.* multiple of 16"),
        ({"guidance_scale": 3.5}, "guidance_scale is 3.5.* no guidance embedding"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"output_type": "gif"}, "output_type is 'gif'"),
        ({"strength": 0.5}, "strength is 0.5, but there is no image"),
        ({"image": PHOTO, "strength": 0.0}, "strength is 0.0; it must be above 0"),
        ({"image": PHOTO, "strength": 1.5}, "strength is 1.5; it must be above 0"),
        ({"image": [PHOTO] * 3}, "image holds 3; give one, or one for each prompt"),
        ({"latents": np.zeros((1, 5, 16))}, r"latents has shape \(1, 5, 16\)"),
        ({"prompts": "caf\udce9"}, r"prompts holds 'caf\\udce9', which isn't valid Unicode"),
        ({"negative_prompt": "caf\udce9"}, "isn't valid Unicode"),
        ({"width": 10**6}, "width is 1000000; it must be at most 8192"),
        ({"height": 99999999999999999984}, "it must be at most 8192"),
        ({"guidance_scale": 1e39}, "guidance_scale is 1e.39; it must be a finite number"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale is nan; it must be a finite number"),
        ({"image": Image.new("I;16", (8, 8))}, "mode 'I;16', deeper than 8 bits"),
        ({"image": Image.new("F", (8, 8))}, "mode 'F', deeper than 8 bits"),
        ({"image": [Image.new("RGBA", (8, 8), (9, 9, 9, 254))]}, "transparent pixels"),
    ],
)
def test_bad_argument_is_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompts": "a cat", **SIZE, "progress": False, **arguments})


def set_value(module, path, value):
    """Return a copy of a module with one element of a parameter changed."""
    module = nnx.clone(module)
    state = nnx.to_flat_state(nnx.state(module))
    (variable,) = (x for key, x in state if ".".join(map(str, key)) == path)
    changed = np.array(variable[...])
    changed.flat[0] = value
    nnx.update(
        module, nnx.from_flat_state([(tuple(_steps(path)), variable.replace(jnp.asarray(changed)))])
    )
    return module


def _steps(path):
    return [int(step) if step.isdigit() else step for step in path.split(".")]


@pytest.mark.parametrize(
    ("component", "path", "value", "told"),
    [
        ("text_encoder", "final_layer_norm.bias", np.nan, "encode prompts: .* text_encoder hold"),
        ("text_encoder_2", "final_norm.scale", np.inf, "encode prompts: .* text_encoder_2 hold"),
        ("transformer", "img_in.bias", np.nan, "denoise: the latents after step 1 hold"),
        ("vae", "decoder.conv_out.bias", np.nan, "decode: the pixels hold"),
        ("vae", "decoder.conv_out.bias", np.inf, "decode: the pixels hold"),  # white if clipped
    ],
)
def test_a_stage_whose_result_is_not_finite_is_named(pipeline, component, path, value, told):
    broken = set_value(pipeline.models[component], path, value)
    pipeline = pipeline.replace(**{component: broken})
    with pytest.raises(ValueError, match=told):
        pipeline("a cat", **SIZE, num_inference_steps=2, progress=False)


def test_an_image_whose_latents_are_not_finite_is_named(pipeline):
    broken = set_value(pipeline.vae, "encoder.conv_in.bias", np.nan)
    pipeline = pipeline.replace(vae=broken)
    with pytest.raises(ValueError, match="encode images: the latents hold"):
        pipeline("a cat", image=PHOTO, **SIZE, num_inference_steps=2, progress=False)


def test_what_is_cut_from_a_prompt_is_said(pipeline):
    with pytest.warns(UserWarning) as said:
        pipeline.encode_prompts(["a cat", "a big red hat, painted in blue"])
    messages = sorted(str(warning.message) for warning in said)
    assert len(messages) == 2  # one a tokenizer, none for the short prompt
    for message, kept in zip(messages, (10, 11), strict=True):  # of 12, without bos and eos
        assert f"takes {kept} tokens" in message and "blue" in message
        assert message.startswith("prompt 'a big red hat")


def test_a_prompt_that_fits_exactly_is_cut_silently_nowhere(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.encode_prompts(["abcdefghij"])


def test_an_opaque_picture_with_alpha_is_its_colours(pipeline):
    alpha = PHOTO.copy()
    alpha.putalpha(255)
    options = {**SIZE, "num_inference_steps": 1, "progress": False, "output_type": "latent"}
    found, wanted = (pipeline("a cat", image=x, **options) for x in (alpha, PHOTO))
    np.testing.assert_array_equal(found, wanted)


def test_component_loads_by_class_name(schnell):
    kinds = {
        "transformer": "FluxTransformer",
        "text_encoder": "CLIPTextEncoder",
        "text_encoder_2": "T5Encoder",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerScheduler",
    }
    for name, kind in kinds.items():
        assert type(models.load_component(schnell / name)).__name__ == kind


def test_given_transformer_takes_the_place_of_the_folders(schnell, pipeline, tmp_path):
    folder = shutil.copytree(schnell, tmp_path / "model")
    shutil.rmtree(folder / "transformer")
    loaded = models.load_pipeline(folder, transformer=pipeline.transformer)
    assert loaded.transformer is pipeline.transformer


def edit_index(folder, **values):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folder_can_set_defaults(schnell, tmp_path):
    folder = shutil.copytree(schnell, tmp_path / "model")
    edit_index(folder, _generation_defaults={"num_inference_steps": 7, "height": 128})
    defaults = models.load_pipeline(folder).defaults
    assert (defaults.num_inference_steps, defaults.height, defaults.width) == (7, 128, 1024)


def test_a_model_of_one_size_says_so_where_another_is_asked_for(schnell, tmp_path):
    folder = shutil.copytree(schnell, tmp_path / "model")
    edit_index(folder, _generation_defaults={"width": 48, "height": 32})
    assert models.only_size(folder) == (48, 32) and models.only_size(schnell) is None
    pipeline = models.load_pipeline(folder, jnp.float32)
    options = {"num_inference_steps": 1, "progress": False, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a", **options)
    with pytest.warns(UserWarning, match="this model draws 48x32; of 48x48"):
        pipeline("a", height=48, **options)


def test_diffusers_ignores_the_defaults(schnell, tmp_path):
    import diffusers

    folder = shutil.copytree(schnell, tmp_path / "model")
    edit_index(folder, _generation_defaults={"num_inference_steps": 7})
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(folder), diffusers.FluxPipeline)


def test_folder_without_index_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_index\.json does not exist"):
        models.load_pipeline(tmp_path)


def test_other_pipeline_is_refused(schnell, tmp_path):
    folder = shutil.copytree(schnell, tmp_path / "model")
    edit_index(folder, _class_name="SanaPipeline")
    with pytest.raises(CheckpointError, match="_class_name is 'SanaPipeline'"):
        models.load_pipeline(folder)


def test_missing_component_is_named(schnell, tmp_path):
    folder = shutil.copytree(schnell, tmp_path / "model")
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="lacks the component folders vae"):
        models.load_pipeline(folder)


def test_unreadable_tokenizer_is_named(schnell, tmp_path):
    folder = shutil.copytree(schnell, tmp_path / "model")
    for file in (folder / "tokenizer_2").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer_2 holds no tokenizer"):
        models.load_pipeline(folder)


def test_unknown_component_class_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with pytest.raises(CheckpointError, match="class SanaTransformer2DModel is not supported"):
        models.load_component(tmp_path)


@pytest.mark.parametrize("kind", noise_schedulers.KINDS)
def test_every_scheduler_samples(pipeline, kind):
    """With what a step predicted in memory, with fresh noise an image and a step."""
    scheduler = kind.from_json({"clip_sample": False, "skip_prk_steps": True})
    sampler = dataclasses.replace(pipeline, scheduler=scheduler)

    def sample(*prompts, seed=0):
        options = {"num_inference_steps": 3, "seed": seed, "progress": False}
        latents = sampler(prompts, height=32, width=32, output_type="latent", **options)
        return np.asarray(latents)

    both = sample("a cat", "a dog")
    assert np.isfinite(both).all()
    np.testing.assert_array_equal(both, sample("a cat", "a dog"))
    alone = sample("a cat")
    # A batch of another size is another program: its sums are rounded otherwise.
    assert np.linalg.norm(both[:1] - alone) < 1e-4 * np.linalg.norm(alone)
    assert np.linalg.norm(sample("a cat", seed=1) - alone) > 0.1 * np.linalg.norm(alone)
