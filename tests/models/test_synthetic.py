"""Random FLUX.1 checkpoints: published counts, both layouts load, the same bytes from a seed."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from small_flux import SIZES

import models
from models import synthetic
from models.checkpoint_io import CheckpointError, TracingRngs, stored_tensors
from models.flux import FluxTransformer
from models.flux.params import bfl_rules, diffusers_rules
from models.synthetic import FLUX_DEV, write_random_flux, write_safetensors
from models.text_encoders import clip, t5
from models.tiny_flux.architecture import FOLDER
from models.vae.modeling import AutoencoderKL
from models.vae.params import RULES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "dev"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_SHARD_BYTES", 300_000)
        write_random_flux(path, SIZES, tokenizers=FOLDER)
    return path


@pytest.mark.parametrize(
    ("module", "config", "rules", "parameters"),
    [
        # total_size of the published safetensors indexes, and files' sizes, over 2
        (FluxTransformer, FLUX_DEV.transformer, diffusers_rules(FLUX_DEV.transformer), 11901408320),
        (FluxTransformer, FLUX_DEV.transformer, bfl_rules(), 11901408320),
        (t5.T5Encoder, FLUX_DEV.t5, t5.checkpoint_rules(), 4762310656),
        (clip.CLIPTextEncoder, FLUX_DEV.clip, clip.checkpoint_rules(), 123060480),
        (AutoencoderKL, FLUX_DEV.vae, RULES, 83819683),
    ],
)
def test_parameters_are_as_many_as_published(module, config, rules, parameters):
    tensors = stored_tensors(lambda: module(config, rngs=TracingRngs()), rules)
    assert sum(math.prod(shape) for _, shape in tensors.values()) == parameters


def test_the_folder_loads_and_makes_finite_images(folder):
    pipeline = models.load_pipeline(folder, dtype=jnp.float32)
    images = pipeline(
        ["a pizza"], height=32, width=32, num_inference_steps=2, progress=False, output_type="np"
    )
    assert images.shape == (1, 32, 32, 3)
    assert np.isfinite(images).all() and images.std() > 0
    assert pipeline.defaults.num_inference_steps == 28
    assert pipeline.tokenizer_2.model_max_length == 512


def test_large_components_are_sharded_with_an_index(folder):
    index = json.loads(
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = sorted(x.name for x in (folder / "transformer").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    size = sum(
        x.nbytes for file in files for x in load_file(folder / "transformer" / file).values()
    )
    assert index["metadata"]["total_size"] == size


def test_weights_have_the_deviation_that_keeps_activations_of_order_one(folder):
    module = models.load_component(folder / "transformer", dtype=jnp.float32)
    kernel = module.single_blocks[0].linear2.kernel[...]
    assert float(kernel.std()) == pytest.approx(kernel.shape[0] ** -0.5, rel=0.05)
    assert float(abs(kernel.mean())) < 0.01
    assert np.all(module.single_blocks[0].query_norm.scale[...] == 1)


def test_a_seed_gives_the_same_bytes_and_another_others(tmp_path):
    for name, seed in {"one": 0, "same": 0, "other": 1}.items():
        write_random_flux(tmp_path / name, SIZES, tokenizers=FOLDER, layout="bfl", seed=seed)
    one, same, other = (
        (tmp_path / name / "ae.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


def test_single_files_load_with_the_folder_s_text_encoders(tmp_path, folder):
    write_random_flux(tmp_path / "bfl", SIZES, tokenizers=FOLDER, layout="bfl")
    assert sorted(x.name for x in (tmp_path / "bfl").glob("[!.]*")) == [
        "ae.safetensors",
        "flux1-dev.safetensors",
    ]
    for path in (tmp_path / "bfl", tmp_path / "bfl" / "flux1-dev.safetensors"):
        pipeline = models.load_pipeline(path, text_encoders=folder)
        assert pipeline.transformer.config == SIZES.transformer
        assert pipeline.vae.config == SIZES.vae
        leaves = nnx.to_flat_state(nnx.state(pipeline.vae))
        assert {leaf[...].dtype.name for _, leaf in leaves} == {"bfloat16"}


def test_an_interrupted_file_has_no_name_yet(tmp_path):
    def fail(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", {"a": (2,)}, fail)
    assert not (tmp_path / "x.safetensors").exists()


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="exists already"):
        write_random_flux(tmp_path, SIZES, tokenizers=FOLDER)


def test_missing_tokenizers_are_refused_before_any_work(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        write_random_flux(tmp_path / "out", SIZES, tokenizers=tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout is 'onnx'"):
        write_random_flux(tmp_path / "out", SIZES, tokenizers=FOLDER, layout="onnx")
