"""quartz_matmul against integer sums, in every mix of operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec_oracle
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import quartz_jax
from pallas_kernels.matmul import PreparedWeights
from pallas_kernels.operands import Branch
from quartz_jax import Int, Quartz, dequantize, quantize
from quartz_jax.formats import IF4, MXFP4, NVFP4, SDR, FittedTable, HiF4, RaZeR, Table

STRETCHED = Quartz(step="integer", levels="stretched")
ACTIVATIONS = {
    "a4": Quartz(),
    "a4 asymmetric": Quartz(range="minmax"),
    "a4 stretched": STRETCHED,
    "a8": Int(width=8),
    "a8 asymmetric": Int(width=8, range="minmax"),
    "int4": Int(width=4),
    "groups of 128": Quartz(group_size=128),
}
WEIGHTS = {
    "w4": Quartz(),
    "w4 integer": Quartz(step="integer", search=True),
    "w4 stretched g8": Quartz(step="integer", levels="stretched", search=True, group_size=8),
    "w8": Int(width=8),
    "int4": Int(width=4),
    "table": Table(),
    "groups of 128": Quartz(group_size=128),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
every_backend = pytest.mark.parametrize("implementation", ["xla", "reference"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


matmul = jax.jit(quartz_jax.quartz_matmul, static_argnames=("out_dtype", "implementation"))
matmul_f32 = functools.partial(matmul, out_dtype=jnp.float32)


def expected(x, w):
    """Multiply the dequantized operands in float64, and bound the error of the float32 epilogue."""
    x, w = (np.asarray(dequantize(q), np.float64) for q in (x, w))
    return x @ w.T, 2.0**-20 * (np.abs(x) @ np.abs(w).T)


@every_backend
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    activation=st.sampled_from(list(ACTIVATIONS)),
    weight=st.sampled_from(list(WEIGHTS)),
)
def test_equals_the_matmul_of_dequantized_operands(implementation, activation, weight, seed):
    x = quantize(normal(2, 3, 37, seed=seed), ACTIVATIONS[activation])
    w = quantize(normal(5, 37, seed=seed + 1), WEIGHTS[weight])
    exact, bound = expected(x, w)
    assert (np.abs(matmul_f32(x, w, implementation=implementation) - exact) <= bound).all()


@every_backend
@given(
    activation=st.sampled_from(["a4", "a4 stretched", "a8"]),
    weight=st.sampled_from(["w4", "w4 integer", "w4 stretched g8", "w8"]),
    x=strategies.floats((3, 37)),
    w=strategies.floats((5, 37)),
)
def test_symmetric_products_are_the_exact_integers_times_both_scales(
    implementation, activation, weight, x, w
):
    # Powers of two as scales leave the epilogue exact, so that equality tests the integers.
    x = with_scale(quantize(x, ACTIVATIONS[activation]), 0.5)
    w = with_scale(quantize(w, WEIGHTS[weight]), 0.25)
    integers = spec_oracle.matmul_int(*map(np.asarray, map(quartz_jax.decode, (x, w))))
    y = matmul_f32(x, w, implementation=implementation)
    np.testing.assert_array_equal(y, integers.astype(np.float32) / 8)


def with_scale(q, scale):
    return type(q)(**{**vars(q), "scale": jnp.full_like(q.scale, scale)})


@every_backend
def test_integer_sums_are_exact_past_what_float32_holds(implementation):
    # 127 * 127 * 3000 = 48,387,000 > 2**24, and odd once the last product is changed.
    x, w = np.full((1, 3000), 127.0, np.float32), np.full((1, 3000), 127.0, np.float32)
    w[0, -1] = 126
    q = [with_scale(quantize(a, Int(width=8)), 1) for a in (x, w)]
    total = 127 * int(np.sum(np.asarray(q[1].values), dtype=np.int64))
    assert total % 2 == 1
    y = matmul(*q, out_dtype=jnp.float32, implementation=implementation)
    assert y[0, 0] == np.float32(total)


@every_backend
@every_activation
def test_bias_is_added_in_float32_before_the_cast(implementation, activation):
    x, w = quantize(normal(3, 40), activation), quantize(normal(5, 40, seed=1))
    bias = normal(5)
    y = matmul(x, w, bias=bias, implementation=implementation)
    plain = matmul(x, w, out_dtype=jnp.float32, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), plain + bias, rtol=2.0**-8)


FLOATS = [NVFP4(), NVFP4(block_max="4or6"), MXFP4(), RaZeR(), HiF4(), SDR(base=16), SDR()]
OTHERS = [IF4(), Int(block=16, scale="float16"), FittedTable(), Int(width=8)]


PAIRS = {(f, f) for f in FLOATS + OTHERS}
PAIRS |= {pair for f in FLOATS + OTHERS for pair in ((f, NVFP4()), (Int(width=8), f))}


@pytest.mark.parametrize(("x_format", "w_format"), sorted(PAIRS, key=str), ids=str)
def test_formats_without_kernels_equal_the_matmul_of_dequantized_operands(x_format, w_format):
    """In bfloat16 too, which holds both operands."""
    x, w = quantize(normal(2, 3, 37), x_format), quantize(normal(5, 37, seed=1), w_format)
    exact, bound = expected(x, w)
    found = quartz_jax.quartz_matmul(x, w, out_dtype=jnp.float32)
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize("format_", [Quartz(), NVFP4(), IF4(), Quartz(scale_block=16)], ids=str)
def test_the_epilogue_is_branch_bias_gelu_gate_and_residual_in_that_order(format_):
    x, w = quantize(normal(2, 3, 37), format_), quantize(normal(5, 37, seed=1), format_)
    bias, gate, residual = normal(5), normal(5, seed=2), normal(2, 3, 5, seed=3)
    branch = Branch(input=jnp.asarray(normal(6, 2)), up=jnp.asarray(normal(5, 2, seed=4)))
    found = quartz_jax.quartz_matmul(
        x,
        w,
        bias=bias,
        activation="gelu",
        gate=gate,
        residual=residual,
        branch=branch,
        out_dtype=jnp.float32,
    )
    inner = expected(x, w)[0] + (branch.input @ branch.up.T).reshape(2, 3, 5) + bias
    whole = residual + gate * np.asarray(jax.nn.gelu(inner, approximate=True))
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_format", [Int(width=4), SDR(), Int(width=8)], ids=str)
def test_int8_rows_beside_scale_blocks(x_format):
    blocks = Quartz(scale_block=16)
    for formats in ((x_format, blocks), (blocks, x_format)):
        x, w = quantize(normal(3, 37), formats[0]), quantize(normal(5, 37, seed=1), formats[1])
        exact, bound = expected(x, w)
        found = quartz_jax.quartz_matmul(x, w, out_dtype=jnp.float32)
        assert (np.abs(found - exact) <= 2 * bound).all()


@pytest.mark.parametrize("pair", [(NVFP4(), NVFP4()), (Int(width=8), NVFP4())], ids=str)
def test_a_named_backend_for_formats_without_kernels_is_refused(pair):
    x, w = quantize(normal(3, 40), pair[0]), quantize(normal(5, 40), pair[1])
    with pytest.raises(ValueError, match=r"implementation is 'xla', but .* have no kernels"):
        quartz_jax.quartz_matmul(x, w, implementation="xla")


@pytest.mark.parametrize("blocks", [("x",), ("w",), ("x", "w")])
@pytest.mark.parametrize("range_", ["absmax", "minmax"])
@given(seed=st.integers(0, 2**32 - 1))
def test_scale_blocks_equal_the_matmul_of_dequantized_operands(blocks, range_, seed):
    block = dict.fromkeys(blocks, 32)
    x = quantize(normal(3, 70, seed=seed), Quartz(range=range_, scale_block=block.get("x")))
    w = quantize(normal(5, 70, seed=seed + 1), Quartz(scale_block=block.get("w")))
    exact, bound = expected(x, w)
    y = matmul_f32(x, w, bias=jnp.ones(5))
    assert (np.abs(y - 1 - exact) <= bound + 2.0**-22 * (1 + np.abs(exact))).all()


def test_weights_quantized_along_their_first_axis_multiply_as_their_transpose():
    w = normal(5, 40, seed=1)
    for format_ in (Quartz(), NVFP4()):
        x = quantize(normal(3, 40), format_)
        np.testing.assert_array_equal(
            quartz_jax.quartz_matmul(x, quantize(w.T, axis=0)),
            quartz_jax.quartz_matmul(x, quantize(w)),
        )


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 1, 3)])
def test_any_leading_axes_of_x_are_kept(lead):
    x, w = quantize(normal(*lead, 1)), quantize(normal(5, 1))
    assert matmul(x, w).shape == (*lead, 5)


@every_activation
def test_vmap_and_jit_equal_the_whole(activation):
    x, w = quantize(normal(4, 3, 40), activation), quantize(normal(5, 40, seed=1))
    whole = matmul(x, w)
    mapped = jax.jit(jax.vmap(quartz_jax.quartz_matmul, in_axes=(0, None)))(x, w)
    np.testing.assert_array_equal(mapped, whole)


@every_activation
@every_weight
def test_shard_map_over_output_channels_equals_the_whole(activation, weight):
    x, w = quantize(normal(3, 40), activation), quantize(normal(6, 40, seed=1), weight)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("n",))
    sharded = jax.shard_map(
        quartz_jax.quartz_matmul, mesh=mesh, in_specs=(P(), P("n")), out_specs=P(None, "n")
    )
    np.testing.assert_array_equal(jax.jit(sharded)(x, w), matmul(x, w))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@every_backend
@pytest.mark.parametrize(
    "activation", [a for a in ACTIVATIONS.values() if a != Int(width=4)], ids=str
)
def test_a_bad_activation_row_is_nan_even_against_zero_weights(activation, implementation, bad):
    x = normal(3, 40)
    x[1, 0] = bad
    w = quantize(np.zeros((5, 40), np.float32))
    y = matmul(quantize(x, activation), w, implementation=implementation)
    assert jnp.isnan(y[1]).all() and (y[jnp.array([0, 2])] == 0).all()


PREPARED = PreparedWeights(arrays=None, implementation="mosaic_tpu", n=5, k=40, bits=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": normal(3, 40)}, "x is a ndarray; quantize it first"),
        ({"w": quantize(normal(5, 48))}, "k=40 and w"),
        ({"w": quantize(normal(40))}, "w has shape"),
        ({"w": quantize(normal(5, 40), Quartz(range="minmax"))}, "asymmetric"),
        ({"w": quantize(normal(5, 40), Quartz(scale_block=16))}, "scale_block"),
        ({"bias": jnp.ones(4)}, "bias has shape"),
        ({"implementation": "abacus"}, "unknown implementation 'abacus'"),
        (
            {"x": quantize(normal(3, 40), Int(width=8)), "w": PREPARED, "implementation": "xla"},
            "implementation is 'xla', but w is prepared for 'mosaic_tpu'",
        ),
    ],
)
def test_operands_that_do_not_agree_are_refused(change, message):
    call = {
        "x": quantize(normal(3, 40), Quartz(scale_block=32)),
        "w": quantize(normal(5, 40)),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        quartz_jax.quartz_matmul(call.pop("x"), call.pop("w"), **call)
