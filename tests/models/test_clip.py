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
from models.text_encoders import (
    CLIP_TEXT,
    CLIP_TEXT_PROJECTED,
    CLIPTextConfig,
    CLIPTextEncoder,
    ProjectedCLIPTextConfig,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}
EOS = 40  # not the highest id, so that the two rules for the pooled token differ

# Compiled once for all tests that share a shape.
run = nnx.jit(CLIPTextEncoder.__call__)


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def token_ids(tokens=16):
    """Return prompts with two end tokens each, and the highest id elsewhere."""
    ids = np.random.default_rng(0).integers(3, EOS, (3, tokens))
    ids[:, 0] = 49
    for row, end in enumerate([5, 9, 12]):
        ids[row, end] = ids[row, -1] = EOS
    return ids


def tiny_encoder(eos_token_id=EOS, hidden_act="quick_gelu", **options):
    config = CLIPTextConfig(**TINY, eos_token_id=eos_token_id, hidden_act=hidden_act)
    return random_module(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0), **options))


def build_peer(eos_token_id=EOS, hidden_act="quick_gelu", name="CLIPTextModel"):
    """Return a random torch encoder whose biases and norms aren't the initial constants."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        **TINY, eos_token_id=eos_token_id, hidden_act=hidden_act, projection_dim=18
    )
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return model


def peer_output(model, ids, mask=None):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        output = model(torch.tensor(ids), attention_mask=mask)
    return output.last_hidden_state.numpy(), output.pooler_output.numpy()


def assert_equal_outputs(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) < 1e-4


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [2, EOS])
def test_states_and_pooled_equal_the_peer(eos_token_id, hidden_act, tmp_path):
    peer = build_peer(eos_token_id, hidden_act)
    peer.save_pretrained(tmp_path)
    ids = token_ids()
    assert_equal_outputs(run(CLIP_TEXT.load(tmp_path, jnp.float32), ids), peer_output(peer, ids))


PROJECTED = "CLIPTextModelWithProjection"


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [2, EOS])
def test_a_middle_state_and_the_projected_one_equal_the_peer(eos_token_id, hidden_act, tmp_path):
    """As SD3 and SDXL take them."""
    torch = pytest.importorskip("torch")
    peer, ids = build_peer(eos_token_id, hidden_act, PROJECTED), token_ids()
    peer.save_pretrained(tmp_path)
    with torch.no_grad():
        output = peer(torch.tensor(ids), output_hidden_states=True)
    theirs = (output.hidden_states[-2].numpy(), output.text_embeds.numpy())
    ours = run(CLIP_TEXT_PROJECTED.load(tmp_path, jnp.float32), ids)
    assert ours[1].shape == (3, 18)
    assert_equal_outputs(ours, theirs)


@pytest.mark.parametrize("wanted", [0, 1, -1])
def test_any_state_can_be_asked_for(wanted, tmp_path):
    torch = pytest.importorskip("torch")
    peer, ids = build_peer(name=PROJECTED), token_ids()
    peer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_state": wanted}))
    with torch.no_grad():
        theirs = peer(torch.tensor(ids), output_hidden_states=True).hidden_states[wanted]
    assert (
        relative_error(run(CLIP_TEXT_PROJECTED.load(tmp_path, jnp.float32), ids)[0], theirs.numpy())
        < 1e-4
    )


def test_a_projection_is_left_alone_unless_it_is_asked_for(tmp_path):
    build_peer(name=PROJECTED).save_pretrained(tmp_path)
    states, pooled = run(CLIP_TEXT.load(tmp_path, jnp.float32), token_ids())
    np.testing.assert_array_equal(pooled, states[np.arange(3), [5, 9, 12]])


def test_an_encoder_with_a_projection_is_written_and_read(tmp_path):
    pytest.importorskip("torch")
    from transformers import CLIPTextModelWithProjection

    config = ProjectedCLIPTextConfig(**TINY, eos_token_id=EOS, projection_dim=18)
    encoder = random_module(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0)))
    CLIP_TEXT_PROJECTED.export(encoder, tmp_path, jnp.float32)
    loaded = CLIP_TEXT_PROJECTED.load(tmp_path, jnp.float32)
    assert loaded.config == encoder.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(encoder))
    _, report = CLIPTextModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("width,heads,act", [(768, 12, "quick_gelu"), (1280, 20, "gelu")])
def test_single_files_of_both_encoders_are_told_apart(width, heads, act, tmp_path):
    """As SD3's single files hold them."""
    config = ProjectedCLIPTextConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=heads,
        hidden_act=act,
        eos_token_id=2,
        projection_dim=width,
    )
    tensors = CLIP_TEXT_PROJECTED.tensors(config, CLIP_TEXT_PROJECTED.file)
    tensors = {name: np.zeros(shape, np.float16) for name, (_, shape) in tensors.items()}
    file = tmp_path / "clip.safetensors"
    save_file({f"text_encoders.clip.transformer.{name}": x for name, x in tensors.items()}, file)
    assert CLIP_TEXT_PROJECTED.file_config(file) == config
    assert CLIP_TEXT_PROJECTED.open(file).config == config.to_json()
    del tensors["text_projection.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"without text_projection\.weight"):
        CLIP_TEXT_PROJECTED.open(file)


def test_our_own_config_brings_the_projection_back_under_either_class():
    config = ProjectedCLIPTextConfig(**TINY, projection_dim=18)
    for kind in (ProjectedCLIPTextConfig, CLIPTextConfig):
        found = kind.from_json(json.loads(json.dumps(config.to_json())))
        assert (found.hidden_state, found.projection_dim) == (-2, 18)


@pytest.mark.parametrize("field,value", [("hidden_state", -4), ("projection_dim", 0)])
def test_a_projected_config_out_of_range_is_named(field, value):
    with pytest.raises(CheckpointError, match=f"{field} = {value} is out of range"):
        ProjectedCLIPTextConfig.from_json({**TINY, field: value})


def test_masked_states_equal_the_peer(tmp_path):
    peer = build_peer()
    peer.save_pretrained(tmp_path)
    ids, mask = token_ids(), np.ones((3, 16), int)
    mask[0, 6:] = 0
    ours = run(CLIP_TEXT.load(tmp_path, jnp.float32), ids, jnp.asarray(mask))
    assert_equal_outputs(ours, peer_output(peer, ids, mask))


def test_short_prompts_equal_the_peer(tmp_path):
    peer = build_peer()
    peer.save_pretrained(tmp_path)
    ids = token_ids()[:, :13]
    assert_equal_outputs(run(CLIP_TEXT.load(tmp_path, jnp.float32), ids), peer_output(peer, ids))


def test_sharded_files_load(tmp_path):
    peer = build_peer()
    peer.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = token_ids()
    assert_equal_outputs(run(CLIP_TEXT.load(tmp_path, jnp.float32), ids), peer_output(peer, ids))


def test_pooled_is_the_state_of_the_first_end_token():
    states, pooled = run(tiny_encoder(), token_ids())
    np.testing.assert_array_equal(pooled, states[np.arange(3), [5, 9, 12]])


def test_end_token_2_pools_at_the_highest_id():
    states, pooled = run(tiny_encoder(eos_token_id=2), token_ids())
    np.testing.assert_array_equal(pooled, states[:, 0])


def test_states_depend_on_no_later_token():
    encoder, ids = tiny_encoder(), token_ids()
    other = ids.copy()
    other[:, 8:] = 7
    np.testing.assert_array_equal(run(encoder, ids)[0][:, :8], run(encoder, other)[0][:, :8])


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="input_ids has 17 tokens"):
        tiny_encoder()(np.zeros((1, 17), int))


def test_position_ids_and_missing_prefix_load(tmp_path):
    encoder = tiny_encoder()
    CLIP_TEXT.export(encoder, tmp_path, dtype=jnp.float32)
    file = tmp_path / "model.safetensors"
    tensors = {key.removeprefix("text_model."): value for key, value in load_file(file).items()}
    save_file({**tensors, "embeddings.position_ids": np.arange(16)[None]}, file)
    np.testing.assert_array_equal(
        run(CLIP_TEXT.load(tmp_path, jnp.float32), token_ids())[0], run(encoder, token_ids())[0]
    )


def test_export_then_load_keeps_every_bit(tmp_path):
    encoder = tiny_encoder()
    CLIP_TEXT.export(encoder, tmp_path, dtype=jnp.float32)
    loaded = CLIP_TEXT.load(tmp_path, jnp.float32)
    assert loaded.config == encoder.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(encoder))


def test_the_peer_reads_an_export(tmp_path):
    pytest.importorskip("torch")
    from transformers import CLIPTextModel

    encoder = tiny_encoder()
    CLIP_TEXT.export(encoder, tmp_path, dtype=jnp.float32)
    peer, report = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_equal_outputs(run(encoder, token_ids()), peer_output(peer, token_ids()))


def test_every_parameter_gets_a_gradient():
    encoder = tiny_encoder(dtype=jnp.bfloat16)

    @nnx.jit
    def gradient(encoder):
        weights = jnp.arange(24.0)
        return nnx.grad(lambda e: jnp.sum(e(token_ids())[0].astype(jnp.float32) * weights))(encoder)

    for path, value in nnx.to_flat_state(gradient(encoder)):
        assert value[...].dtype == jnp.float32
        assert jnp.any(value[...] != 0), path


@pytest.mark.parametrize("key,value", [("hidden_act", "relu"), ("model_type", "siglip_text_model")])
def test_an_unsupported_config_is_named(key, value):
    values = {**dataclasses.asdict(CLIPTextConfig(**TINY)), key: value}
    with pytest.raises(CheckpointError, match=f"{key} = '{value}'"):
        CLIPTextConfig.from_json(values)
