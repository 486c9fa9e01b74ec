"""SigLIP's image encoder and the Redux embedder against transformers and diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from random_weights import random_module
from safetensors.numpy import load_file, save_file

from models.flux.redux import REDUX, ReduxConfig, ReduxEmbedder
from models.image_encoders import (
    SIGLIP_VISION,
    SiglipVisionConfig,
    SiglipVisionEncoder,
    to_pixels,
)
from models.stored_files import CheckpointError

TINY = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 29,  # a pixel more than two patches
    "patch_size": 14,
}
run = nnx.jit(SiglipVisionEncoder.__call__)


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (2, 29, 29, 3)).astype(np.float32)


def random_peer(build):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def siglip():
    """A random torch encoder, with the head that isn't needed."""
    transformers = pytest.importorskip("transformers")
    return random_peer(
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY))
    )


def peer_states(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(pixels()).permute(0, 3, 1, 2)).last_hidden_state.numpy()


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_states_equal_the_peer(prefix, tmp_path):
    peer = siglip()
    peer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file).items()
    save_file({prefix + key.removeprefix("vision_model."): x for key, x in tensors}, file)
    ours = run(SIGLIP_VISION.load(tmp_path, jnp.float32), pixels())
    assert ours.shape == (2, 4, 24)
    assert relative_error(ours, peer_states(peer)) < 1e-4


def test_the_peer_reads_an_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder = random_module(
        lambda: SiglipVisionEncoder(SiglipVisionConfig(**TINY), rngs=nnx.Rngs(0))
    )
    SIGLIP_VISION.export(encoder, tmp_path, jnp.float32)
    assert SIGLIP_VISION.load(tmp_path, jnp.float32).config == encoder.config
    peer, report = transformers.SiglipVisionModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert relative_error(run(encoder, pixels()), peer_states(peer)) < 1e-4


def test_pictures_are_prepared_as_transformers_does_it():
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in [(50, 70), (20, 20)]
    ]
    config = SiglipVisionConfig(**{**TINY, "image_size": 42})
    processor = transformers.SiglipImageProcessor(size={"height": 42, "width": 42})
    theirs = processor(images=images, return_tensors="np")["pixel_values"]
    # PIL rounds to 8 bits after each of its two passes, others once: a level of 255 apart.
    np.testing.assert_allclose(
        to_pixels(images, config), theirs.transpose(0, 2, 3, 1), atol=2.01 / 127.5
    )


def test_another_size_of_picture_is_refused():
    encoder = random_module(
        lambda: SiglipVisionEncoder(SiglipVisionConfig(**TINY), rngs=nnx.Rngs(0))
    )
    with pytest.raises(
        ValueError, match=r"pixels has shape \[1, 28, 28, 3\]; expected \[batch, 29"
    ):
        encoder(np.zeros((1, 28, 28, 3), np.float32))


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads = 5"),
        ({"patch_size": 30}, "patch_size = 30 at most"),
        ({"image_size": [29, 29]}, "image_size = .* has the wrong type"),
    ],
)
def test_an_unsupported_config_is_named(changes, told):
    with pytest.raises(CheckpointError, match=told):
        SiglipVisionConfig.from_json({**SiglipVisionConfig(**TINY).to_json(), **changes})


@pytest.mark.parametrize("single", [True, False])
def test_redux_tokens_equal_diffusers(single, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    peer = random_peer(lambda: ReduxImageEncoder(redux_dim=24, txt_in_features=16))
    peer.save_pretrained(tmp_path)
    states = np.random.default_rng(0).standard_normal((2, 4, 24)).astype(np.float32)
    with torch.no_grad():
        theirs = peer(torch.tensor(states)).image_embeds.numpy()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    ours = REDUX.load(file if single else tmp_path, jnp.float32)
    assert ours.config == ReduxConfig(redux_dim=24, txt_in_features=16)
    assert relative_error(nnx.jit(ReduxEmbedder.__call__)(ours, states), theirs) < 1e-4
