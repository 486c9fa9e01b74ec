import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models.checkpoint_io import (
    CheckpointError,
    Rule,
    config_from_json,
    export_params,
    load_params,
    save_params,
)
from models.stored_files import open_checkpoint, read_json


class Small(nnx.Module):
    """One parameter of every kind."""

    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.fused = nnx.Linear(4, 5, rngs=rngs)
        self.conv = nnx.Conv(2, 3, (1, 2), rngs=rngs)


RULES = (Rule(pattern="fused", sources=("first", "second"), rows=(2, 3)),)
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    save_params(Small(), tmp_path, RULES, config={}, filename=FILE, dtype=jnp.float32)
    return tmp_path


def change(folder, **tensors):
    """Replace tensors of the file; None removes one."""
    stored = {**load_file(folder / FILE), **tensors}
    save_file({name: value for name, value in stored.items() if value is not None}, folder / FILE)


def load(folder, **options):
    return load_params(Small, open_checkpoint(folder), RULES, dtype=jnp.float32, **options)


def test_save_then_load_keeps_every_bit(folder):
    ours, theirs = nnx.to_flat_state(nnx.state(load(folder))), nnx.state(Small())
    for (path, value), (other_path, other) in zip(ours, nnx.to_flat_state(theirs), strict=True):
        assert path == other_path
        np.testing.assert_array_equal(value[...], other[...])


def test_stored_kernels_have_the_layout_of_torch(folder):
    module, stored = Small(), load_file(folder / FILE)
    kernel = np.asarray(module.fused.kernel[...])
    np.testing.assert_array_equal(stored["first.weight"], kernel[:, :2].T)
    np.testing.assert_array_equal(stored["second.weight"], kernel[:, 2:].T)
    kernel = np.asarray(module.conv.kernel[...])
    np.testing.assert_array_equal(stored["conv.weight"], kernel.transpose(3, 2, 0, 1))


def test_a_transform_applies_both_ways(tmp_path):
    rules = (*RULES, Rule(pattern="norm", sources="norm", transform=np.flip))
    module = Small()
    module.norm.bias[...] = jnp.arange(4.0)
    save_params(module, tmp_path, rules, config={}, filename=FILE, dtype=jnp.float32)
    np.testing.assert_array_equal(load_file(tmp_path / FILE)["norm.bias"], [3, 2, 1, 0])
    loaded = load_params(Small, open_checkpoint(tmp_path), rules, dtype=jnp.float32)
    np.testing.assert_array_equal(loaded.norm.bias[...], [0, 1, 2, 3])


def test_parameters_get_the_dtype_asked_for(folder):
    module = load_params(Small, open_checkpoint(folder), RULES, dtype=jnp.bfloat16)
    assert {value[...].dtype for _, value in nnx.to_flat_state(nnx.state(module))} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_export_has_no_more_and_no_fewer_tensors_than_load_wants(folder):
    assert export_params(Small(), RULES).keys() == open_checkpoint(folder).shapes.keys()


def test_a_missing_tensor_is_named(folder):
    change(folder, **{"norm.bias": None})
    with pytest.raises(CheckpointError, match=r"missing norm\.bias"):
        load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    change(folder, **{"second.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(CheckpointError, match=r"second\.weight: \[4, 4\], expected \[3, 4\]"):
        load(folder)


def test_an_unexpected_tensor_is_named(folder):
    change(folder, extra=np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match="unexpected extra"):
        load(folder)


def test_an_ignored_tensor_is_not_unexpected(folder):
    change(folder, extra=np.zeros(2, np.float32))
    load(folder, ignore=("ext.*",))


def test_all_problems_are_listed_together(folder):
    change(folder, **{"norm.bias": None, "extra": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"missing norm\.bias; unexpected extra"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", bytes(64), b"\xff" * 64])
def test_a_corrupt_file_is_named(folder, content):
    (folder / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=FILE):
        load(folder)


def test_a_truncated_file_is_named(folder):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=FILE):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"norm.bias": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="0 safetensors files"):
        open_checkpoint(tmp_path)


def test_a_failed_write_is_an_error_of_the_system_s(tmp_path):
    (tmp_path / f"{FILE}.partial").mkdir()
    with pytest.raises(OSError, match=f"{FILE}: .*directory"):
        save_params(Small(), tmp_path, RULES, config={}, filename=FILE, dtype=jnp.float32)


def test_an_interrupted_save_leaves_nothing_that_loads(tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("models.checkpoint_io.save_file", interrupted)
    with pytest.raises(OSError, match="no space"):
        save_params(Small(), tmp_path, RULES, config={}, filename=FILE, dtype=jnp.float32)
    with pytest.raises(CheckpointError, match="0 safetensors files"):
        open_checkpoint(tmp_path)


def test_saving_beside_other_weights_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors\.index\.json"):
        save_params(Small(), tmp_path, RULES, config={}, filename=FILE, dtype=jnp.float32)


@pytest.mark.parametrize("content", [None, "{", "[1]", "\x00"])
def test_a_bad_json_file_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallConfig:
    widths: tuple[int, ...] = (1, 2)
    activation: str = "relu"


def test_config_keys_that_are_not_ours_are_ignored():
    assert config_from_json(SmallConfig, {"widths": [3], "other": 1}) == SmallConfig(widths=(3,))


def test_config_values_that_are_not_supported_are_named():
    with pytest.raises(CheckpointError, match="activation = 'tanh' is not supported"):
        config_from_json(SmallConfig, {"activation": "tanh"}, {"activation": ("relu",)})
