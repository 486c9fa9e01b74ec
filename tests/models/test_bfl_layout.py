"""Black Forest Labs' naming: equal to diffusers' layout, and to what diffusers makes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_flux import (
    SIZES,
    random_transformer,
    random_vae,
    save_bfl_transformer,
    save_bfl_vae,
    save_diffusers_transformer,
)

import models
from models.checkpoint_io import (
    Checkpoint,
    CheckpointError,
    TracingRngs,
    match_params,
    stored_tensors,
)
from models.flux import FluxTransformer
from models.flux.family import FLUX
from models.flux.params import (
    TRANSFORMER,
    bfl_rules,
    config_from_bfl,
    diffusers_rules,
)
from models.loading import find_model, load_pipeline
from models.vae import AUTOENCODER_KL, AutoencoderKL
from models.vae.params import bfl_rules as vae_bfl_rules
from models.vae.params import config_from_bfl as vae_config_from_bfl

FLUX_DEV = FLUX.sizes["flux1-dev"]

SCHNELL = dataclasses.replace(SIZES["transformer"], guidance_embeds=False)


def assert_equal(one, other):
    one, other = ({p: x[...] for p, x in nnx.to_flat_state(nnx.state(x))} for x in (one, other))
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=str(path))


@pytest.fixture
def file(tmp_path):
    save_bfl_transformer(random_transformer(), tmp_path / "flux1-dev.safetensors")
    return tmp_path / "flux1-dev.safetensors"


@pytest.mark.parametrize("config", [SIZES["transformer"], SCHNELL], ids=["dev", "schnell"])
def test_both_layouts_load_the_same_transformer(tmp_path, config):
    module = random_transformer(config)
    save_bfl_transformer(module, tmp_path / "flux1.safetensors")
    save_diffusers_transformer(module, tmp_path / "transformer")
    loaded = [
        models.load_component(tmp_path / name, dtype=jnp.float32)
        for name in ("flux1.safetensors", "transformer")
    ]
    assert_equal(*loaded)
    assert loaded[0].config == loaded[1].config


def test_both_layouts_load_the_same_autoencoder(tmp_path):
    module = random_vae()
    save_bfl_vae(module, tmp_path / "ae.safetensors")
    AUTOENCODER_KL.export(module, tmp_path / "vae", dtype=jnp.float32)
    loaded = [
        AUTOENCODER_KL.load(tmp_path / name, jnp.float32) for name in ("ae.safetensors", "vae")
    ]
    assert_equal(*loaded)
    assert loaded[0].config == loaded[1].config


def test_comfyui_s_prefix_makes_no_difference(tmp_path, file):
    save_bfl_transformer(
        random_transformer(), tmp_path / "comfy.safetensors", prefix="model.diffusion_model."
    )
    assert_equal(*(models.load_component(path) for path in (file, tmp_path / "comfy.safetensors")))


def test_the_sizes_of_the_published_files_are_found():
    def shapes(module, config, rules):
        tensors = stored_tensors(lambda: module(config, rngs=TracingRngs()), rules)
        return {name: shape for name, (_, shape) in tensors.items()}

    transformer = shapes(FluxTransformer, FLUX_DEV["transformer"], bfl_rules())
    assert config_from_bfl(transformer) == FLUX_DEV["transformer"]
    vae = shapes(AutoencoderKL, FLUX_DEV["vae"], vae_bfl_rules(FLUX_DEV["vae"]))
    assert vae_config_from_bfl(vae) == FLUX_DEV["vae"]


def test_rows_go_where_diffusers_puts_them_at_full_size():
    """A number for every row of FLUX.1's blocks; diffusers' converter knows their width only."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")

    config = dataclasses.replace(FLUX_DEV["transformer"], num_layers=2, num_single_layers=2)

    def build():
        return FluxTransformer(config, rngs=TracingRngs())

    numbers, start = {}, 0
    for name, (_, shape) in stored_tensors(build, bfl_rules()).items():
        numbers[name] = np.arange(start, start + shape[0], dtype=np.int32)
        start += shape[0]
    converted = utils.convert_flux_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(x) for name, x in numbers.items()}
    )
    rules = diffusers_rules(config)
    assert converted.keys() == stored_tensors(build, rules).keys()
    found = rows_of(build, rules, {name: x.numpy() for name, x in converted.items()})
    expected = rows_of(build, bfl_rules(), numbers)
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def rows_of(build, rules, tensors):
    """Read each parameter from tensors that hold a number a row."""
    shapes = {name: shape for name, (_, shape) in stored_tensors(build, rules).items()}
    stored = match_params(
        build, Checkpoint("x", {}, shapes, dict.fromkeys(shapes, "F32")), rules, config={}
    )
    found = {}
    for path, (names, rule) in stored.sources.items():
        rows = np.concatenate([tensors[name] for name in names])
        found[path] = rows if rule.transform is None else rule.transform(rows)
    return found


def test_the_autoencoder_is_what_diffusers_makes_of_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    module = random_vae()
    save_bfl_vae(module, tmp_path / "ae.safetensors")
    AUTOENCODER_KL.export(module, tmp_path / "vae", dtype=jnp.float32)
    peer = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "ae.safetensors"), config=str(tmp_path / "vae"), local_files_only=True
    )
    expected = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    assert peer.state_dict().keys() == expected.keys()
    for name, tensor in peer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_missing_misshapen_and_unexpected_tensors_are_listed_together(file):
    tensors = load_file(file) | {"extra": np.zeros(2), "img_in.bias": np.zeros(3, np.float32)}
    del tensors["single_blocks.1.norm.key_norm.scale"]
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError,
        match=r"missing single_blocks\.1\.norm\.key_norm\.scale; "
        r"misshapen img_in\.bias: \[3\], expected \[64\]; unexpected extra",
    ):
        models.open_component(file)


def test_a_model_with_many_tensors_missing_gets_a_short_list(file):
    attention = "double_blocks.0.img_attn."
    telling = (attention + "qkv.weight", attention + "norm.query_norm.scale")
    tensors = load_file(file)
    gone = [x for x in tensors if "blocks.0." in x and x not in telling]
    save_file({name: x for name, x in tensors.items() if name not in gone}, file)
    with pytest.raises(CheckpointError, match=r"missing double_blocks.*; and \d+ more like this$"):
        models.open_component(file)


def test_a_truncated_file_is_named(file):
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"flux1-dev\.safetensors is not a readable"):
        models.open_component(file)


@pytest.mark.parametrize("head", [16, 48])
def test_heads_of_an_unusual_width_are_refused(head):
    shapes = {
        "img_in.weight": (96, 16),
        "txt_in.weight": (96, 24),
        "vector_in.in_layer.weight": (96, 20),
        "double_blocks.0.img_attn.norm.query_norm.scale": (head,),
        "final_layer.linear.weight": (16, 96),
    }
    with pytest.raises(CheckpointError, match=f"heads of {head} channels"):
        config_from_bfl(shapes)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion U-Net"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 encoder"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA adapter"),
        ("single_transformer_blocks.0.attn.to_q.weight", "without its config.json"),
        ("decoder.up.0.block.0.norm1.weight", "an autoencoder"),
        ("weight", "of an unknown kind, with tensors such as weight"),
    ],
)
def test_another_family_is_named(tmp_path, name, family):
    save_file({name: np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"holds no FLUX.1 transformer.*: .*{family}"):
        find_model(tmp_path / "other.safetensors")


def test_a_file_alone_is_found_and_needs_the_rest_to_be_sampled_from(file):
    assert find_model(file).paths == {"transformer": file}
    with pytest.raises(
        CheckpointError, match=r"lacks the component folders text_encoder, text_encoder_2, vae, tok"
    ):
        load_pipeline(file)


def test_text_encoders_must_be_there(tmp_path, file):
    with pytest.raises(CheckpointError, match="empty lacks the component folders text_encoder"):
        find_model(file, tmp_path / "empty")


def test_a_folder_with_two_transformers_is_ambiguous(tmp_path, file):
    (tmp_path / "again.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"several of transformer: again.*flux1-dev"):
        find_model(tmp_path)


def test_the_scheduler_of_a_file_follows_from_its_guidance(tmp_path):
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        (tmp_path / "encoders" / name).mkdir(parents=True)
    for name, config in {"dev": SIZES["transformer"], "schnell": SCHNELL}.items():
        save_bfl_transformer(random_transformer(config), tmp_path / f"{name}.safetensors")
        scheduler = find_model(tmp_path / f"{name}.safetensors", tmp_path / "encoders").scheduler
        assert scheduler["use_dynamic_shifting"] == (name == "dev")
        assert scheduler["shift"] == (3.0 if name == "dev" else 1.0)


def test_reading_is_in_our_layout_and_contiguous_in_the_file_s(file):
    stored = TRANSFORMER.open(file)
    kernel = stored.read("double_blocks.0.img_mlp.up.kernel")
    assert kernel.shape == (64, 256)
    assert kernel.T.flags.c_contiguous
    np.testing.assert_array_equal(kernel.T, load_file(file)["double_blocks.0.img_mlp.0.weight"])


def test_nothing_of_an_opened_model_is_in_memory(file):
    leaves = jax.tree.leaves(nnx.state(TRANSFORMER.open(file).abstract))
    assert {type(leaf) for leaf in leaves} == {jax.ShapeDtypeStruct}


def test_a_file_of_another_kind_is_no_autoencoder(file):
    with pytest.raises(CheckpointError, match=r"no autoencoder: missing decoder\.up\.0"):
        AUTOENCODER_KL.open(file)
