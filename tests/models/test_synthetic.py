"""Random FLUX.1 checkpoints: published counts, both layouts load, the same bytes from a seed."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from small_flux import SIZES

import models
from models import component, synthetic
from models.checkpoint_io import CheckpointError
from models.families import FAMILIES
from models.family import Tokenizer
from models.flux.family import FLUX
from models.flux2.family import FLUX2
from models.synthetic import write_random_model, write_safetensors
from models.tiny_flux.architecture import FOLDER
from models.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "dev"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "_SHARD_BYTES", {"diffusers": 300_000, "transformers": 150_000})
        write_random_model(path, FLUX, SIZES, tokenizers=FOLDER)
    return path


@pytest.mark.parametrize(
    ("name", "layout", "parameters"),
    [
        # total_size of the published safetensors indexes, and files' sizes, over 2
        ("transformer", "folder", 11901408320),
        ("transformer", "file", 11901408320),
        ("text_encoder_2", "folder", 4762310656),
        ("text_encoder", "folder", 123060480),
        ("vae", "folder", 83819683),
    ],
)
def test_parameters_are_as_many_as_published(name, layout, parameters):
    kind = FLUX.components[name]
    tensors = kind.tensors(FLUX.sizes["flux1-dev"][name], getattr(kind, layout))
    assert sum(math.prod(shape) for _, shape in tensors.values()) == parameters


def test_a_decoder_is_written_whole_though_its_last_layers_are_not_read(tmp_path):
    sizes = FLUX2.sizes["flux-2-klein-4b"]["text_encoder"]
    component = FLUX2.components["text_encoder"]
    tensors = component.tensors(sizes, component.folder)
    assert sum(math.prod(shape) for _, shape in tensors.values()) == 4022468096  # Qwen3-4B's
    sizes = dataclasses.replace(sizes, vocab_size=9, hidden_size=8, intermediate_size=8)
    sizes = dataclasses.replace(sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    synthetic._Writer(seed=0, progress=False).folder(tmp_path / "encoder", component, sizes)
    opened = component.open(tmp_path / "encoder")
    assert "layers.35.mlp.up_proj.weight" in opened.checkpoint.shapes
    assert component.config.from_json(opened.config) == sizes and sizes.layers == 27
    assert not any(path.startswith("layers.27.") for path in opened.sources)


def test_random_statistics_of_an_autoencoder_can_be_divided_by(tmp_path):
    sizes = dataclasses.replace(
        FLUX2.sizes["flux-2-klein-4b"]["vae"], block_out_channels=(32,), layers_per_block=1
    )
    component = FLUX2.components["vae"]
    synthetic._Writer(seed=0, progress=False).folder(tmp_path / "vae", component, sizes)
    module = component.load(tmp_path / "vae", jnp.float32)
    assert np.isfinite(module.normalize(jnp.ones((1, 2, 2, 32)))).all()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_published_sizes_fit_each_other(family):
    for sizes in family.sizes.values():
        assert sizes.keys() == family.components.keys()
        assert not list(family.misfits(sizes, {}))


def test_a_tokenizer_of_bytes_is_made_where_none_is_copied(tmp_path):
    made = Tokenizer(kind="Qwen2Tokenizer", length=9, specials=("<pad>", "<end>"))
    synthetic._write_tokenizer(tmp_path / "tokenizer", made, None)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer(["é<end>"], padding="max_length", max_length=9)["input_ids"][0]
    assert tokenizer.decode(ids) == "é<end>" + 6 * "<pad>"
    assert tokenizer.model_max_length == 9 and max(ids) == 257


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
        write_random_model(
            tmp_path / name, FLUX, SIZES, tokenizers=FOLDER, layout="file", seed=seed
        )
    one, same, other = (
        (tmp_path / name / "ae.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


def test_single_files_load_with_the_folder_s_text_encoders(tmp_path, folder):
    write_random_model(tmp_path / "bfl", FLUX, SIZES, tokenizers=FOLDER, layout="file")
    assert sorted(x.name for x in (tmp_path / "bfl").glob("[!.]*")) == [
        "ae.safetensors",
        "flux1-dev.safetensors",
    ]
    for path in (tmp_path / "bfl", tmp_path / "bfl" / "flux1-dev.safetensors"):
        pipeline = models.load_pipeline(path, text_encoders=folder)
        assert pipeline.transformer.config == SIZES["transformer"]
        assert pipeline.vae.config == SIZES["vae"]
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
        write_random_model(tmp_path, FLUX, SIZES, tokenizers=FOLDER)


def test_missing_tokenizers_are_refused_before_any_work(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        write_random_model(tmp_path / "out", FLUX, SIZES, tokenizers=tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout is 'onnx'"):
        write_random_model(tmp_path / "out", FLUX, SIZES, tokenizers=FOLDER, layout="onnx")
