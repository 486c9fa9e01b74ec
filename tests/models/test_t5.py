import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module
from safetensors.numpy import load_file, save_file

from models.stored_files import CheckpointError
from models.text_encoders import T5_ENCODER, T5Config, T5Encoder
from models.text_encoders.t5 import relative_position_buckets

TINY = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}

# Compiled once for all tests that share a shape.
run = nnx.jit(T5Encoder.__call__)


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def token_ids(tokens=21, batch=2, vocab_size=50):
    return np.random.default_rng(0).integers(0, vocab_size, (batch, tokens))


def tiny_encoder(feed_forward_proj="gated-gelu", **options):
    config = T5Config(**TINY, feed_forward_proj=feed_forward_proj)
    return random_module(lambda: T5Encoder(config, rngs=nnx.Rngs(0), **options))


@pytest.fixture(params=["relu", "gated-gelu"])
def peer(request):
    """A random torch encoder whose norms aren't all one."""
    torch = pytest.importorskip("torch")
    from transformers import T5Config as PeerConfig
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(PeerConfig(**TINY, feed_forward_proj=request.param)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.uniform_(0.5, 1.5)
    return model


def peer_states(model, ids, mask=None):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(ids), attention_mask=mask).last_hidden_state.float().numpy()


def test_states_equal_the_peer(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    ids = token_ids()
    assert (
        relative_error(run(T5_ENCODER.load(tmp_path, jnp.float32), ids), peer_states(peer, ids))
        < 1e-4
    )


def test_masked_states_equal_the_peer(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    ids, mask = token_ids(), np.ones((2, 21), int)
    mask[1, 9:] = 0
    ours = run(T5_ENCODER.load(tmp_path, jnp.float32), ids, jnp.asarray(mask))
    assert relative_error(ours, peer_states(peer, ids, mask)) < 1e-4


def test_masked_tokens_leave_the_others_alone():
    encoder, ids, mask = tiny_encoder(), token_ids(), np.ones((2, 21), int)
    mask[:, 9:] = 0
    other = np.where(mask, ids, (ids + 1) % 50)
    mask = jnp.asarray(mask)
    np.testing.assert_array_equal(run(encoder, ids, mask)[:, :9], run(encoder, other, mask)[:, :9])


def test_long_prompts_equal_the_peer(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    ids = token_ids(tokens=300, batch=1)
    assert (
        relative_error(run(T5_ENCODER.load(tmp_path, jnp.float32), ids), peer_states(peer, ids))
        < 1e-4
    )


def test_sharded_files_load(peer, tmp_path):
    peer.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = token_ids()
    assert (
        relative_error(run(T5_ENCODER.load(tmp_path, jnp.float32), ids), peer_states(peer, ids))
        < 1e-4
    )


@pytest.mark.parametrize("buckets,distance", [(32, 128), (16, 64), (8, 20), (32, 100)])
def test_buckets_equal_the_peer(buckets, distance):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = np.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(offsets), num_buckets=buckets, max_distance=distance
    )
    ours = relative_position_buckets(offsets, buckets, distance)
    np.testing.assert_array_equal(ours, theirs.numpy())


def renamed(folder, rename):
    tensors = load_file(folder / "model.safetensors")
    save_file(rename(tensors), folder / "model.safetensors")


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), None])
def test_either_name_of_the_token_embedding_loads(names, tmp_path):
    encoder = tiny_encoder()
    T5_ENCODER.export(encoder, tmp_path, dtype=jnp.float32)
    names = names or ("shared", "encoder.embed_tokens")

    def rename(tensors):
        table = tensors.pop("shared.weight")
        return {**tensors, **{f"{name}.weight": table for name in names}}

    renamed(tmp_path, rename)
    ids = token_ids()
    np.testing.assert_array_equal(
        run(T5_ENCODER.load(tmp_path, jnp.float32), ids), run(encoder, ids)
    )


def test_decoder_tensors_are_left_alone(tmp_path):
    T5_ENCODER.export(tiny_encoder(), tmp_path)
    extra = {"decoder.block.0.layer.0.layer_norm.weight": np.ones(24, np.float32)}
    renamed(tmp_path, lambda tensors: {**tensors, **extra})
    T5_ENCODER.load(tmp_path, jnp.float32)


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
def test_export_then_load_keeps_every_bit(feed_forward_proj, tmp_path):
    encoder = tiny_encoder(feed_forward_proj)
    T5_ENCODER.export(encoder, tmp_path, dtype=jnp.float32)
    loaded = T5_ENCODER.load(tmp_path, jnp.float32)
    assert loaded.config == encoder.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(encoder))


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
def test_the_peer_reads_an_export(feed_forward_proj, tmp_path):
    pytest.importorskip("torch")
    from transformers import T5EncoderModel

    encoder = tiny_encoder(feed_forward_proj)
    T5_ENCODER.export(encoder, tmp_path, dtype=jnp.float32)
    ids = token_ids()
    theirs = peer_states(T5EncoderModel.from_pretrained(tmp_path), ids)
    assert relative_error(run(encoder, ids), theirs) < 1e-4


def test_export_stores_bfloat16_by_default(tmp_path):
    T5_ENCODER.export(tiny_encoder(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {jnp.dtype(jnp.bfloat16)}
    assert run(T5_ENCODER.load(tmp_path, jnp.bfloat16), token_ids()).dtype == jnp.bfloat16


def test_bfloat16_computation_is_close_to_float32():
    ids = token_ids()
    exact, rounded = run(tiny_encoder(), ids), run(tiny_encoder(dtype=jnp.bfloat16), ids)
    assert rounded.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: 2**-9 a rounding, some ten of them in a row.
    assert relative_error(rounded.astype(jnp.float32), exact) < 0.03


def test_a_token_outside_the_vocabulary_gives_nan():
    assert np.isnan(run(tiny_encoder(), np.full((2, 21), 50))).all()


def test_every_parameter_gets_a_gradient():
    encoder = tiny_encoder(dtype=jnp.bfloat16)
    ids = token_ids()

    @nnx.jit
    def gradient(encoder):
        # Squares of normed states sum to a constant, so weigh them.
        weights = jnp.arange(24.0)
        return nnx.grad(lambda e: jnp.sum(e(ids).astype(jnp.float32) * weights))(encoder)

    for path, value in nnx.to_flat_state(gradient(encoder)):
        assert value[...].dtype == jnp.float32
        assert jnp.any(value[...] != 0), path


def test_initial_query_weights_make_logits_of_order_one():
    config = T5Config(**{**TINY, "d_model": 256, "d_kv": 64, "num_layers": 1})
    kernel = T5Encoder(config, rngs=nnx.Rngs(0)).blocks[0].attention.q.kernel[...]
    assert float(kernel.std()) == pytest.approx((256 * 64) ** -0.5, rel=0.05)


@pytest.mark.parametrize("key,value", [("feed_forward_proj", "gated-silu"), ("model_type", "umt5")])
def test_an_unsupported_config_is_named(key, value):
    values = {**dataclasses.asdict(T5Config(**TINY)), key: value}
    with pytest.raises(CheckpointError, match=f"{key} = '{value}'"):
        T5Config.from_json(values)
