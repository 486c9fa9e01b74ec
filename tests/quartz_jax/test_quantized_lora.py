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
from models.linear import modulation, normalize
from models.lora import add_lora, read_lora
from quartz_jax import Int, QuantizedLinear, Quartz, get_recipe, quantize, quantize_model
from quartz_jax.transforms import (
    BlockRotation,
    Offset,
    Permute,
    Product,
    Scale,
    TakeOut,
    TurnedRows,
)

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
    before, after = quantized.single_blocks[0].linear1, adapted.single_blocks[0].linear1
    assert isinstance(after, QuantizedLinear)
    leaves = (jax.tree.leaves(layer.weight.get_value()) for layer in (after, before))
    assert all(one is other for one, other in zip(*leaves, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_branch_is_added_before_activation_gate_and_residual(quantized, adapter, batch):
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    path = "double_blocks.0.img_mlp.up"
    layer, base = (
        add_lora(quantized, adapters, dtype=jnp.float32).double_blocks[0].img_mlp.up
        for adapters in ([adapter], [])
    )
    x, norm, (gate, residual) = inputs(normal, batch, base)
    found = layer(x, norm=norm, activation="gelu", gate=gate, residual=residual)

    added = np.asarray(normalize(x, norm)) @ adapter.branches[path].down @ adapter.branches[path].up
    inner = base(x, norm=norm) + added
    expected = residual + gate * nnx.gelu(inner, approximate=True)
    # An int8 input, and its factor beside it, are rounded by up to 1/254 of a row's largest value.
    rounding = 0.03 * np.abs(added).max() * np.abs(gate).max() if base.activation else 0
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max() + rounding)


def inputs(normal, batch, layer):
    """Return x, what modulates it, and gate and residual for a layer."""
    k, n = layer.in_features, layer.out_features
    shift, scale, gate = normal(batch, 1, k), normal(batch, 1, k), normal(batch, 1, n)
    return jnp.asarray(normal(batch, 3, k)), modulation(shift, scale), (gate, normal(batch, 3, n))


OPS = {
    "none": (),
    "scale": (Scale(factor=jnp.linspace(0.5, 2, 64)),),
    "rotation": (BlockRotation(size=16),),
    "order": (Permute(index=jnp.arange(64)[::-1]),),
    "branch": (Product(down=jnp.ones((64, 2)) / 64, up=jnp.ones((96, 2))),),
    "offset": (Offset(amount=jnp.float32(0.5), bias=jnp.zeros(96)),),
    "taken out": (TakeOut(index=jnp.arange(3), weight=jnp.ones((96, 3))),),
    "several": (Scale(factor=jnp.linspace(0.5, 2, 64)), BlockRotation(size=64)),
}


@pytest.mark.parametrize(
    ("name", "format"),
    [*((name, Int(width=8)) for name in OPS), ("several", Quartz()), ("several", None)],
)
def test_a_branch_reads_the_input_in_front_of_all_ops(name, format):
    ops = OPS[name]
    random = np.random.default_rng(0)
    shapes = ((5, 64), (64, 3), (3, 96))
    x, down, up = (jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes)
    weight = quantize(random.normal(size=(96, 64)).astype(np.float32) / 8)
    layer = QuantizedLinear(weight, None, format, ops)
    found = layer.with_branch(down, up, jnp.float32)(x) - layer(x)
    expected = x @ down @ up
    # It reads the int8 input unless an op in between added to that or took from it.
    exact = format != Int(width=8) or any(isinstance(op, Offset | TakeOut) for op in ops)
    bound = 1e-5 if exact else 0.03  # roundings of up to 1/254 of a row's largest value
    np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize("format", [Int(width=8), Quartz(), None], ids=["int8", "quartz", "16"])
def test_a_branch_is_of_the_16_bit_linear_where_rotations_are_folded(format):
    """The layer is given channels rotated and gives rows so; the adapter knows neither."""
    rotation = BlockRotation(size=16, first=32, folded=4)
    turned = TurnedRows(size=4, first=16, rows=32)
    random = np.random.default_rng(0)
    shapes = ((5, 64), (64, 3), (3, 96))
    x, down, up = (jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes)
    weight = quantize(random.normal(size=(96, 64)).astype(np.float32) / 8)
    layer, given = QuantizedLinear(weight, None, format, (rotation, turned)), rotation.given(x)
    found = layer.with_branch(down, up, jnp.float32)(given) - layer(given)
    expected = turned.turned(x @ down @ up)
    bound = 0.03 if format == Int(width=8) else 1e-5  # as above
    np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max())


def test_several_branches_of_int8_layers_are_one(quantized, adapter):
    layer = add_lora(quantized, [adapter, adapter]).single_blocks[0].linear1
    rank = sum(2 * x.down.shape[1] for x in [adapter.branches["single_blocks.0.linear1"]])
    (op,) = layer.ops.get_value()
    assert op.down.shape == (layer.in_features, rank)
    again = layer.with_branch(op.down, op.up.T, op.down.dtype)
    assert again.ops.get_value()[-1].up.shape[1] in (rank, 2 * rank)


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
