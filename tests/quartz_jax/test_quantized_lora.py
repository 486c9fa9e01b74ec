"""Adapters beside quantized linears: the codes stay, the branch is added to what they give."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.flux import FluxConfig, FluxTransformer
from models.flux.family import FLUX
from models.linear import modulation
from models.lora import add_lora, read_lora
from quartz_jax import QuantizedLinear, get_recipe, quantize_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
import lora_files

CONFIG = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    axes_dims_rope=(8, 12, 12),
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    factors = lora_files.random_factors(lora_files.diffusers_modules(CONFIG))
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    return read_lora(lora_files.save(path, lora_files.diffusers_tensors(factors)), FLUX, CONFIG)


@pytest.fixture(scope="module", params=["w4a8x", "w4a16"])
def quantized(request):
    model = FluxTransformer(CONFIG, rngs=nnx.Rngs(0))
    return quantize_model(model, get_recipe(request.param))[0]


def test_codes_and_scales_stay(quantized, adapter):
    adapted = add_lora(quantized, [adapter], dtype=jnp.float32)
    before, after = quantized.single_blocks[0].linear1, adapted.single_blocks[0].linear1.base
    assert isinstance(after, QuantizedLinear)
    leaves = (jax.tree.leaves(layer.weight.get_value()) for layer in (after, before))
    assert all(one is other for one, other in zip(*leaves, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_branch_is_added_before_activation_gate_and_residual(quantized, adapter, batch):
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    adapted = add_lora(quantized, [adapter], dtype=jnp.float32)
    layer = adapted.double_blocks[0].img_mlp.up
    k, n = layer.down.shape[0], layer.up.shape[1]
    x, shift, scale = normal(batch, 3, k), normal(batch, 1, k), normal(batch, 1, k)
    norm = modulation(shift, scale)
    gate, residual = normal(batch, 1, n), normal(batch, 3, n)
    found = layer(x, norm=norm, activation="gelu", gate=gate, residual=residual)

    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    modulated = (x - mean) / np.sqrt(variance + 1e-6) * (1 + scale) + shift
    branch = adapter.branches["double_blocks.0.img_mlp.up"]
    inner = layer.base(x, norm=norm) + modulated @ branch.down @ branch.up
    expected = residual + gate * nnx.gelu(inner, approximate=True)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_scale_of_zero_is_the_quantized_model(quantized, adapter):
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    arguments = {
        "hidden_states": normal(1, 4, 16),
        "encoder_hidden_states": normal(1, 3, 32),
        "pooled_projections": normal(1, 16),
        "timestep": np.float32([0.5]),
        "img_ids": np.zeros((4, 3), np.float32),
        "txt_ids": np.zeros((3, 3), np.float32),
    }
    scaled = [add_lora(quantized, [adapter], [scale]) for scale in (0.0, 1.0)]
    run = nnx.jit(lambda model: model(**arguments))
    off, on, expected = (np.asarray(run(model)) for model in (*scaled, quantized))
    np.testing.assert_allclose(off, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(on, off, atol=1e-3)
