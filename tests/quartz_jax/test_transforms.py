"""What holds of every registered transform, behind any others; a new one is tested by being here.

Chains are fitted eagerly, where each operation is compiled once for all of them. So their members
have forms without a search or a loop, which change no tree and not what is exact; the searching
forms are traced, and fitted in `test_methods.py`.
"""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import K, layer_of, seen_of, weight_of

from quartz_jax import schema
from quartz_jax.formats import Int, Quartz
from quartz_jax.formats.storage import dequantize
from quartz_jax.recipes import LayerRecipe
from quartz_jax.rounding import Rounding
from quartz_jax.transforms import (
    LowRank,
    Offset,
    ResidualChannels,
    ReverseSmooth,
    Rotate,
    Smooth,
    Transform,
    run_ops,
)

# Instead of defaults: sizes for a small layer, and no search.
FORMS = {
    "LowRank": LowRank(rank=3, iterations=1),
    "ResidualChannels": ResidualChannels(count=3),
    "ReverseSmooth": ReverseSmooth(beta=0.5),
    "Rotate": Rotate(block=16),
    "Smooth": Smooth(alpha=0.5),
}
SEARCHING = {"LowRank": LowRank(rank=3), "ReverseSmooth": ReverseSmooth(), "Smooth": Smooth()}
TRANSFORMS = {name: FORMS.get(name) or cls() for name, cls in schema.parts(Transform).items()}
ROUNDINGS = {name: cls() for name, cls in schema.parts(Rounding).items()}
CHAINS = [c for size in range(4) for c in itertools.permutations(TRANSFORMS, size)]
LAST = {name: [c for c in CHAINS if c[-1:] == (name,)] for name in TRANSFORMS}
STRETCHED = Quartz(step="integer", levels="stretched", search=True)
LAYER = layer_of(0)

every_last = pytest.mark.parametrize("last", TRANSFORMS)


def recipe(chain, **fields):
    transforms = tuple(TRANSFORMS[name] for name in chain)
    return LayerRecipe(
        **{"weight": STRETCHED, "activation": Int(width=8), "transforms": transforms} | fields
    )


@functools.cache
def fitted(chain):
    """The layer behind a chain; one that is a transform longer is fitted to it."""
    if not chain:
        return LAYER
    return TRANSFORMS[chain[-1]].fit(fitted(chain[:-1]), recipe(()))


def tree(value):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), value)


def relative(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def test_every_transform_and_rounding_is_here():
    assert {"Smooth", "ReverseSmooth", "Rotate", "Shift", "LowRank", "Sort"} <= TRANSFORMS.keys()
    assert {"Gptq", "Nearest"} <= ROUNDINGS.keys()
    assert len(CHAINS) >= 1 + 7 + 7 * 6 + 7 * 6 * 5


def test_a_recipe_fits_its_transforms_in_their_order():
    chain = ("Shift", "Smooth", "Rotate")
    found = recipe(chain).fit(LAYER)
    jax.tree.map(np.testing.assert_array_equal, found, fitted(chain))


@every_last
def test_a_transform_is_exact_before_rounding_behind_any_others(last):
    rows = LAYER.seen.rows
    exact = LAYER(rows)
    for chain in LAST[last]:
        # Float32's rounding, a few times over; a low-rank branch is taken off as it is stored.
        # Channels are taken out in bfloat16, exact of weights that nothing multiplied before.
        kept = chain[: chain.index("ResidualChannels")] if "ResidualChannels" in chain else ()
        bound = 2**-16 if set(kept) <= {"Sort", "Shift"} else 2**-9
        assert relative(fitted(chain)(rows), exact) < bound, chain


@every_last
def test_statistics_behind_any_ops_are_those_of_what_they_make_of_the_rows(last):
    for chain in LAST[last]:
        layer = fitted(chain)
        expected = seen_of(run_ops(layer.ops, LAYER.seen.rows)[0])
        largest = float(expected.absmax.max())
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, err_msg=str(chain))
        close(layer.seen.rows, expected.rows, atol=1e-5 * largest)
        close(layer.seen.mean, expected.mean, atol=1e-5 * largest)
        close(layer.seen.gram, expected.gram, atol=1e-5 * largest**2)
        assert (layer.seen.absmax >= expected.absmax * (1 - 1e-5)).all(), chain
        if not any(isinstance(op, Offset) for op in layer.ops):  # knows the sign of no maximum
            close(layer.seen.absmax, expected.absmax, atol=1e-5 * largest)


@every_last
def test_statistics_without_rows_are_the_same_and_maxima_bounds(last):
    op = fitted((last,)).ops[0]
    seen = LAYER.seen
    whole = op.see(seen)
    apart = op.see(type(seen)(absmax=seen.absmax, mean=seen.mean, gram=seen.gram))
    assert apart.rows is None
    np.testing.assert_array_equal(apart.mean, whole.mean)
    np.testing.assert_array_equal(apart.gram, whole.gram)
    assert (apart.absmax >= whole.absmax * (1 - 1e-6)).all()
    assert not op.see(type(seen)()).needs


@every_last
def test_back_is_the_transpose_of_an_op(last):
    op, behind = fitted((last,)).ops[0], weight_of(5)
    x = jax.random.normal(jax.random.key(0), (7, K))
    moved = op(x)[0] - op(jnp.zeros_like(x))[0]  # the linear part alone
    np.testing.assert_allclose(moved @ behind.T, x @ op.back(behind).T, rtol=1e-4, atol=1e-4)


@every_last
def test_shapes_known_without_data_are_those_of_the_fitted_layer(last):
    for chain in LAST[last]:
        transform = TRANSFORMS[chain[-1]]
        found = jax.eval_shape(lambda x, t=transform: t.fit(x, recipe(())), fitted(chain[:-1]))
        assert tree(found) == tree(fitted(chain)), chain


@pytest.mark.parametrize("searching", SEARCHING)
def test_a_search_is_traceable_behind_and_before_others_and_changes_no_shape(searching):
    for other in TRANSFORMS.keys() - {searching}:
        for chain in ((searching, other), (other, searching)):
            steps = tuple(SEARCHING.get(name, TRANSFORMS[name]) for name in chain)
            found = jax.eval_shape(recipe((), transforms=steps).fit, LAYER)
            assert tree(found) == tree(fitted(chain)), chain


@pytest.mark.parametrize("rounding", ROUNDINGS)
@every_last
def test_every_rounding_stores_what_any_chain_made(last, rounding):
    step = recipe((), rounding=ROUNDINGS[rounding])
    expected = tree(jax.eval_shape(step.store, LAYER))
    for chain in LAST[last]:
        layer = fitted(chain)
        stored = step.store(layer)
        assert tree(stored) == expected, chain
        # 4 bits; GPTQ errs more in the weights, for less in the outputs
        assert relative(dequantize(stored), layer.weight) < (0.12 if rounding == "Nearest" else 1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_chain_survives_json(rounding):
    for chain in CHAINS:
        step = recipe(chain, rounding=ROUNDINGS[rounding])
        assert schema.from_json(LayerRecipe, json.loads(json.dumps(schema.to_json(step)))) == step


@every_last
def test_a_transform_reads_no_more_than_it_says_it_needs(last):
    for transform in {TRANSFORMS[last], SEARCHING.get(last, TRANSFORMS[last])}:
        needs = recipe((), transforms=(transform,)).needs
        seen = type(LAYER.seen)(**{name: getattr(LAYER.seen, name) for name in needs})
        bare = type(LAYER)(weight=LAYER.weight, seen=seen)
        jax.eval_shape(recipe((), transforms=(transform,)).fit, bare)


@pytest.mark.parametrize("second", ["Rotate", "Smooth", "Sort", "Shift", "ResidualChannels"])
def test_defect_1_a_branch_sees_the_input_where_it_was_fitted(second):
    """A low-rank branch that saw the input behind a later step made garbage of 8-bit weights."""
    rows, step = LAYER.seen.rows, recipe((), weight=Int(width=8))
    for chain in (("LowRank", second), (second, "LowRank")):
        layer = fitted(chain)
        given, added = run_ops(layer.ops, rows)
        y = given @ dequantize(step.store(layer)).T + added + layer.bias
        assert relative(y, LAYER(rows)) < 0.01


def test_defect_7_what_a_transform_needs_is_asked_for_by_itself():
    """Needs were looked up in a list of class names, so that a new class never got its rows."""

    class Needy(Transform):
        needs = frozenset({"rows"})

        def fit(self, layer, rest):
            assert layer.seen.rows is not None
            return layer

    assert recipe((), transforms=(Needy(),)).needs == {"rows"}
