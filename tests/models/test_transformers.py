"""Transformers of every family against diffusers' in float32: outputs, folders, single files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformer_cases import CASES, SIZES

from models.checkpoint_io import export_params
from models.stored_files import CheckpointError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def peer_of(case):
    """Return diffusers' model with random weights, biases and scales away from neutral ones."""
    torch.manual_seed(0)
    model = getattr(diffusers, case.component.classes[0])(**case.config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def as_tensors(tree):
    """Return arrays as torch's, in the lists where they are."""
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def peer(case):
    return peer_of(case)


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(case, folder):
    return case.component.load(folder, jnp.float32)


@pytest.mark.parametrize("size", SIZES)
def test_the_output_is_diffusers(case, peer, ours, size):
    arguments = case.arguments(size)
    with torch.no_grad():
        sample = peer(**as_tensors(arguments)).sample
        expected = torch.stack(sample) if isinstance(sample, list) else sample
    found = nnx.jit(ours)(**arguments)
    assert found.shape == tuple(expected.shape)
    assert relative_error(found, expected) <= 1e-4


def test_an_exported_folder_is_what_diffusers_saved(case, peer, ours, tmp_path):
    case.component.export(ours, tmp_path, dtype=jnp.float32)
    again = type(peer).from_pretrained(tmp_path)
    expected = peer.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    known = {name for name in again.config if name[0] != "_"}
    assert all(_plain(again.config[name]) == _plain(peer.config[name]) for name in known)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_shards_load_the_same(case, peer, ours, tmp_path):
    peer.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    many = case.component.load(tmp_path, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(many), nnx.state(ours))


@pytest.fixture(scope="module")
def file(case, ours, tmp_path_factory):
    """The single file of the model, with a program's prefix and another model's tensor in it."""
    if case.component.file is None:
        pytest.skip("published in folders only")
    tensors = export_params(ours, case.component.file.rules(ours.config, ()))
    tensors = {case.prefix + name: value for name, value in tensors.items()}
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(tensors | {"vae.decoder.conv_in.bias": np.zeros(3, np.float32)}, path)
    return path


def test_diffusers_reads_the_single_file_as_the_same_weights(case, peer, file):
    convert = getattr(diffusers.loaders.single_file_utils, case.converter)
    tensors = {
        name.removeprefix(case.prefix): torch.from_numpy(value)
        for name, value in load_file(file).items()
        if name.startswith(case.prefix)
    }
    found, expected = convert(tensors), peer.state_dict()
    assert expected.keys() - buffers(peer) <= found.keys() <= expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def buffers(peer):
    """Names of tensors that are no parameters: constants, which are computed where absent."""
    return peer.state_dict().keys() - dict(peer.named_parameters()).keys()


def test_a_single_file_is_the_same_model(case, ours, file):
    found = case.component.load(file, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(ours))
    assert found.config == ours.config


def test_a_single_file_without_a_telling_tensor_is_refused_by_name(case, file, tmp_path):
    tensors = load_file(file)
    telling = case.prefix + case.component.file.tellings[0]
    tensors.pop(telling)
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=f"holds no {case.component.name}: missing"):
        case.component.open(tmp_path / "less.safetensors")
