"""Arrays on meshes, with explicit and automatic axes: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import INT8, QUARTZ, RECIPE, build
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models.linear import Part
from pallas_kernels.matmul import MATMUL, Epilogue, matmul
from pallas_kernels.quantize import quantize as quantize_and_decode
from quartz_jax import Int, Quartz, dequantize, quantize, quantize_model, quartz_matmul
from quartz_jax.conversion.model import quantize_layer
from quartz_jax.engine.linear import INT8 as EIGHT
from quartz_jax.formats import NVFP4
from quartz_jax.recipes import LayerRecipe

FORMATS = [QUARTZ, Quartz(scale_block=16), INT8, Int(width=8, range="minmax"), NVFP4()]
SPECS = [P("a"), P("a", "b"), P(None, ("a", "b"))]
K, N = 64, 16

kinds = pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda k: k.name)
specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, expected)


@kinds
@specs
@pytest.mark.parametrize("entered", [True, False])
def test_sharded_rows_and_k_give_the_numbers_of_one_device(kind, spec, entered):
    mesh, x, w = mesh_of(kind), normal(8, K), normal(N, K, seed=1)
    bias, residual = normal(N, seed=2), normal(8, N, seed=3)

    def run(x, w, residual):
        for format_ in FORMATS:
            stored = quantize(x, format_), quantize(w, QUARTZ)
            y = quartz_matmul(*stored, bias=bias, residual=residual, activation="gelu")
            yield stored, dequantize(stored[0]), y

    expected = list(run(x, w, residual))
    with jax.set_mesh(mesh) if entered else jax.disable_jit(False):
        given = put(mesh, x, spec), put(mesh, w, spec), put(mesh, residual, P(spec[0]))
        for found, wanted in zip(run(*given), expected, strict=True):
            assert_equal(found, wanted)
            assert entered or kind == AxisType.Auto or found[2].sharding.spec[0] == spec[0]


@kinds
@specs
def test_under_jit_and_with_more_leading_axes_too(kind, spec):
    mesh, x, w = mesh_of(kind), normal(4, 2, K), normal(N, K, seed=1)
    run = jax.jit(lambda x, w: quartz_matmul(quantize(x, INT8), quantize(w, QUARTZ)))
    given = put(mesh, x, P(spec[0], None, *spec[1:])), put(mesh, w, spec)
    with jax.set_mesh(mesh):
        assert_equal(run(*given), run(x, w))


@kinds
@specs
def test_the_pass_and_the_product_of_kernels_too(kind, spec):
    mesh, x, w = mesh_of(kind), normal(8, K), quantize(normal(N, K, seed=1))

    def run(x):
        rows = quantize_and_decode(x, rotation=16)
        return rows, matmul(rows, w, Epilogue(out_dtype=jnp.float32))

    with jax.set_mesh(mesh):
        assert_equal(run(put(mesh, x, spec)), run(x))


@kinds
@specs
def test_gradients_of_sharded_arrays(kind, spec):
    mesh, x, w = mesh_of(kind), normal(8, K), normal(N, K, seed=1)

    def loss(x, w):
        return jnp.sum(quartz_matmul(quantize(x), quantize(w), out_dtype=jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    with jax.set_mesh(mesh):
        found = gradient(put(mesh, x, spec), put(mesh, w, spec))
    # Only the order of float32 sums differs.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
        found,
        gradient(x, w),
    )


def shard(model, mesh, spec):
    """Put a model's kernels [k, n] onto a mesh, all else on each of its devices."""

    def placed(x):
        return put(mesh, x, P(*spec[::-1]) if x.ndim == 2 and len(spec) == 2 else P())

    nnx.update(model, jax.tree.map(placed, nnx.state(model)))
    return model


@kinds
@pytest.mark.parametrize("spec", [P("a", None), P("a", "b")], ids=str)
def test_a_sharded_model_is_quantized_to_the_same_codes_on_its_mesh(kind, spec):
    mesh = mesh_of(kind)
    expected, report = quantize_model(build(), RECIPE)
    with jax.set_mesh(mesh):
        found, other = quantize_model(shard(build(), mesh, spec), RECIPE)
    assert_equal(nnx.state(found), nnx.state(expected))
    assert [layer.path for layer in report.layers] == [layer.path for layer in other.layers]
    codes = found.blocks[0].up.weight.get_value().codes
    assert codes.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@kinds
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P(("a", "b"))], ids=str)
def test_a_quantized_layer_takes_sharded_inputs(kind, spec):
    mesh, x = mesh_of(kind), normal(4, 2, K)
    recipe = LayerRecipe(weight=QUARTZ, activation=EIGHT)
    linear = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    fitted, _ = quantize_layer("x", linear.kernel.get_value().T, linear.bias, recipe)
    layer = fitted.module(linear, recipe)
    parts = lambda x: (Part(array=x, size=K // 2), Part(array=x, start=K // 2, size=K // 2))  # noqa: E731
    around = {"gate": normal(4, 1, N), "residual": normal(4, 2, N), "activation": "gelu"}
    with jax.set_mesh(mesh):
        given = put(mesh, x, P(spec[0], None, *spec[1:]))
        assert_equal(layer(given, **around), layer(x, **around))
        assert_equal(layer(parts(given)), layer(parts(x)))


def test_where_xla_would_have_to_split_a_tpu_kernel_another_backend_runs():
    chip = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    x, w = quantize(normal(512, 512), INT8), quantize(normal(512, 512))
    for size, kind, first in (
        (1, AxisType.Auto, True),
        (2, AxisType.Auto, False),
        (2, AxisType.Manual, True),
    ):
        mesh = AbstractMesh((size,), ("x",), axis_types=(kind,), abstract_device=chip)
        with jax.sharding.use_abstract_mesh(mesh):
            chosen = MATMUL.choose(None, x, w, Epilogue()).name
            assert (chosen == "mosaic_tpu") == first
            if not first:
                assert "under jax.shard_map" in MATMUL.explain(x, w, Epilogue())
