"""Quantized tensors as pytrees: metadata, sizes and JAX's transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from quartz_jax.formats import IF4, BlockRows, FittedTable, HiF4, Int, Quartz, Table
from quartz_jax.formats.storage import decode, dequantize, quantize

X = np.random.default_rng(0).standard_normal((4, 6, 40)).astype(np.float32)
TENSORS = {
    "power": lambda x: quantize(x),
    "other axis": lambda x: quantize(x, axis=-2),
    "minmax": lambda x: quantize(x, Quartz(range="minmax", scale_block=16)),
    "search": lambda x: quantize(x, Quartz(step="integer", levels="stretched", search=True)),
    "int8": lambda x: quantize(x, Int(width=8, range="minmax")),
    "int4": lambda x: quantize(x, Int()),
    "table": lambda x: quantize(x, Table()),
    "fitted table": lambda x: quantize(x, FittedTable()),
    "if4": lambda x: quantize(x, IF4()),
    "hif4": lambda x: quantize(x, HiF4()),
}
every_tensor = pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)


@every_tensor
def test_vmap_equals_the_whole(make):
    q = jax.vmap(make)(X)
    assert q.shape == X.shape
    chex.assert_trees_all_equal(q, make(X))
    chex.assert_trees_all_equal(jax.vmap(dequantize)(q), dequantize(q))
    if not isinstance(q, BlockRows):
        chex.assert_trees_all_equal(jax.vmap(decode)(q), decode(q))


@every_tensor
def test_shard_map_equals_the_whole(make):
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))

    def both(x):
        q = make(x)
        return q, dequantize(q)

    sharded = jax.shard_map(both, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    chex.assert_trees_all_equal(jax.jit(sharded)(X), jax.jit(both)(X))


def test_codes_sharded_along_the_contraction_axis_decode_to_their_part():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
    q = quantize(X[0, :, :32].repeat(2, axis=1))
    specs = jax.tree_util.tree_unflatten(
        jax.tree.structure(q), [P(None, "x"), P(None, "x"), P(None, None)]
    )
    sharded = jax.shard_map(decode, mesh=mesh, in_specs=(specs,), out_specs=P(None, "x"))
    np.testing.assert_array_equal(sharded(q), decode(q))


@every_tensor
def test_scan_slices_the_leading_axis(make):
    q = make(X)
    _, rows = jax.lax.scan(lambda carry, row: (carry, dequantize(row)), None, q)
    np.testing.assert_array_equal(rows, dequantize(q))


@every_tensor
def test_tensors_pass_through_jit_unchanged(make):
    q = make(X)
    chex.assert_trees_all_equal(jax.jit(lambda q: q)(q), q)


@every_tensor
def test_tensors_live_in_the_state_of_modules(make):
    class Holder(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(make(X))

    graphdef, state = nnx.split(Holder())
    restored = nnx.jit(lambda module: module.weight.get_value())(nnx.merge(graphdef, state))
    chex.assert_trees_all_equal(restored, make(X))


@every_tensor
def test_nbytes_counts_every_stored_array(make):
    q = make(X)
    assert q.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))


@every_tensor
def test_sizes_are_known_without_data(make):
    abstract = jax.eval_shape(make, X)
    assert abstract.shape == X.shape
    assert abstract.nbytes == make(X).nbytes


@pytest.mark.parametrize(("group_size", "bits"), [(16, 4.25), (32, 4.125), (64, 4.0625)])
def test_bits_per_element_are_four_and_a_shift_a_group_and_a_scale_a_row(group_size, bits):
    q = quantize(jnp.ones((2, 1024)), Quartz(group_size=group_size))
    assert q.bits_per_element == bits + 32 / 1024


def test_axis_is_stored_negative():
    assert quantize(X, axis=1).axis == -2


def test_equal_metadata_means_one_compilation():
    traces = []

    @jax.jit
    def traced(q):
        traces.append(q)
        return decode(q)

    traced(quantize(X))
    traced(quantize(X + 1, Quartz(group_size=16)))
    assert len(traces) == 1
