"""Which weights of a folder are taken, what their dtypes and values must be, what files are not."""

import json
import os
import shutil
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models.checkpoint_io import Rule, load_params, match_params
from models.stored_files import (
    CheckpointError,
    find_prefix,
    is_finite_in_bfloat16,
    open_checkpoint,
    quantized_by,
    read_json,
    weights_in,
)

STEM = "diffusion_pytorch_model"


class Small(nnx.Module):
    def __init__(self):
        self.fused = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))


RULES = (Rule(pattern="fused", sources=("first", "second"), rows=(2, 3)),)
VALUES = {
    "first.weight": np.arange(8, dtype=np.float32).reshape(2, 4),
    "second.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 4,
    "first.bias": np.float32([1, 2]),
    "second.bias": np.float32([3, 4, 5]),
    "norm.weight": np.ones(4, np.float32),
    "norm.bias": np.zeros(4, np.float32),
}


def write_raw(path, tensors):
    """Write (dtype, array of its bytes' shape) by name: safetensors' NumPy knows fewer dtypes."""
    header, blobs, end = {}, [], 0
    for name, (dtype, value) in tensors.items():
        blob = value.tobytes()
        start, end = end, end + len(blob)
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
        blobs.append(blob)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def opened(path, values=VALUES):
    save_file(values, path)
    return match_params(Small, open_checkpoint(path), RULES, config={})


def numbered(folder, name, value):
    save_file({"a": np.float32([value])}, folder / name)


def sharded(folder, index, shards):
    """Write shards of one tensor each, "a" in the first, and their index."""
    weight_map = {}
    for shard, (name, value) in shards.items():
        save_file({name: np.float32([value])}, folder / shard)
        weight_map[name] = shard
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("default", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "a"])
def test_the_default_weights_come_before_a_variant(tmp_path, default, variant):
    numbered(tmp_path, f"{default}.{variant}.safetensors", 2)
    numbered(tmp_path, f"{default}.safetensors", 1)
    assert open_checkpoint(tmp_path).read("a") == [1]


@pytest.mark.parametrize(
    "index",
    [
        f"{STEM}.safetensors.index.fp16.json",  # transformers and diffusers
        f"{STEM}.fp16.safetensors.index.json",  # published repositories
        f"{STEM}.safetensors.fp16.index.json",
    ],
)
def test_shards_of_a_variant(tmp_path, index):
    names = [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sharded(tmp_path, index, dict(zip(names, [("a", 2), ("b", 3)], strict=True)))
    assert open_checkpoint(tmp_path).read("b") == [3]  # alone it is all there is
    names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    default = dict(zip(names, [("a", 4), ("b", 5)], strict=True))
    sharded(tmp_path, f"{STEM}.safetensors.index.json", default)
    assert open_checkpoint(tmp_path).read("b") == [5]


def test_of_shards_and_a_single_file_the_library_s_choice_is_taken(tmp_path):
    for stem, wanted in (("diffusion_pytorch_model", 2), ("model", 1)):
        folder = tmp_path / stem
        folder.mkdir()
        numbered(folder, f"{stem}.safetensors", 1)
        shard = {f"{stem}-00001-of-00001.safetensors": ("a", 2)}
        sharded(folder, f"{stem}.safetensors.index.json", shard)
        assert open_checkpoint(folder).read("a") == [wanted]


def test_several_variants_without_a_default_are_refused_by_name(tmp_path):
    numbered(tmp_path, "model.fp16.safetensors", 1)
    numbered(tmp_path, "model.bf16.safetensors", 2)
    with pytest.raises(CheckpointError, match=r"none of which.*bf16.*fp16"):
        open_checkpoint(tmp_path)


def test_of_a_tensor_in_two_shards_the_index_s_is_read(tmp_path):
    save_file({"a": np.float32([1])}, tmp_path / "x-00001-of-00002.safetensors")
    both = {"a": np.float32([2]), "b": np.float32([3])}
    save_file(both, tmp_path / "x-00002-of-00002.safetensors")
    names = {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert open_checkpoint(tmp_path).read("a") == [1]
    assert open_checkpoint(index).read("a") == [1]  # an index stands for its shards
    save_file({"b": np.float32([3])}, tmp_path / "x-00002-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": names | {"c": names["b"]}}))
    with pytest.raises(CheckpointError, match="says that c is in x-00002"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_and_not_in_the_index_is_refused(tmp_path):
    for i, own in ((1, "a"), (2, "b")):
        tensors = {own: np.float32([i]), "stray": np.float32([i])}
        save_file(tensors, tmp_path / f"x-0000{i}-of-00002.safetensors")
    names = {x: f"x-0000{i}-of-00002.safetensors" for i, x in ((1, "a"), (2, "b"))}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="stray is in several shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": None},
        {"weight_map": {}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "/x.safetensors"}},
        {},
    ],
)
def test_an_index_that_can_t_be_used_is_named(tmp_path, content):
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"x\.safetensors\.index\.json: weight_map"):
        open_checkpoint(tmp_path)


def test_a_shard_alone_is_no_model(tmp_path):
    numbered(tmp_path, "x-00001-of-00002.safetensors", 1)
    for path in (tmp_path, tmp_path / "x-00001-of-00002.safetensors"):
        with pytest.raises(CheckpointError, match=r"shard.*index"):
            open_checkpoint(path)


def test_files_of_the_system_s_are_left_alone(tmp_path):
    numbered(tmp_path, f"{STEM}.safetensors", 1)
    for name in (f"._{STEM}.safetensors", "._x.safetensors.index.json", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07" + bytes(100))
    assert weights_in(tmp_path) == [tmp_path / f"{STEM}.safetensors"]
    assert open_checkpoint(tmp_path).read("a") == [1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
        (b"\n<!DOCTYPE html><html>" + b" " * 100, "HTML"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b'{"error": "not found"}', "JSON"),
        (b"\x00\x05\x16\x07" + bytes(100), "AppleDouble"),
        (b"", "empty"),
        (bytes(64), "not a readable safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_called_by_its_name(tmp_path, content, told):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as error:
        open_checkpoint(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for path in (tmp_path, tmp_path / "model.safetensors", loop):
        with pytest.raises(CheckpointError, match=r"no regular file|does not exist"):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(tmp_path / "config.json")


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    numbered(folder, "model.safetensors", 1)
    assert open_checkpoint(folder).read("a") == [1]


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a": ' * 10**5, "1" * 5000, "\ud800"])
def test_json_that_can_t_be_read_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_a_git_lfs_pointer_in_place_of_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"config\.json is a Git LFS pointer"):
        read_json(tmp_path / "config.json")


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)],
)
def test_float8_is_read_as_the_bfloat16_of_the_same_value(tmp_path, stored, dtype):
    every = np.arange(256, dtype=np.uint8).view(dtype).reshape(2, 128)
    write_raw(tmp_path / "x.safetensors", {"pad": ("U8", np.uint8([1])), "a": (stored, every)})
    found = open_checkpoint(tmp_path / "x.safetensors").read("a")
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), every.astype(np.float32))


@pytest.mark.parametrize("first", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("second", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"])
def test_dtypes_may_differ_within_a_fused_linear(tmp_path, first, second):
    names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
    names["float8_e4m3fn"] = "F8_E4M3"
    tensors = {name: ("F32", value) for name, value in VALUES.items()}
    for name, dtype in {"first.weight": first, "second.weight": second}.items():
        tensors[name] = (names[dtype], VALUES[name].astype(dtype))
    write_raw(tmp_path / "x.safetensors", tensors)
    stored = match_params(Small, open_checkpoint(tmp_path / "x.safetensors"), RULES, config={})
    wanted = np.concatenate(
        [tensors[x][1].astype(np.float32) for x in ("first.weight", "second.weight")]
    )
    np.testing.assert_array_equal(stored.read("fused.kernel").astype(np.float32), wanted.T)


@pytest.mark.parametrize("stored", ["I8", "U8", "I32", "I64", "BOOL", "F8_E8M0"])
def test_what_holds_no_floats_is_no_weight(tmp_path, stored):
    sizes = {"I32": np.int32, "I64": np.int64, "BOOL": np.bool_}
    tensors = {name: ("F32", value) for name, value in VALUES.items()}
    tensors["norm.weight"] = (stored, np.ones(4, sizes.get(stored, np.uint8)))
    write_raw(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"norm.weight is stored as {stored}"):
        load_params(Small, open_checkpoint(tmp_path / "x.safetensors"), RULES, dtype=jnp.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_is_not_finite_in_bfloat16_is_named(tmp_path, name, value):
    values = {key: x.copy() for key, x in VALUES.items()}
    values[name].flat[-1] = value
    stored = opened(tmp_path / "x.safetensors", values)
    for use in (lambda: stored.load(jnp.float32), stored.check_values):
        with pytest.raises(CheckpointError, match=f"in {name};"):
            use()


def test_all_values_that_are_not_finite_are_named_together(tmp_path):
    bad = {"norm.bias": np.full(4, np.nan, np.float32), "first.bias": np.float32([1, np.inf])}
    with pytest.raises(CheckpointError, match=r"first\.bias, norm\.bias"):
        opened(tmp_path / "x.safetensors", VALUES | bad).check_values()
    opened(tmp_path / "x.safetensors").check_values()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_finite_is_what_is_finite_after_rounding_to_bfloat16(dtype):
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    # halfway to the next power of two, where rounding to nearest gives infinity
    border = largest * (1 + 2.0**-9)
    values = [0.0, -0.0, 1e-45, 65504.0, largest, border, -border, 1e300, np.nan, -np.inf]
    with np.errstate(over="ignore"):
        for value in np.array(values).astype(dtype):
            rounded = value.astype(np.float32).astype(ml_dtypes.bfloat16)
            found = is_finite_in_bfloat16(np.full((2, 3), value).T)
            assert found == bool(np.isfinite(rounded.astype(np.float32))), value
    assert is_finite_in_bfloat16(np.zeros((0, 3), dtype))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.weight", "a.scale_weight"], "scaled float8"),
        (["a.weight", "a.weight_scale"], "scaled float8"),
        (["scaled_fp8", "a.weight"], "scaled float8"),
        (["model.diffusion_model.scaled_fp8", "a.weight"], "scaled float8"),
        (["a.weight", "a.weight_scale", "a.comfy_quant"], "comfy_quant"),
        (["a.qweight", "a.wscales", "a.lora_down"], "nunchaku"),
        (["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["a.weight", "a.SCB"], "bitsandbytes"),
        (["a.weight_packed", "a.weight_scale"], "compressed-tensors"),
        (["a.qweight", "a.qzeros", "a.scales"], "GPTQ"),
        (["a.weight", "a.weight_scale", "a.weight_scale_2"], "ModelOpt"),
        (["a.weight._data", "a.weight._scale"], "quanto"),
    ],
)
def test_a_quantized_format_is_called_by_its_name(tmp_path, names, told):
    assert told in quantized_by(names)
    save_file(dict.fromkeys(names, np.ones(1, np.float32)), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"quantized already, by .*{told}"):
        match_params(Small, open_checkpoint(tmp_path / "x.safetensors"), RULES, config={})


def test_names_of_16_bit_models_belong_to_no_quantized_format():
    assert (
        quantized_by([*VALUES, "a.norm.scale", "encoder.embed_tokens.weight", "logit_scale"])
        is None
    )


def test_a_prefix_is_found_by_a_telling_name():
    assert find_prefix(["a.x", "b.x"], "c.x") is None
    assert find_prefix(["c.x", "ac.x"], "c.x") == ""
    assert find_prefix(["module._orig_mod.c.x", "d.x"], "c.x") == "module._orig_mod."
    with pytest.raises(CheckpointError, match=r"'ema\.', 'model\.'"):
        find_prefix(["ema.c.x", "model.c.x"], "c.x")


def test_bytes_are_those_of_the_tensors(tmp_path):
    save_file(
        {"a": np.ones((3, 5), np.float16), "b": np.ones(2), "c": np.ones(3, bool)}, tmp_path / "x"
    )
    assert open_checkpoint(tmp_path / "x").bytes == 3 * 5 * 2 + 2 * 8 + 3


def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path):
    stored = opened(tmp_path / "x.safetensors")
    shutil.copy(__file__, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .* can't be read any more"):
        stored.load(jnp.float32)
