"""Gradients through quantized tensors and layers: straight through, exact, or refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blocks import INT8, QUARTZ, X, build, rule
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.attention import attention_int8_fp8, quantize_heads
from pallas_kernels.functions import Part, gelu_of_tanh, join
from pallas_kernels.matmul import Epilogue, PreparedWeights, matmul
from pallas_kernels.operands import Branch
from pallas_kernels.qk_norm_rope import Stream, qk_norm_rope, qk_norm_rope_8bit
from pallas_kernels.quantize import Norm
from pallas_kernels.quantize import quantize as quantize_and_decode
from quartz_jax import (
    Int,
    QuantizedLinear,
    Quartz,
    Recipe,
    dequantize,
    place,
    quantize,
    quantize_model,
    quartz_matmul,
)
from quartz_jax.engine.linear import FEW_ROWS
from quartz_jax.engine.place import place_weight
from quartz_jax.formats import IF4, MXFP4, NVFP4, SDR

FORMATS = [QUARTZ, Quartz(range="minmax", group_size=8), Quartz(scale_block=16), INT8]
FORMATS += [Int(width=4), Int(width=4, block=16), NVFP4(), MXFP4(), SDR(base=16), IF4()]
every_format = pytest.mark.parametrize("format_", FORMATS, ids=str)
K, N = 48, 6


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradient(f, *args):
    """The gradients by all arguments of the sum of what f returns, each element with a weight."""

    def loss(*args):
        y = f(*args).astype(jnp.float32)
        return jnp.sum(y * normal(*y.shape, seed=9))

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(args)))))(*args)


def assert_same(found, expected, rtol=1e-5):
    def compare(a, b):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())
        assert np.abs(b).max() > 0

    jax.tree.map(compare, found, expected)


@every_format
def test_quantized_values_have_the_gradient_of_what_was_quantized(format_):
    x = normal(3, K)
    for f in (lambda x: dequantize(quantize(x, format_)), format_):
        assert_same(gradient(f, x), gradient(lambda x: x, x))
        assert_same(gradient(jax.jit(f), x), gradient(lambda x: x, x))


def test_an_axis_in_front_is_that_of_the_gradient_too():
    x = normal(K, 3)
    found = gradient(lambda x: dequantize(quantize(x, axis=0)), x)
    assert_same(found, gradient(lambda x: x, x))


PAIRS = [(f, QUARTZ) for f in FORMATS] + [(INT8, NVFP4()), (INT8, Quartz(scale_block=16))]


@pytest.mark.parametrize(("format_", "w_format"), PAIRS, ids=str)
def test_products_have_the_gradient_of_the_product_of_the_values(format_, w_format):
    x, w, bias = normal(2, 3, K), normal(N, K, seed=1), normal(N, seed=2)

    def product(x, w, bias):
        x, w = quantize(x, format_), quantize(w, w_format)
        return quartz_matmul(x, w, bias=bias, out_dtype=jnp.float32)

    def definition(x, w, bias):
        rounded = (
            jax.lax.stop_gradient(dequantize(quantize(*pair)))
            for pair in ((x, format_), (w, w_format))
        )
        x, w = (v + r - jax.lax.stop_gradient(v) for v, r in zip((x, w), rounded, strict=True))
        return x @ w.T + bias

    assert_same(gradient(product, x, w, bias), gradient(definition, x, w, bias), rtol=1e-4)


def test_stored_weights_give_x_the_gradient_of_what_they_stand_for_and_are_exact_in_scales():
    x, stored = normal(3, K), quantize(normal(N, K, seed=1))
    w = dequantize(stored)

    def product(x, scale):
        weight = dataclasses.replace(stored, scale=scale)
        return quartz_matmul(quantize(x, INT8), weight, out_dtype=jnp.float32)

    def definition(x, scale):
        rounded = x + jax.lax.stop_gradient(INT8(x) - x)
        return rounded @ (w / stored.scale * scale).T

    expected = gradient(definition, x, stored.scale)
    assert_same(gradient(product, x, stored.scale), expected)


def test_what_an_epilogue_adds_is_exact():
    x, stored = quantize(normal(4, K), INT8), quantize(normal(N, K, seed=1))
    arrays = {
        "bias": normal(N, seed=2),
        "gate": normal(N, seed=3),
        "residual": normal(4, N, seed=4),
        "branch": Branch(input=normal(4, 3, seed=5), up=normal(N, 3, seed=6)),
    }

    def product(arrays):
        return quartz_matmul(x, stored, activation="gelu", out_dtype=jnp.float32, **arrays)

    def definition(arrays):
        branch = arrays["branch"]
        y = dequantize(x) @ dequantize(stored).T + branch.input @ branch.up.T + arrays["bias"]
        return arrays["residual"] + arrays["gate"] * nnx.gelu(y, approximate=True)

    assert_same(gradient(product, arrays), gradient(definition, arrays), rtol=1e-4)


LAYERS = [(w, a) for w in (QUARTZ, NVFP4(), Quartz(scale_block=16)) for a in (None, INT8, NVFP4())]


@pytest.mark.parametrize(("weight", "activation"), LAYERS, ids=str)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_a_layer_s_gradient_does_not_depend_on_the_number_of_rows(weight, activation, rows):
    stored = weight.store(normal(N, K, seed=1))
    layer = QuantizedLinear(stored, nnx.Param(normal(N)), activation)
    x, w = normal(rows, K), dequantize(stored)
    assert_same(gradient(layer, x), gradient(lambda x: x @ w.T, x))


def test_a_bfloat16_layer_has_bfloat16_gradients():
    layer = QuantizedLinear(quantize(normal(N, K, seed=1)), None, None)
    w = dequantize(layer.weight.get_value())
    for rows in (2, 20):
        x = normal(rows, K).astype(jnp.bfloat16)
        (found,) = gradient(layer, x)
        assert found.dtype == jnp.bfloat16
        assert_same(found, gradient(lambda x: x.astype(jnp.float32) @ w.T, x)[0], rtol=2e-2)


def test_parts_norms_and_rotations_before_the_rounding_are_differentiated():
    x, shift, scale, factor = normal(4, 32), normal(16), 1 + normal(16, seed=1), normal(16, seed=2)

    def layer(x, shift, scale, factor):
        parts = (Part(array=x, start=0, size=8), Part(array=x, start=9, size=8, activation="gelu"))
        norm = Norm(shift=shift, scale=scale)
        rows = quantize_and_decode(parts, norm=norm, multiplier=factor, rotation=16)
        w = quantize(normal(N, 16, seed=3), INT8)
        return matmul(rows, w, Epilogue(out_dtype=jnp.float32))

    def definition(x, shift, scale, factor):
        joined = jnp.concatenate([x[:, :8], gelu_of_tanh(x[:, 9:17])], axis=1)
        centred = joined - joined.mean(1, keepdims=True)
        normed = centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) * scale + shift
        matrix = np.eye(4) * -2
        four = np.ones((4, 4)) + matrix[::-1]
        rotated = normed * factor @ jnp.float32(np.kron(four, four) / 4)
        return rotated @ dequantize(quantize(normal(N, 16, seed=3), INT8)).T

    given = (x, shift, scale, factor)
    assert_same(gradient(layer, *given), gradient(definition, *given), rtol=1e-4)


def test_gelu_of_large_inputs_has_a_finite_gradient():
    x = jnp.float32([[-1e4, -30.0, -13.0, 0.0, 13.0, 1e4]])
    (found,) = gradient(lambda x: join((Part(array=x, start=0, size=6, activation="gelu"),)), x)
    assert jnp.isfinite(found).all()
    stored = quantize(jnp.eye(6), INT8)
    for activation in (None, INT8, NVFP4()):
        layer = functools.partial(QuantizedLinear(stored, None, activation), activation="gelu")
        assert jnp.isfinite(gradient(layer, x)[0]).all()


def test_vmap_scan_and_checkpoint_of_a_gradient_are_the_gradient():
    x, w = normal(4, 3, K), quantize(normal(N, K, seed=1))

    def product(x):
        return quartz_matmul(quantize(x), w, out_dtype=jnp.float32)

    def loss(x):
        return jnp.sum(product(x) ** 2)

    expected = jnp.stack([jax.grad(loss)(part) for part in x])
    summed = lambda x: jax.lax.scan(lambda c, part: (c + loss(part), None), 0.0, x)[0]  # noqa: E731
    for found in (
        jax.vmap(jax.grad(loss))(x),
        jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x)))(x),
        jax.jit(jax.grad(summed))(x),
        jax.grad(jax.checkpoint(lambda x: jnp.sum(jax.vmap(loss)(x))))(x),
    ):
        assert_same(found, expected)


def test_forward_derivatives_are_those_of_the_values():
    x, w, direction = normal(3, K), quantize(normal(N, K, seed=1)), normal(3, K, seed=2)
    product = lambda x: quartz_matmul(quantize(x), w, out_dtype=jnp.float32)  # noqa: E731
    y, tangent = jax.jvp(product, (x,), (direction,))
    np.testing.assert_array_equal(y, product(x))
    np.testing.assert_allclose(tangent, direction @ dequantize(w).T, rtol=1e-4, atol=1e-5)


LOST = {
    "jit": lambda x: dequantize(jax.jit(quantize)(x)),
    "tree.map": lambda x: dequantize(jax.tree.map(lambda leaf: leaf, quantize(x))),
    "a product under jit": lambda x: jax.jit(quartz_matmul)(quantize(x), quantize(jnp.eye(K))),
    "the scale alone": lambda x: quantize(x, INT8).scale,
}


@pytest.mark.parametrize("lost", LOST)
def test_where_the_floats_are_lost_a_gradient_is_refused(lost):
    with pytest.raises(ValueError, match="quantize within the same function"):
        gradient(LOST[lost], normal(3, K))
    stopped = lambda x: LOST[lost](jax.lax.stop_gradient(x)) + x.sum()  # noqa: E731
    assert jnp.isfinite(gradient(stopped, normal(3, K))[0]).all()


def test_forward_derivatives_of_the_scale_alone_are_nan():
    x = normal(3, K)
    _, tangent = jax.jvp(LOST["the scale alone"], (x,), (x,))
    assert jnp.isnan(tangent).all()


def test_nothing_is_remembered_of_what_is_not_traced():
    assert quantize(normal(3, K)).source is None
    assert quantize_and_decode(normal(3, K)).source is None
    assert jax.jit(quantize)(normal(3, K)).source is None


def test_prepared_weights_have_no_gradient():
    chip = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    weight, x = quantize(normal(256, 256)), normal(20, 256)

    def run(weight, x):
        weight = place_weight(weight, expand=False)
        assert isinstance(weight, PreparedWeights)
        return gradient(QuantizedLinear(weight, None, INT8), x)

    mesh = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip))
    refused = pytest.raises(ValueError, match="weights prepared for 'mosaic_tpu' have no gradient")
    with mesh, refused:
        jax.eval_shape(run, weight, x)


def stream(qkv, d=16):
    return (Stream(qkv=qkv, query_scale=jnp.ones(d), key_scale=jnp.ones(d), epsilon=1e-6),)


def test_attention_in_8_bits_has_no_gradient():
    rope = jnp.stack([jnp.ones((4, 8)), jnp.zeros((4, 8))])
    qkv, heads = normal(1, 4, 3 * 32), normal(1, 4, 2, 16)
    with pytest.raises(ValueError, match="qk_norm_rope_8bit has no gradient; differentiate"):
        gradient(lambda qkv: qk_norm_rope_8bit(stream(qkv), rope, heads=2).q_scale, qkv)
    with pytest.raises(ValueError, match="quantize_heads has no gradient; differentiate"):
        gradient(lambda q: attention_int8_fp8(quantize_heads(q, heads, heads))[0], heads)


def test_norm_and_rotation_before_attention_have_a_gradient():
    rope = jnp.stack([jnp.full((4, 8), 0.6), jnp.full((4, 8), 0.8)])
    f = lambda qkv: jnp.concatenate(qk_norm_rope(stream(qkv), rope, heads=2))  # noqa: E731
    qkv, step = normal(1, 4, 3 * 32), 1e-2 * normal(1, 4, 3 * 32, seed=3)
    weights = normal(*f(qkv).shape, seed=9)
    slope = jnp.sum((f(qkv + step) - f(qkv - step)) * weights) / 2
    assert abs(slope - jnp.sum(gradient(f, qkv)[0] * step)) < 1e-3 * abs(slope)


@pytest.mark.parametrize("activation", [None, INT8, QUARTZ], ids=str)
@pytest.mark.parametrize("placed", [False, True])
def test_a_lora_learns_on_a_quantized_base(activation, placed):
    """What quantization took away comes back, and the base stays as it was."""
    target = build()(X)
    recipe = Recipe(name="test", rules=(rule(r"blocks\.\d+\.(up|down)", QUARTZ, activation),))
    model, _ = quantize_model(build(), recipe)
    model = place(model)[0] if placed else model
    before = jax.tree.leaves(nnx.state(model))
    for block in model.blocks:
        for name in ("up", "down"):
            base = getattr(block, name)
            adapted = nnx.LoRA(
                base.in_features, 8, base.out_features, base_module=base, rngs=nnx.Rngs(1)
            )
            setattr(block, name, adapted)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - target) ** 2)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    after = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
