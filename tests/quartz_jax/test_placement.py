"""What `place` does to a transformer's attention; its weights are `test_linear`'s."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from models.flux import FluxConfig, FluxTransformer
from quartz_jax import place

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from random_weights import random_module

CONFIG = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)
TOKENS, TEXT = 6, 5


def build():
    """Return a bfloat16 transformer with random weights and scales of norms."""
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    return random_module(lambda: FluxTransformer(CONFIG, rngs=nnx.Rngs(0), **dtypes))


def inputs():
    rng = np.random.default_rng(1)
    shapes = ((2, TOKENS, 16), (2, TEXT, 24), (2, 20))
    arrays = [rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes]
    ids = rng.integers(0, 9, (TOKENS, 3)), np.zeros((TEXT, 3))
    return *arrays, np.array([0.9, 0.4], np.float32), *(x.astype(np.float32) for x in ids)


def test_a_placed_transformer_gives_the_same_output():
    model, placed = build(), build()
    place(placed)
    expected = np.asarray(model(*inputs()), np.float32)
    assert np.std(expected) > 0.1
    np.testing.assert_array_equal(np.asarray(placed(*inputs()), np.float32), expected)


def test_a_placed_transformer_keeps_the_epsilon_of_its_norms():
    model, placed = build(), build()
    expected = model(*inputs())
    for m in (model, placed):
        for _, module in nnx.iter_modules(m):
            if isinstance(module, nnx.RMSNorm):
                module.epsilon = 0.5
    place(placed)
    found = np.asarray(placed(*inputs()), np.float32)
    np.testing.assert_array_equal(found, np.asarray(model(*inputs()), np.float32))
    assert (found != np.asarray(expected, np.float32)).any()


def test_norms_and_rotations_of_a_placed_transformer_are_a_kernel_on_gpus():
    """One of the block with two streams, one of that with one; without `place` none."""
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")

    def kernels(model):
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
            traced = jax.jit(lambda *args: model(*args)).trace(*inputs())
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return len(re.findall(r'custom_call.*name = "qk_norm_rope"', text))

    model = build()
    assert kernels(model) == 0
    place(model)
    assert kernels(model) == 2
