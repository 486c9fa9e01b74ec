"""The FLUX transformer against diffusers, and on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.flux import (
    TRANSFORMER,
    FluxConfig,
    FluxTransformer,
)
from models.stored_files import CheckpointError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZES = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def random_inputs(guidance: bool) -> dict[str, np.ndarray]:
    """Two samples of 3 x 5 latent tokens and 7 text tokens, float32."""
    rng = np.random.default_rng(0)
    height, width, text = 3, 5, 7
    img_ids = np.zeros((height, width, 3))
    img_ids[..., 1] = np.arange(height)[:, None]
    img_ids[..., 2] = np.arange(width)
    inputs = {
        "hidden_states": rng.normal(size=(2, height * width, SIZES["in_channels"])),
        "encoder_hidden_states": rng.normal(size=(2, text, SIZES["joint_attention_dim"])),
        "pooled_projections": rng.normal(size=(2, SIZES["pooled_projection_dim"])),
        "timestep": np.array([0.9, 0.37]),
        "img_ids": img_ids.reshape(-1, 3),
        "txt_ids": np.zeros((text, 3)),
    }
    if guidance:
        inputs["guidance"] = np.array([3.5, 2.0])
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def diffusers_transformer(**options):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**SIZES, **options).eval()
    for parameter in model.parameters():  # biases and norm scales away from their neutral values
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_output_matches_diffusers(tmp_path, guidance):
    peer = diffusers_transformer(guidance_embeds=guidance)
    peer.save_pretrained(tmp_path)
    inputs = random_inputs(guidance)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = peer(**tensors).sample.numpy()
    found = nnx.jit(TRANSFORMER.load(tmp_path, dtype=jnp.float32))(**inputs)
    assert relative_error(found, expected) <= 1e-4


def test_exported_folder_is_what_diffusers_saved(tmp_path):
    peer = diffusers_transformer(guidance_embeds=True)
    peer.save_pretrained(tmp_path / "theirs")
    ours = TRANSFORMER.load(tmp_path / "theirs", dtype=jnp.float32)
    TRANSFORMER.export(ours, tmp_path / "ours", dtype=jnp.float32)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    expected = peer.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_sharded_checkpoint_loads_the_same(tmp_path):
    peer = diffusers_transformer()
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (nnx.state(TRANSFORMER.load(tmp_path / name)) for name in ("one", "many"))
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes_dims_rope": [4, 6, 8]}, "axes_dims_rope"),
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name"),
    ],
)
def test_unusable_config_is_refused_by_name(options, message):
    with pytest.raises(CheckpointError, match=message):
        FluxConfig.from_json({**SIZES, **options})


def small_model(dtype=jnp.float32, **options):
    config = FluxConfig(**{**SIZES, "num_layers": 1, "num_single_layers": 1}, **options)
    return nnx.jit(lambda: FluxTransformer(config, rngs=nnx.Rngs(0), dtype=dtype))()


def test_gradients_reach_every_parameter_in_mixed_precision():
    model = small_model(dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), nnx.state(model)
    )
    nnx.update(model, noisy)
    inputs = random_inputs(guidance=False)

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda model: jnp.mean(model(**inputs).astype(jnp.float32) ** 2))(model)

    for path, gradient in nnx.to_flat_state(gradients(model)):
        assert gradient.dtype == jnp.float32, path
        assert jnp.all(jnp.isfinite(gradient[...])) and jnp.any(gradient[...] != 0), path


def test_untrained_model_predicts_zero_velocity():
    model = small_model()
    assert not np.any(nnx.jit(model)(**random_inputs(guidance=False)))


@pytest.mark.parametrize("guidance", [True, False])
def test_guidance_must_fit_the_model(guidance):
    model = small_model(guidance_embeds=guidance)
    with pytest.raises(ValueError, match="guidance is"):
        model(**random_inputs(guidance=not guidance))
