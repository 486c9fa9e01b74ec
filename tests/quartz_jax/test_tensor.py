"""Quantized tensors as pytrees: metadata, sizes and JAX's transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import quartz_jax
from quartz_jax import QuartzConfig

X = np.random.default_rng(0).standard_normal((4, 6, 40)).astype(np.float32)
TENSORS = {
    "power": lambda x: quartz_jax.quantize(x),
    "other axis": lambda x: quartz_jax.quantize(x, axis=-2),
    "minmax": lambda x: quartz_jax.quantize(x, QuartzConfig(range="minmax", scale_block=16)),
    "search": lambda x: quartz_jax.quantize(x, QuartzConfig(step="integer"), search=True),
    "int8": lambda x: quartz_jax.quantize_int(x, range="minmax"),
    "int4": lambda x: quartz_jax.quantize_int(x, bits=4),
}
every_tensor = pytest.mark.parametrize("quantize", TENSORS.values(), ids=TENSORS)


@every_tensor
def test_vmap_equals_the_whole(quantize):
    q = jax.vmap(quantize)(X)
    assert q.shape == X.shape
    chex.assert_trees_all_equal(q, quantize(X))
    chex.assert_trees_all_equal(jax.vmap(quartz_jax.decode)(q), quartz_jax.decode(q))


@every_tensor
def test_shard_map_equals_the_whole(quantize):
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))

    def both(x):
        q = quantize(x)
        return q, quartz_jax.dequantize(q)

    sharded = jax.shard_map(both, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    chex.assert_trees_all_equal(jax.jit(sharded)(X), jax.jit(both)(X))


def test_codes_sharded_along_the_contraction_axis_decode_to_their_part():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
    q = quartz_jax.quantize(X[0, :, :32].repeat(2, axis=1))
    specs = jax.tree_util.tree_unflatten(
        jax.tree.structure(q), [P(None, "x"), P(None, "x"), P(None, None)]
    )
    decode = jax.shard_map(quartz_jax.decode, mesh=mesh, in_specs=(specs,), out_specs=P(None, "x"))
    np.testing.assert_array_equal(decode(q), quartz_jax.decode(q))


@every_tensor
def test_scan_slices_the_leading_axis(quantize):
    q = quantize(X)
    _, rows = jax.lax.scan(lambda carry, row: (carry, quartz_jax.dequantize(row)), None, q)
    np.testing.assert_array_equal(rows, quartz_jax.dequantize(q))


@every_tensor
def test_tensors_pass_through_jit_unchanged(quantize):
    q = quantize(X)
    chex.assert_trees_all_equal(jax.jit(lambda q: q)(q), q)


@every_tensor
def test_tensors_live_in_the_state_of_modules(quantize):
    class Holder(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(quantize(X))

    graphdef, state = nnx.split(Holder())
    restored = nnx.jit(lambda module: module.weight.get_value())(nnx.merge(graphdef, state))
    chex.assert_trees_all_equal(restored, quantize(X))


@every_tensor
def test_nbytes_counts_every_stored_array(quantize):
    q = quantize(X)
    assert q.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))


@every_tensor
def test_sizes_are_known_without_data(quantize):
    abstract = jax.eval_shape(quantize, X)
    assert abstract.shape == X.shape
    assert abstract.nbytes == quantize(X).nbytes


@pytest.mark.parametrize(("group_size", "bits"), [(16, 4.25), (32, 4.125), (64, 4.0625)])
def test_bits_per_element_are_four_and_a_shift_a_group_and_a_scale_a_row(group_size, bits):
    q = quartz_jax.quantize(jnp.ones((2, 1024)), QuartzConfig(group_size=group_size))
    assert q.bits_per_element == bits + 32 / 1024


def test_axis_is_stored_negative():
    assert quartz_jax.quantize(X, axis=1).axis == -2


def test_equal_metadata_means_one_compilation():
    traces = []

    @jax.jit
    def decode(q):
        traces.append(q)
        return quartz_jax.decode(q)

    decode(quartz_jax.quantize(X))
    decode(quartz_jax.quantize(X + 1, QuartzConfig(group_size=16)))
    assert len(traces) == 1
