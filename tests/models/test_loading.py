"""Finding a model: prefixes, shards, schedules, components that don't fit, configs, tokenizers."""

import json
import os
import re
import shutil
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_families import SMALL
from small_flux import (
    SIZES,
    random_transformer,
    random_vae,
    save_bfl_transformer,
    save_bfl_vae,
    save_diffusers_transformer,
)

import models
from models.checkpoint_io import StoredModule, TracingRngs, stored_tensors
from models.families import FAMILIES
from models.flux.family import FLUX
from models.loading import find_model, model_name
from models.schedulers import FlowMatchEulerScheduler, scheduler_from_json
from models.sd3.family import SD3
from models.stored_files import CheckpointError
from models.synthetic import write_random_model
from models.text_encoders import (
    CLIPTextConfig,
    CLIPTextEncoder,
    T5Encoder,
    clip,
    t5,
)
from models.text_encoders.decoder import DecoderConfig
from models.tiny_flux.architecture import FOLDER
from models.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "dev"
    write_random_model(path, FLUX, SIZES, tokenizers=FOLDER)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


@pytest.fixture(scope="module")
def transformer():
    return random_transformer()


def changed(**sizes):
    """Return a transformer of other sizes."""
    return random_transformer(type(SIZES["transformer"])(**{**vars(SIZES["transformer"]), **sizes}))


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def same(path, wanted):
    """Assert that what is opened has the parameters of a module, or of another opened one."""
    opened = path if isinstance(path, StoredModule) else models.open_component(path, jnp.float32)
    if isinstance(wanted, nnx.Module):
        state = nnx.to_flat_state(nnx.state(wanted))
        values = {".".join(map(str, key)): np.asarray(value[...]) for key, value in state}
    else:
        wanted = models.open_component(wanted, jnp.float32)
        values = {key: wanted.read(key) for key in wanted.sources}
    assert opened.sources.keys() == values.keys()
    for key, value in values.items():
        np.testing.assert_array_equal(opened.read(key), value, err_msg=key)


PREFIXES = ("_orig_mod.", "module.", "model.", "net.", "model.diffusion_model._orig_mod.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_of_a_file(folder, transformer, tmp_path, prefix):
    file = tmp_path / "x.safetensors"
    save_bfl_transformer(transformer, file, prefix)
    assert find_model(file, folder).paths["transformer"] == file
    same(file, transformer)


@pytest.mark.parametrize("prefix", PREFIXES[:2])
@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_prefix_of_all_names_of_a_folder(folder, copy, name, prefix):
    file = next((copy / name).glob("*.safetensors"))
    save_file({prefix + key: value for key, value in load_file(file).items()}, file)
    same(copy / name, folder / name)


def test_a_transformer_among_other_models_in_a_file(folder, transformer, tmp_path):
    save_bfl_transformer(transformer, tmp_path / "x", "model.diffusion_model.")
    tensors = load_file(tmp_path / "x")
    for name, prefix in {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    }.items():
        own = load_file(folder / name / "model.safetensors")
        tensors |= {prefix + key: value for key, value in own.items()}
    tensors["vae.decoder.up.0.block.0.norm1.weight"] = np.zeros(32, np.float32)
    file = tmp_path / "all_in_one.safetensors"
    save_file(tensors, file)
    assert find_model(file, folder).paths["transformer"] == file
    same(file, transformer)
    plain = {key.removeprefix("model.diffusion_model."): x for key, x in tensors.items()}
    save_file(plain, file)
    same(file, transformer)


def random_tensors(module, config, rules):
    """Return random tensors of a model's checkpoint."""
    random = np.random.default_rng(0)
    found = stored_tensors(lambda: module(config, rngs=TracingRngs()), rules)
    return {x: random.normal(size=shape).astype(np.float32) for x, (_, shape) in found.items()}


def test_whole_models_beside_a_transformer_are_taken(folder, tmp_path):
    other = changed(pooled_projection_dim=768)
    clip_config = CLIPTextConfig(
        vocab_size=2560,
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=12,
        eos_token_id=2,
    )
    encoders = {
        "text_encoder": random_tensors(CLIPTextEncoder, clip_config, clip.checkpoint_rules()),
        "text_encoder_2": random_tensors(T5Encoder, SIZES["text_encoder_2"], t5.checkpoint_rules()),
    }
    prefixes = {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
        "vae": "vae.",
    }
    save_bfl_transformer(other, tmp_path / "x", "model.diffusion_model.")
    vae = random_vae()
    save_bfl_vae(vae, tmp_path / "y")
    tensors = load_file(tmp_path / "x")
    for name, own in (encoders | {"vae": load_file(tmp_path / "y")}).items():
        tensors |= {prefixes[name] + key: value for key, value in own.items()}
    tensors["text_encoders.clip_l.logit_scale"] = np.zeros((), np.float32)
    file = tmp_path / "all_in_one.safetensors"
    save_file(tensors, file)
    files = find_model(file, folder)
    own = {name for name, path in files.paths.items() if path == file}
    assert own == {"transformer", *prefixes}
    same(files.open("transformer", jnp.float32), other)
    same(files.open("vae", jnp.float32), vae)
    assert files.open("text_encoder").config["num_attention_heads"] == 12
    assert models.component_config(files.open("text_encoder_2").config) == SIZES["text_encoder_2"]
    for name, tensors in encoders.items():
        opened = files.open(name, jnp.float32)
        for key in (key for keys, _ in opened.sources.values() for key in keys):
            np.testing.assert_array_equal(opened.checkpoint.read(key), tensors[key])
    for name in encoders:
        module = files.open(name, jnp.float32).load(jnp.float32)
        models.export_component(module, tmp_path / name)
        assert models.open_component(tmp_path / name).config == files.open(name).config


def test_two_transformers_in_a_file_are_refused(folder, transformer, tmp_path):
    file = tmp_path / "x.safetensors"
    save_bfl_transformer(transformer, file)
    tensors = load_file(file)
    save_file({p + key: x for p in ("a.", "b.") for key, x in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=r"'a\.', 'b\.'"):
        find_model(file, folder)


def test_black_forest_labs_names_in_shards(folder, transformer, tmp_path):
    save_bfl_transformer(transformer, tmp_path / "x")
    tensors, shards = load_file(tmp_path / "x"), tmp_path / "shards"
    shards.mkdir()
    names, weight_map = sorted(tensors), {}
    for i in (1, 2):
        part, file = names[i - 1 :: 2], f"flux1-dev-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, shards / file)
        weight_map |= dict.fromkeys(part, file)
    index = shards / "flux1-dev.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (shards / "._flux1-dev.safetensors").write_bytes(b"\x00\x05\x16\x07")
    for path in (shards, index):
        files = find_model(path, folder)
        assert files.paths["transformer"] == index
        same(files.paths["transformer"], transformer)
    with pytest.raises(CheckpointError, match="one of several shards"):
        find_model(shards / "flux1-dev-00001-of-00002.safetensors", folder)


def test_quantized_models_are_refused_by_name(folder, transformer, copy, tmp_path):
    file = tmp_path / "x.safetensors"
    save_bfl_transformer(transformer, file)
    scale = {"single_blocks.0.linear1.scale_weight": np.float32([1])}
    save_file(load_file(file) | scale, file)
    with pytest.raises(CheckpointError, match="quantized already, by scaled float8"):
        find_model(file, folder)
    edit(copy / "transformer/config.json", quantization_config={"quant_method": "torchao"})
    with pytest.raises(CheckpointError, match="quantized already, by torchao"):
        models.open_component(copy / "transformer")


def test_a_file_without_guidance_says_which_schedule_it_takes(folder, tmp_path):
    file = tmp_path / "flux1-de-distilled.safetensors"
    save_bfl_transformer(changed(guidance_embeds=False), file)
    with pytest.warns(UserWarning, match=r"flux1-de-distilled.* FLUX\.1-schnell"):
        files = find_model(file, folder)
    assert files.schedule == "FLUX.1-schnell's"
    assert files.defaults(files.configs()).num_inference_steps == 4
    assert not files.load_scheduler().use_dynamic_shifting


@pytest.mark.parametrize(("schedule", "told"), [("dev", "FLUX.1-dev's"), ("folder", "that of ")])
def test_a_schedule_can_be_asked_for(folder, tmp_path, schedule, told):
    file = tmp_path / "x.safetensors"
    save_bfl_transformer(changed(guidance_embeds=False), file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = find_model(file, folder, schedule)
        given = {
            name: models.open_component(x).abstract
            for name, x in files.paths.items()
            if name in ("transformer", "vae", "text_encoder", "text_encoder_2")
        }
        pipeline = models.load_pipeline(file, text_encoders=folder, schedule=schedule, **given)
    assert files.schedule.startswith(told)
    assert files.load_scheduler() == pipeline.scheduler
    assert pipeline.scheduler.use_dynamic_shifting and pipeline.scheduler.shift == 3
    assert pipeline.defaults.num_inference_steps == 28


def test_a_folder_s_schedule_can_be_replaced(copy):
    assert find_model(copy).load_scheduler().use_dynamic_shifting
    assert find_model(copy, schedule="folder").load_scheduler().use_dynamic_shifting
    files = find_model(copy, schedule="schnell")
    assert files.load_scheduler().shift == 1 and "scheduler" not in files.paths
    assert files.defaults(files.configs()).num_inference_steps == 4
    with pytest.raises(ValueError, match=r"schedule is 'fast'; use one of dev, schnell, .*folder"):
        find_model(copy, schedule="fast")


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"in_channels": 96, "out_channels": 16}, "takes 96 channels a token and gives 16"),
        ({"in_channels": 32}, "takes 32 channels a token, and the autoencoder gives 16"),
        ({"joint_attention_dim": 40}, "text tokens of 40 channels, and text_encoder_2 gives 24"),
        ({"pooled_projection_dim": 40}, "pooled text of 40 channels, and text_encoder gives 20"),
    ],
)
def test_components_that_do_not_fit_are_refused_when_found(folder, copy, tmp_path, sizes, told):
    other = changed(**sizes)
    save_bfl_transformer(other, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=told):
        find_model(tmp_path / "x.safetensors", folder)
    shutil.rmtree(copy / "transformer")
    save_diffusers_transformer(other, copy / "transformer")
    with pytest.raises(CheckpointError, match=told):
        find_model(copy)
    with pytest.raises(CheckpointError, match=told):
        models.load_pipeline(folder, transformer=other)


@pytest.mark.parametrize(
    ("encoder", "field", "value", "told"),
    [
        ("text_encoder", "vocab_size", 300, "tokenizer gives ids up to .* takes 300"),
        ("text_encoder_2", "vocab_size", 100, "tokenizer_2 gives ids up to .* takes 100"),
        ("text_encoder", "eos_token_id", 49407, "its encoder wants 49407"),
    ],
)
def test_a_tokenizer_of_another_encoder_is_refused(copy, encoder, field, value, told):
    edit(copy / encoder / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=told):
        models.load_pipeline(copy)


NOT_SIZES = ("16", None, 1.5, 0, -1, True, [16], 10**9, 10**30)
BAD_FIELDS = [
    *(("transformer/config.json", "in_channels", value) for value in NOT_SIZES),
    *(("transformer/config.json", "num_layers", value) for value in ("2", None, -1, 10**9)),
    ("transformer/config.json", "num_single_layers", 10**9),
    ("transformer/config.json", "num_attention_heads", 0),
    *(("transformer/config.json", "axes_dims_rope", x) for x in (64, [], ["4"], [4, 28], None)),
    ("transformer/config.json", "guidance_embeds", "false"),
    ("transformer/config.json", "_class_name", ["FluxTransformer2DModel"]),
    ("transformer/config.json", "_class_name", 3),
    *(("vae/config.json", "block_out_channels", value) for value in (64, [], [33], [0], ["64"])),
    *(("vae/config.json", "latent_channels", value) for value in (0, "4", 10**9)),
    *(("vae/config.json", "scaling_factor", x) for x in (float("nan"), 0, None, "1", 1e300)),
    ("vae/config.json", "shift_factor", float("inf")),
    ("vae/config.json", "norm_num_groups", 0),
    ("vae/config.json", "layers_per_block", 10**9),
    ("vae/config.json", "use_quant_conv", "no"),
    ("vae/config.json", "down_block_types", 3),
    ("text_encoder/config.json", "architectures", 3),
    ("text_encoder/config.json", "architectures", [3]),
    *(("text_encoder/config.json", "hidden_size", value) for value in (1.5, 0, 10**9)),
    *(("text_encoder/config.json", "num_attention_heads", value) for value in (0, 3)),
    ("text_encoder/config.json", "num_hidden_layers", 10**9),
    *(("text_encoder/config.json", "layer_norm_eps", x) for x in (float("nan"), -1, None, "1")),
    ("text_encoder/config.json", "hidden_act", ["quick_gelu"]),
    ("text_encoder_2/config.json", "num_heads", 0),
    *(("text_encoder_2/config.json", "layer_norm_epsilon", x) for x in (-1, float("inf"))),
    *(("text_encoder_2/config.json", "relative_attention_num_buckets", x) for x in (0, 2)),
    ("text_encoder_2/config.json", "relative_attention_max_distance", 8),
    ("text_encoder_2/config.json", "feed_forward_proj", 3),
    ("model_index.json", "_class_name", ["FluxPipeline"]),
    *(("model_index.json", "_generation_defaults", x) for x in ([1], {"height": "128"}, 3)),
    *(
        ("model_index.json", "_generation_defaults", {key: value})
        for key, value in {
            "num_inference_steps": 0,
            "guidance_scale": float("nan"),
            "strength": 2,
            "width": 10**6,
        }.items()
    ),
]


@pytest.mark.parametrize(("file", "field", "value"), BAD_FIELDS)
def test_a_config_field_of_wrong_type_or_range_is_named_when_found(copy, file, field, value):
    edit(copy / file, **{field: value})
    with pytest.raises(CheckpointError) as error:
        find_model(copy)
    told = str(error.value)
    named = "class" if field in ("_class_name", "architectures") else field
    named = next(iter(value)) if isinstance(value, dict) else named
    assert named in told and file in told and "\n" not in told, told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shift", "3"),
        ("shift", float("nan")),
        ("shift", 0),
        ("shift", None),
        ("use_dynamic_shifting", "false"),
        ("base_image_seq_len", 4096),
        ("max_shift", 1e9),
        ("shift_terminal", 1),
        ("_class_name", ["FlowMatchEulerDiscreteScheduler"]),
    ],
)
def test_a_scheduler_s_field_of_wrong_type_or_range_is_named(field, value):
    with pytest.raises(CheckpointError, match=field):
        FlowMatchEulerScheduler.from_json({field: value})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("img_in.weight", (64,)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", ()),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
        ("final_layer.linear.weight", (16, 64, 1)),
        ("double_blocks.999999999.img_mod.lin.bias", (1,)),
    ],
)
def test_a_file_of_odd_shapes_is_refused(folder, transformer, tmp_path, name, shape):
    file = tmp_path / "x.safetensors"
    save_bfl_transformer(transformer, file)
    save_file(load_file(file) | {name: np.zeros(shape, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"misshapen|heads of|num_layers"):
        find_model(file, folder)


def test_an_autoencoder_of_odd_shapes_is_refused(tmp_path):
    file = tmp_path / "ae.safetensors"
    save_bfl_vae(random_vae(), file)
    own = load_file(file)
    for name in ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"):
        save_file(own | {name: np.zeros((), np.float32)}, file)
        with pytest.raises(CheckpointError, match=r"misshapen|block_out_channels"):
            models.open_component(file)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("tokenizer", ("tokenizer_config.json",)),
        ("tokenizer_2", ("tokenizer_config.json",)),
        ("tokenizer", ("tokenizer_config.json", "vocab.json")),
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_refused(copy, name, kept):
    vocabulary = json.loads((copy / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    (copy / name / "vocab.json").write_text(json.dumps(vocabulary))
    for file in (copy / name).iterdir():
        if file.name not in kept:
            file.unlink()
    with pytest.raises(CheckpointError, match="no vocabulary"):
        load_tokenizer(copy / name)


def test_an_empty_vocabulary_is_refused(copy):
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/vocab.json").write_text("{}")
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match=r"knows no letter|no tokenizer that loads"):
        load_tokenizer(copy / "tokenizer")


def test_a_vocabulary_in_two_files_gives_the_same_ids(folder, copy):
    model = json.loads((copy / "tokenizer/tokenizer.json").read_text())["model"]
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    (copy / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    found, wanted = (load_tokenizer(x / "tokenizer") for x in (copy, folder))
    assert found("a pizza, 3d style")["input_ids"] == wanted("a pizza, 3d style")["input_ids"]


def test_merges_that_are_cut_off_are_missed(copy):
    file = copy / "tokenizer/tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["merges"] = values["model"]["merges"][:500]
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="merges are missing"):
        load_tokenizer(copy / "tokenizer")


def test_a_tokenizer_s_own_code_is_not_run(copy, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    edit(
        copy / "tokenizer/tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", None]},
    )
    (copy / "tokenizer/own.py").write_text("raise SystemExit('run')")
    with pytest.raises(CheckpointError, match="no tokenizer that loads"):
        load_tokenizer(copy / "tokenizer")
    assert not asked


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("model_max_length", -1, "model_max_length = -1"),
        ("model_max_length", "77", "model_max_length = '77'"),
        ("pad_token", None, "no pad token"),
    ],
)
def test_a_tokenizer_s_settings_that_can_t_be_used_are_named(copy, field, value, told):
    edit(copy / "tokenizer/tokenizer_config.json", **{field: value})
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load_tokenizer(copy / "tokenizer")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_s_schedulers_go_with_a_schedule_of_its_own(family):
    """As --schedule folder asks."""
    for schedule in family.schedules.values():
        scheduler = scheduler_from_json(schedule.scheduler)
        name = family.schedule_like(scheduler, {**family.index, **schedule.index})
        found = family.schedules[name]
        assert found.scheduler["_class_name"] == schedule.scheduler["_class_name"]


@pytest.mark.skipif(os.name == "nt", reason="pipes as POSIX has them")
def test_a_pipe_among_a_tokenizer_s_files_is_refused_and_not_waited_for(copy):
    os.mkfifo(copy / "tokenizer/added_tokens.json")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is no regular file"):
        load_tokenizer(copy / "tokenizer")


def test_flux_reads_a_clip_model_with_a_projection_without_it(folder, copy):
    edit(copy / "text_encoder/config.json", architectures=["CLIPTextModelWithProjection"])
    file = copy / "text_encoder/model.safetensors"
    more = {"text_projection.weight": np.zeros((4, 20), np.float32), "logit_scale": np.zeros(())}
    save_file(load_file(file) | more, file)
    same(find_model(copy).open("text_encoder", jnp.float32), folder / "text_encoder")


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "proj_out.bias"),
        ("transformer", "transformer_blocks.0.attn.norm_q.weight"),
        ("vae", "decoder.conv_out.bias"),
        ("text_encoder", "text_model.final_layer_norm.weight"),
        ("text_encoder_2", "encoder.final_layer_norm.weight"),
    ],
)
def test_values_that_are_not_finite_are_refused_when_opened_for_conversion(copy, component, name):
    file = next((copy / component).glob("*.safetensors"))
    tensors = load_file(file)
    models.open_component(copy / component, check_values=True)
    tensors[name].flat[-1] = np.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=re.escape(f"{component} holds NaN")) as error:
        models.open_component(copy / component, check_values=True)
    assert f"in {name};" in str(error.value)


def test_what_is_neither_a_file_nor_a_folder_is_not_waited_for(copy, tmp_path):
    os.mkfifo(tmp_path / "flux1-dev.safetensors")
    with pytest.raises(CheckpointError, match="neither a regular file nor a folder"):
        find_model(tmp_path / "flux1-dev.safetensors")
    file = next((copy / "transformer").glob("*.safetensors"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="no regular file"):
        models.open_component(copy / "transformer")


def test_a_model_whose_folder_s_name_is_not_utf_8(folder, tmp_path):
    odd = shutil.copytree(folder, tmp_path / os.fsdecode(b"caf\xe9"))
    models.open_component(find_model(odd).paths["vae"])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("FLUX.1-dev", "FLUX.1-dev"),
        ("x/flux1-dev.safetensors", "flux1-dev.safetensors"),
        ("hub/models--org--FLUX.1-dev/snapshots/0ef5", "org/FLUX.1-dev"),
        ("hub/models--org--F/snapshots/0ef5/f.safetensors", "org/F/f.safetensors"),
    ],
)
def test_a_model_is_called_by_its_own_name_or_its_repository_s(tmp_path, path, name):
    assert model_name(tmp_path / path) == name
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "4f9a").touch()
    (tmp_path / path).symlink_to(tmp_path / "4f9a")  # as the cache's files are
    assert model_name(tmp_path / path) == name


@pytest.mark.parametrize(("name", "states"), [("klein", (1, 2, 3)), ("Z-Image", (2,))])
def test_a_decoder_gives_its_last_state_by_itself_and_the_family_s_in_a_model(
    tmp_path, name, states
):
    small = SMALL[name]
    small.write(tmp_path / "model")
    inside = models.open_component(tmp_path / "model/text_encoder")
    assert models.component_config(inside.config).states == states
    plain = shutil.copytree(tmp_path / "model/text_encoder", tmp_path / "plain")
    own = json.loads((plain / "config.json").read_text())
    own.pop("hidden_states", None)  # our own key, which no published file has
    (plain / "config.json").write_text(json.dumps(own))
    last = small.sizes["text_encoder"].num_hidden_layers
    loaded: Any = models.load_component(plain, jnp.float32)
    assert type(loaded.config) is DecoderConfig and loaded.config.states == (last,)
    assert models.component_config(own).states == (last,)
    built = nnx.eval_shape(lambda: models.build_component(own))
    assert built.config.states == (last,)
    with pytest.raises(CheckpointError, match=rf"given text_encoder .*, and {small.family.name}"):
        models.load_pipeline(tmp_path / "model", text_encoder=loaded)
    right = models.load_component(tmp_path / "model/text_encoder", jnp.float32)
    models.load_pipeline(tmp_path / "model", text_encoder=right)


def test_clip_with_a_projection_is_read_without_it_but_in_a_model_that_takes_it(folder, tmp_path):
    plain = shutil.copytree(folder / "text_encoder", tmp_path / "plain")
    edit(plain / "config.json", architectures=["CLIPTextModelWithProjection"], projection_dim=8)
    config = models.component_config(models.open_component(plain).config)
    assert type(config) is CLIPTextConfig
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": SD3.pipelines[0]}))
    shutil.copytree(plain, tmp_path / "text_encoder")
    with pytest.raises(CheckpointError, match=r"missing .*text_projection\.weight"):
        models.open_component(tmp_path / "text_encoder")
