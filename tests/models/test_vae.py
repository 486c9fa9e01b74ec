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
from models.vae import (
    AUTOENCODER_KL,
    AutoencoderKL,
    AutoencoderKLConfig,
)
from models.vae import modeling as vae_modeling

TINY = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
FLUX_LIKE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}

# Compiled once for all tests that share a shape.
encode, decode = nnx.jit(AutoencoderKL.encode), nnx.jit(AutoencoderKL.decode)


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def random_image(height, width, channels, batch=2):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (batch, height, width, channels)).astype(np.float32)


def tiny_autoencoder(*, dtype=jnp.float32, **changes):
    config = AutoencoderKLConfig(**{**TINY, **changes})
    return random_module(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0), dtype=dtype))


def build_peer(**changes):
    """Return a random torch autoencoder whose norms aren't the initial constants."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL as Peer

    torch.manual_seed(0)
    config = {**TINY, **changes}
    levels = len(config["block_out_channels"])
    model = Peer(
        **config,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
    return model


def peer_moments(model, images):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        moments = model.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
    return [value.permute(0, 2, 3, 1).numpy() for value in (moments.mean, moments.logvar)]


def peer_images(model, latents):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        images = model.decode(torch.tensor(latents).permute(0, 3, 1, 2)).sample
    return images.permute(0, 2, 3, 1).numpy()


def assert_equal_autoencoders(ours, peer, height=24, width=16):
    factor, channels = ours.config.downsampling, ours.config.latent_channels
    images = random_image(height, width, ours.config.in_channels)
    for mine, other in zip(encode(ours, images), peer_moments(peer, images), strict=True):
        assert relative_error(mine, other) < 1e-4
    latents = random_image(height // factor, width // factor, channels)
    assert relative_error(decode(ours, latents), peer_images(peer, latents)) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FLUX_LIKE,
        {"use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"layers_per_block": 2, "block_out_channels": (8, 12)},
        {"block_out_channels": (8,)},
        {"in_channels": 4, "out_channels": 1, "latent_channels": 3},
    ],
    ids=str,
)
def test_moments_and_images_equal_the_peer(changes, tmp_path):
    peer = build_peer(**changes)
    peer.save_pretrained(tmp_path)
    assert_equal_autoencoders(AUTOENCODER_KL.load(tmp_path, jnp.float32), peer)


@pytest.mark.parametrize("height,width", [(4, 4), (8, 40)])
def test_any_size_equals_the_peer(height, width, tmp_path):
    peer = build_peer()
    peer.save_pretrained(tmp_path)
    assert_equal_autoencoders(AUTOENCODER_KL.load(tmp_path, jnp.float32), peer, height, width)


def test_sharded_files_load(tmp_path):
    peer = build_peer()
    peer.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal_autoencoders(AUTOENCODER_KL.load(tmp_path, jnp.float32), peer)


def test_old_attention_names_load(tmp_path):
    autoencoder = tiny_autoencoder()
    AUTOENCODER_KL.export(autoencoder, tmp_path, dtype=jnp.float32)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name):
        for new, ancient in old.items():
            name = name.replace(f".{new}.", f".{ancient}.")
        return name

    save_file({old_name(name): value for name, value in load_file(file).items()}, file)
    latents = random_image(3, 2, 4)
    np.testing.assert_array_equal(
        decode(AUTOENCODER_KL.load(tmp_path, jnp.float32), latents), decode(autoencoder, latents)
    )


@pytest.mark.parametrize("changes", [{}, FLUX_LIKE], ids=str)
def test_export_then_load_keeps_every_bit(changes, tmp_path):
    autoencoder = tiny_autoencoder(**changes)
    AUTOENCODER_KL.export(autoencoder, tmp_path, dtype=jnp.float32)
    loaded = AUTOENCODER_KL.load(tmp_path, jnp.float32)
    assert loaded.config == autoencoder.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(autoencoder))


@pytest.mark.parametrize("changes", [{}, FLUX_LIKE], ids=str)
def test_the_peer_reads_an_export(changes, tmp_path):
    pytest.importorskip("torch")
    from diffusers import AutoencoderKL as Peer

    autoencoder = tiny_autoencoder(**changes)
    AUTOENCODER_KL.export(autoencoder, tmp_path, dtype=jnp.float32)
    assert_equal_autoencoders(autoencoder, Peer.from_pretrained(tmp_path))


def test_attention_by_slices_equals_attention_at_once(monkeypatch):
    attention = tiny_autoencoder().encoder.mid_block.attention
    pixels = random_image(6, 4, 16)
    whole = attention(pixels)
    monkeypatch.setattr(vae_modeling, "_QUERIES_AT_ONCE", 7)  # of 24, so the last is short
    np.testing.assert_allclose(attention(pixels), whole, atol=1e-6)


def test_samples_have_the_mean_and_deviation_of_the_distribution():
    moments = vae_modeling.DiagonalGaussian(jnp.full(100_000, 3.0), jnp.full(100_000, -2.0))
    samples = moments.sample(jax.random.key(0))
    assert float(samples.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(samples.std()) == pytest.approx(np.exp(-1.0), abs=0.01)


def test_samples_in_bfloat16_are_those_of_float32_rounded():
    zeros = jnp.zeros(2**16, jnp.bfloat16)
    samples = vae_modeling.DiagonalGaussian(zeros, zeros).sample(jax.random.key(0))
    wanted = jax.random.normal(jax.random.key(0), zeros.shape).astype(jnp.bfloat16)
    np.testing.assert_array_equal(samples, wanted)  # drawn in bfloat16 there are 128 values


def test_every_parameter_gets_a_gradient():
    config = {"block_out_channels": (8, 12), "dtype": jnp.bfloat16}
    autoencoder, images = tiny_autoencoder(**config), random_image(4, 4, 3)

    def loss(model):
        moments = model.encode(images)
        error = model.decode(moments.sample(jax.random.key(0))) - images
        return jnp.mean(jnp.abs(error)) + jnp.mean(jnp.square(moments.mean) + moments.logvar)

    # A key's bias adds the same to all logits of a query, so its gradient is only noise.
    for path, value in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(autoencoder)):
        assert value[...].dtype == jnp.float32
        assert jnp.any(value[...] != 0) or path[-2:] == ("to_k", "bias"), path


def test_initial_kernels_are_uniform_within_the_root_of_the_inputs():
    kernel = vae_modeling._KERNEL_INIT(jax.random.key(0), (3, 3, 8, 16))
    assert float(jnp.abs(kernel).max()) == pytest.approx((3 * 3 * 8) ** -0.5, rel=0.01)


def test_a_side_that_is_no_multiple_of_the_downsampling_is_refused():
    with pytest.raises(ValueError, match=r"images is 24x18; .* multiples of 4"):
        tiny_autoencoder().encode(random_image(24, 18, 3))


def test_channels_first_images_are_refused():
    with pytest.raises(ValueError, match="images has shape"):
        tiny_autoencoder().encode(np.zeros((1, 3, 8, 8), np.float32))


def test_latents_with_wrong_channels_are_refused():
    with pytest.raises(ValueError, match="latents has shape"):
        tiny_autoencoder().decode(np.zeros((1, 8, 8, 16), np.float32))


@pytest.mark.parametrize(
    "key,value",
    [
        ("act_fn", "gelu"),
        ("latents_mean", [0.0]),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 3),
        ("up_block_types", ["UpDecoderBlock2D"]),
    ],
)
def test_an_unsupported_config_is_named(key, value):
    values = {**dataclasses.asdict(AutoencoderKLConfig(**TINY)), key: value}
    with pytest.raises(CheckpointError, match=f"{key} = "):
        AutoencoderKLConfig.from_json(values)


def test_config_round_trips_through_json():
    config = AutoencoderKLConfig(**{**TINY, **FLUX_LIKE})
    assert AutoencoderKLConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
