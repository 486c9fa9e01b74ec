"""Decoders as text encoders against transformers, what they read of a file, and their refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module
from safetensors.numpy import load_file, save_file

from models.stored_files import CheckpointError
from models.text_encoders.decoder import DECODER, Decoder, DecoderConfig, decoder_component

TINY = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not hidden_size / num_attention_heads
    "rope_theta": 300.0,
}
ALL = (0, 1, 2, 3)  # every state of three layers

# Compiled once for all tests that share a shape.
run = nnx.jit(Decoder.__call__)


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def taking(states):
    """Return the component of a family that takes some states."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(DecoderConfig):
        hidden_states: tuple[int, ...] | None = tuple(states)

    return decoder_component(Config)


def load_decoder(path, states=(-1,)):
    return taking(states).load(path, jnp.float32)


def token_ids(tokens=13, batch=2):
    return np.random.default_rng(0).integers(0, 50, (batch, tokens))


def tiny_decoder(config=None, **options):
    config = config or DecoderConfig(**TINY)
    return random_module(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


def build_peer(kind="qwen3", **changes):
    """Return a random torch decoder whose biases and norms aren't the initial constants."""
    torch = pytest.importorskip("torch")
    import transformers

    name = {"qwen3": "Qwen3", "qwen2": "Qwen2", "mistral": "Mistral"}[kind]
    sizes = {**TINY, **changes}
    if kind == "qwen2":  # its heads divide the width
        del sizes["head_dim"]
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def peer_states(model, ids, mask=None):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        output = model(torch.tensor(ids), attention_mask=mask, output_hidden_states=True)
    return [state.numpy() for state in output.hidden_states]


def assert_equal_states(ours, theirs, where=...):
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(np.asarray(mine)[where], other[where]) < 1e-4


@pytest.fixture(params=["qwen3", "qwen3 with biases", "qwen2", "mistral"])
def peer(request):
    kind, _, biased = request.param.partition(" with ")
    return build_peer(kind, **({"attention_bias": True} if biased else {}))


def test_every_state_equals_the_peer(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    ids = token_ids()
    ours = run(load_decoder(tmp_path, ALL), ids)
    assert_equal_states(ours, peer_states(peer, ids))


def test_states_of_padding_on_the_right_equal_the_peer(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    ids, mask = token_ids(), np.ones((2, 13), int)
    mask[1, 6:] = 0
    ours = run(load_decoder(tmp_path, ALL), ids, jnp.asarray(mask))
    assert_equal_states(ours, peer_states(peer, ids, mask))


def test_states_beside_padding_on_the_left_equal_the_peer(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    ids, mask = token_ids(), np.ones((2, 13), int)
    mask[1, :6] = 0
    ours = run(load_decoder(tmp_path, ALL), ids, jnp.asarray(mask))
    assert_equal_states(ours, peer_states(peer, ids, mask), mask.astype(bool))


def test_padding_on_the_right_needs_no_mask():
    decoder, ids, mask = tiny_decoder(), token_ids(), np.ones((2, 13), int)
    mask[:, 9:] = 0
    (masked,), (plain,) = run(decoder, ids, jnp.asarray(mask)), run(decoder, ids)
    np.testing.assert_allclose(plain[:, :9], masked[:, :9], rtol=1e-5, atol=1e-5)


def test_states_depend_on_no_later_token():
    decoder, ids = tiny_decoder(), token_ids()
    other = ids.copy()
    other[:, 8:] = 7
    np.testing.assert_array_equal(run(decoder, ids)[0][:, :8], run(decoder, other)[0][:, :8])


@pytest.mark.parametrize("wanted", [(2, 1), (-2,), (0,), (-1, 1)])
def test_states_come_as_asked_for(wanted, tmp_path):
    peer = build_peer()
    peer.save_pretrained(tmp_path)
    ids = token_ids()
    ours = run(load_decoder(tmp_path, wanted), ids)
    theirs = peer_states(peer, ids)
    assert_equal_states(ours, [theirs[i] for i in wanted])


def test_layers_above_the_last_wanted_state_are_not_read(tmp_path):
    build_peer().save_pretrained(tmp_path)
    whole = DECODER.open(tmp_path)
    opened = taking((1, 2)).open(tmp_path, jnp.float32)
    assert opened.config["hidden_states"] == (1, 2)
    assert {name.split(".")[1] for name in opened.sources if "layers" in name} == {"0", "1"}
    assert "final_norm.scale" in whole.sources.keys() - opened.sources.keys()
    file = tmp_path / "model.safetensors"
    kept = {
        key: value
        for key, value in load_file(file).items()
        if ".layers.2." not in key and key != "model.norm.weight"
    }
    save_file(kept, file)
    loaded = load_decoder(tmp_path, (1, 2))
    assert_equal_states(run(loaded, token_ids()), run(opened.load(jnp.float32), token_ids()))
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\.mlp\.gate_proj"):
        DECODER.open(tmp_path)


def test_sharded_files_load(tmp_path):
    peer = build_peer()
    peer.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = token_ids()
    ours = run(load_decoder(tmp_path, ALL), ids)
    assert_equal_states(ours, peer_states(peer, ids))


def test_a_model_without_its_head_loads(tmp_path):
    peer = build_peer()
    peer.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    ids = token_ids()
    assert_equal_states(run(load_decoder(tmp_path, ALL), ids), peer_states(peer, ids))


def test_the_part_of_a_larger_model_that_reads_text_loads(tmp_path):
    """Mistral3ForConditionalGeneration, FLUX.2 dev's: a nested config, other parts beside it."""
    peer = build_peer("mistral")
    peer.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = {f"language_model.{key}": value for key, value in load_file(file).items()}
    save_file({**tensors, "vision_tower.patch_conv.weight": np.ones((2, 2), np.float32)}, file)
    outer = {"model_type": "mistral3", "text_config": json.loads(config.read_text())}
    config.write_text(json.dumps(outer))
    ids = token_ids()
    assert_equal_states(run(load_decoder(tmp_path, ALL), ids), peer_states(peer, ids))


@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.qwen3_4b.transformer.model."])
def test_a_file_without_a_config_loads(prefix, tmp_path):
    config = DecoderConfig(**{**TINY, "rope_theta": 1e6})
    decoder = tiny_decoder(config)
    DECODER.export(decoder, tmp_path, jnp.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    file = tmp_path / "qwen_3_tiny.safetensors"
    save_file({prefix + key.removeprefix("model."): x for key, x in tensors.items()}, file)
    loaded = DECODER.load(file, jnp.float32)
    assert dataclasses.replace(loaded.config, max_position_embeddings=32768) == config
    np.testing.assert_array_equal(run(loaded, token_ids())[0], run(decoder, token_ids())[0])


@pytest.mark.parametrize("missing", ["self_attn.q_norm", "mlp.gate_proj"])
def test_a_file_of_another_decoder_is_refused(missing, tmp_path):
    DECODER.export(tiny_decoder(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if missing not in key}, file)
    with pytest.raises(CheckpointError, match=f"no whole Qwen3.*{missing}"):
        DECODER.open(file)


def test_a_file_without_a_decoder_is_refused(tmp_path):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no decoder: missing"):
        DECODER.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "mistral"])
def test_export_then_load_keeps_every_bit(kind, tmp_path):
    decoder = tiny_decoder(DecoderConfig(**TINY, model_type=kind))
    DECODER.export(decoder, tmp_path, jnp.float32)
    loaded = DECODER.load(tmp_path, jnp.float32)
    assert loaded.config == decoder.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(decoder))


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "mistral"])
def test_the_peer_reads_an_export(kind, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    sizes = TINY if kind != "qwen2" else {**TINY, "head_dim": 6}
    decoder = tiny_decoder(DecoderConfig(**sizes, model_type=kind))
    DECODER.export(decoder, tmp_path, jnp.float32)
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = token_ids()
    assert relative_error(run(decoder, ids)[0], peer_states(peer, ids)[-1]) < 1e-4


def test_a_module_without_all_layers_is_not_written(tmp_path):
    decoder = tiny_decoder(DecoderConfig(**TINY, hidden_states=(2,)))
    with pytest.raises(ValueError, match="holds 2 of 3 layers"):
        DECODER.export(decoder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bfloat16_computation_is_close_to_float32():
    ids = token_ids()
    (exact,), (rounded,) = run(tiny_decoder(), ids), run(tiny_decoder(dtype=jnp.bfloat16), ids)
    assert rounded.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: 2**-9 a rounding, some ten of them in a row.
    assert relative_error(rounded.astype(jnp.float32), np.asarray(exact)) < 0.03


def test_a_token_outside_the_vocabulary_gives_nan():
    assert np.isnan(run(tiny_decoder(), np.full((2, 13), 50))[0]).all()


def test_a_text_longer_than_the_window_is_refused():
    decoder = tiny_decoder(DecoderConfig(**TINY, sliding_window=8))
    with pytest.raises(ValueError, match=r"input_ids has 9 tokens; .* at most 8"):
        decoder(np.zeros((1, 9), int))


def test_every_parameter_gets_a_gradient():
    decoder, ids = tiny_decoder(dtype=jnp.bfloat16), token_ids()

    @nnx.jit
    def gradient(decoder):
        weights = jnp.arange(24.0)  # squares of normed states sum to a constant, so weigh them
        return nnx.grad(lambda d: jnp.sum(d(ids)[0].astype(jnp.float32) * weights))(decoder)

    for path, value in nnx.to_flat_state(gradient(decoder)):
        assert value[...].dtype == jnp.float32
        assert jnp.any(value[...] != 0), path


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"model_type": "gemma2"}, "model_type = 'gemma2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rotary positions .*yarn"),
        ({"rope_parameters": None, "rope_scaling": "yarn"}, "rotary positions 'yarn'"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta = 'x' has the wrong type"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads = 3"),
        ({"head_dim": 9}, "head_dim = 9 even"),
        ({"hidden_states": [4]}, r"hidden_states = \(4,\) is out of range; expected -4 to 3"),
        ({"hidden_states": []}, "hidden_states is empty"),
        ({"vocab_size": "many"}, "vocab_size = 'many' has the wrong type"),
    ],
    ids=str,
)
def test_an_unsupported_config_is_named(changes, told):
    values = {**DecoderConfig(**TINY).to_json(), **changes}
    with pytest.raises(CheckpointError, match=told):
        DecoderConfig.from_json(values)


def test_a_family_takes_its_own_states_unless_a_config_names_others():
    """A checkpoint of ours names them; the files of a published model name none."""
    family, plain = taking((1, 2)).config, DecoderConfig(**TINY).to_json()
    assert family.from_json(plain).states == (1, 2)
    assert family.from_json({**plain, "hidden_states": [-1]}).states == (3,)
    assert DecoderConfig.from_json(family.from_json(plain).to_json()).states == (1, 2)


def test_a_config_without_sizes_is_named():
    with pytest.raises(CheckpointError, match=r"lacks vocab_size, .*num_key_value_heads"):
        DecoderConfig.from_json({"model_type": "qwen3"})


@pytest.mark.parametrize(
    "changes,wanted",
    [
        ({"rope_parameters": None, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": None, "rope_theta": 7}, {"rope_theta": 7}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}),
        ({"model_type": "qwen2", "head_dim": None}, {"model_type": "qwen2", "head_dim": 6}),
        ({"model_type": "mistral", "sliding_window": None}, {"model_type": "mistral"}),
    ],
    ids=str,
)
def test_configs_of_other_releases_are_read(changes, wanted):
    config = DecoderConfig(**TINY)
    found = DecoderConfig.from_json({**config.to_json(), **changes})
    assert found == dataclasses.replace(config, **wanted)


@pytest.mark.parametrize("wanted", [(1, 2), (-1,), None])
def test_config_round_trips_through_json(wanted):
    config = DecoderConfig(**TINY, hidden_states=wanted, sliding_window=100)
    assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
