"""Methods against small direct implementations, and what calibration changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import X, build, poison
from flax import nnx

from quartz_jax.formats import MXFP4, NVFP4, SDR, Int, Quartz
from quartz_jax.methods import (
    Gptq,
    LayerMethod,
    LowRank,
    Method,
    MethodRule,
    ReverseSmooth,
    Rotate,
    Shift,
    SimulatedLinear,
    Smooth,
    get_method,
    load_statistics,
    record,
    save_statistics,
    simulate_model,
    split_names,
)
from quartz_jax.methods.simulate import bits_per_weight, simulate_linear
from quartz_jax.recipes.names import BENCH, FORMATS
from quartz_jax.transforms.transforms import hadamard

INT4 = Int(width=4, block=16)
N, K = 24, 64


def rows_of(seed, samples=256, k=K):
    """Correlated inputs with a few large channels, float32 [samples, k]."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(k, k)) * np.exp(rng.normal(size=k))
    return jnp.asarray(rng.normal(size=(samples, k)) @ mixing / k, jnp.float32)


def weight_of(seed, n=N, k=K):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, k)), jnp.float32)


def gptq_directly(weight, rows, damping, quantize_column):
    """One row at a time and one column after the other, by the paper's update, in float64."""
    w, x = np.array(weight, np.float64), np.asarray(rows, np.float64)
    h = x.T @ x / len(x)
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    out = np.zeros_like(w)
    inverse = np.linalg.inv(h)
    for j in range(w.shape[1]):
        out[:, j] = quantize_column(w, j)
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        # the inverse Hessian without column j: one step of Gaussian elimination
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return out


def test_gptq_is_the_paper_s_column_by_column_update():
    weight, rows, block = weight_of(0), rows_of(1), 16
    scales = {}

    def column(w, j):
        if j % block == 0:
            scales["s"] = np.abs(w[:, j : j + block]).max(1) / 7
        return np.clip(np.round(w[:, j] / scales["s"]), -7, 7) * scales["s"]

    expected = gptq_directly(weight, rows, 0.01, column)
    got = np.asarray(Gptq()(weight, rows, INT4))
    # float32 against float64: a code may tip over where a weight lies halfway; they are rare
    assert np.mean(~np.isclose(got, expected, rtol=1e-3, atol=1e-4)) < 0.02


GPTQ_FORMATS = [
    Int(width=4),
    INT4,
    MXFP4(),
    NVFP4(),
    SDR(),
    Quartz(),
    Quartz(step="integer", search=True),
    Quartz(group_size=16, scale_block=32),
]


@pytest.mark.parametrize("format_", GPTQ_FORMATS, ids=str)
def test_gptq_lowers_the_output_error_of_every_format(format_):
    weight, rows = weight_of(2), rows_of(3)

    def error(stored):
        return float(jnp.linalg.norm(rows @ (stored - weight).T))

    assert error(Gptq()(weight, rows, format_)) < 0.9 * error(format_(weight))


@pytest.mark.parametrize("format_", [INT4, MXFP4(), Quartz(scale_block=32)], ids=str)
def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest(format_):
    weight = weight_of(4)
    np.testing.assert_allclose(
        Gptq()(weight, jnp.eye(K) * 8, format_), format_(weight), rtol=1e-5, atol=1e-6
    )


def test_gptq_weights_are_values_of_the_format():
    stored = Gptq()(weight_of(5), rows_of(6), MXFP4())
    assert (MXFP4()(stored) == stored).all()


def linear_of(weight, bias=None):
    linear = nnx.Linear(weight.shape[1], weight.shape[0], rngs=nnx.Rngs(0))
    linear.kernel.set_value(weight.T.astype(jnp.bfloat16).astype(jnp.float32))
    if bias is not None:
        linear.bias.set_value(bias)
    return linear


def statistics_of(rows):
    model = nnx.Sequential(linear_of(weight_of(0, N, rows.shape[1])))
    return record(model, lambda m: m(rows), rows_per_call=len(rows))["layers.0"]


def svdquant_directly(weight, rows, rank):
    """Smoothing grid, truncated SVD, re-decomposition while the output error falls; float64."""
    w, x = np.asarray(weight, np.float64), np.asarray(rows, np.float64)
    q = lambda t: np.asarray(INT4(jnp.asarray(t, jnp.float32)), np.float64)  # noqa: E731

    def decompose(target):
        u, s, v = np.linalg.svd(target, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]

    def error(x, residual):
        return np.sum((x @ residual.T - q(x) @ q(residual).T) ** 2)

    best = None
    for alpha in np.arange(1, 21) / 20:
        factor = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha)
        e = error(x / factor, w * factor - decompose(w * factor))
        best = min(best or (np.inf,), (e, alpha, factor), key=lambda t: t[0])
    _, alpha, factor = best
    w, x, target, least = w * factor, x / factor, w * factor, np.inf
    for _ in range(100):
        branch = decompose(target)
        e = error(x, w - branch)
        if e >= least:
            break
        least, target, kept = e, w - q(w - branch), branch
    return alpha, q(x) @ q(w - kept).T + x @ kept.T, least


def test_svdquant_is_the_direct_implementation():
    rows, rank = rows_of(7), 4
    linear = linear_of(weight_of(8))
    weight = linear.kernel.get_value().T
    method = LayerMethod(weight=INT4, activation=INT4, transforms=(Smooth(), LowRank(rank=rank)))
    layer, _ = simulate_linear("x", linear, method, statistics_of(rows))
    alpha, expected, least = svdquant_directly(weight, rows, rank)
    factor = np.abs(rows).max(0) ** alpha / np.abs(weight).max(0) ** (1 - alpha)
    np.testing.assert_allclose(layer.steps[0].factor.get_value(), factor, rtol=1e-4)
    # The branch is stored in bfloat16 here, so that outputs agree to its precision and the error
    # that the search ends with is the same to some per cent.
    exact = np.asarray(rows @ weight.T)
    got = np.asarray(layer.product(rows))
    assert np.linalg.norm(got - expected) < 0.5 * np.linalg.norm(expected - exact)
    assert np.sum((got - exact) ** 2) == pytest.approx(least, rel=0.15)


@pytest.mark.parametrize(
    "transforms",
    [
        (Shift(),),
        (Smooth(),),
        (Smooth(alpha=0.5),),
        (ReverseSmooth(beta=0.7),),
        (Rotate(block=16),),
        (Rotate(regular=False),),
        (LowRank(rank=3),),
        (Shift(), Smooth(), Rotate(), LowRank(rank=3)),
    ],
    ids=lambda t: "+".join(type(x).__name__ for x in t),
)
def test_transforms_leave_the_exact_output_alone(transforms):
    rows, linear = rows_of(9), linear_of(weight_of(10), jnp.arange(N, dtype=jnp.float32))
    fine = Int(width=8, block=1)  # a scale for every weight: all but exact
    method = LayerMethod(weight=fine, transforms=transforms)
    layer, report = simulate_linear("x", linear, method, statistics_of(rows))
    np.testing.assert_allclose(layer(rows), linear(rows), rtol=1e-4, atol=1e-4)
    assert report.relative_error < 1e-4


@pytest.mark.parametrize("regular", [True, False])
def test_hadamard_blocks_are_orthogonal_and_regular_rows_have_one_sum(regular):
    matrix = hadamard(64, regular)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-6)
    assert (np.abs(matrix) == 1 / 8).all()
    assert np.ptp(matrix.sum(1)) < 1e-6 if regular else np.ptp(matrix.sum(1)) > 7


def small_method(**fields):
    fields = {"weight": INT4, "activation": INT4} | fields
    rules = (MethodRule(pattern=r"blocks\.\d+\.(up|down)", method=LayerMethod(**fields)),)
    return Method(name="test", rules=rules)


def test_calibration_changes_the_result():
    model, method = build(), small_method(transforms=(Smooth(),), rounding=Gptq())
    outputs = []
    for inputs in (X, X[:, ::-1] * jnp.linspace(0.1, 10, X.shape[1])):
        seen = record(model, lambda m, inputs=inputs: m(inputs))
        outputs.append(simulate_model(model, method, seen)[0](X))
    assert not jnp.allclose(*outputs, rtol=1e-2)


def test_recording_sees_what_each_linear_is_given_under_jit():
    model = build()
    seen = record(model, lambda m: nnx.jit(lambda m, x: m(x))(m, X), rows_per_call=3)
    normed = model.blocks[0].norm(model.embed(X))
    np.testing.assert_allclose(seen["embed"].absmax, jnp.abs(X).max(0), rtol=1e-6)
    np.testing.assert_allclose(seen["blocks.0.up"].rows[0], normed[jnp.array([0, 2, 4])], rtol=1e-5)


def test_a_linear_that_never_runs_is_named():
    with pytest.raises(ValueError, match=r"recorded for blocks\.0\.down, blocks\.0\.up"):
        record(build(), lambda model: None)


def test_statistics_survive_their_file(tmp_path):
    seen = record(build(), lambda m: m(X))
    save_statistics(tmp_path / "s.npz", seen)
    loaded = load_statistics(tmp_path / "s.npz")
    assert loaded.keys() == seen.keys()
    assert all((loaded[name].rows == seen[name].rows).all() for name in seen)
    (tmp_path / "s.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="holds no recorded statistics"):
        load_statistics(tmp_path / "s.npz")


def test_the_given_model_is_untouched_and_other_linears_stay():
    model = build()
    before = model(X)
    simulated, report = simulate_model(model, small_method())
    assert (model(X) == before).all()
    assert isinstance(simulated.blocks[1].down, SimulatedLinear)
    assert isinstance(simulated.embed, nnx.Linear)
    assert report.layers[0].path == "blocks.0.down"
    assert report.weight_bits == pytest.approx(INT4.bits(32), abs=0.02)


def test_what_is_rounded_is_computed_once():
    """On GPUs XLA would compute it anew for scale, step and rounding, which then disagree."""
    linear, activation = SimulatedLinear(weight_of(0), None, [], INT4), INT4
    program = jax.make_jaxpr(lambda x: linear(jnp.sin(x)))(rows_of(1))
    names = [equation.primitive.name for equation in program.eqns]
    rounding = jax.make_jaxpr(activation)(rows_of(1)).eqns[0].primitive.name
    barrier = names.index("optimization_barrier")
    assert names.index("sin") < barrier < names.index(rounding)


def test_a_branch_is_counted_in_the_bits():
    method = LayerMethod(weight=Int(width=4, block=64), transforms=(LowRank(rank=32),))
    assert bits_per_weight(method, 3072, 3072) == pytest.approx(4.5 + 16 * 32 * 2 / 3072)


@pytest.mark.parametrize("name", split_names(BENCH))
def test_methods_of_the_bench_have_rules_for_every_linear_and_survive_json(name):
    method = get_method(name)
    assert len(method.rules) == 4
    assert Method.from_json(method.to_json()) == method


def test_names_compose():
    method = get_method("rotate+gptq+int4-g64/nvfp4").rules[-1].method
    assert method == LayerMethod(
        weight=FORMATS["int4-g64"].weight,
        activation=NVFP4(),
        transforms=(Rotate(),),
        rounding=Gptq(),
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: get_method("smooth+int5"), "unknown recipe 'smooth\\+int5': 'int5' is none of"),
        (lambda: get_method("spin+nvfp4"), "'spin' is none of"),
        (lambda: simulate_model(build(), small_method(rounding=Gptq())), "is calibrated; give it"),
        (lambda: simulate_model(poison(build()), small_method()), r"blocks\.1\.up holds NaN"),
        (lambda: simulate_model(build(), get_method("mxfp4")), "matches no linear"),
        (lambda: Gptq(damping=0), "damping is 0"),
        (lambda: Smooth(alpha=2), "alpha is 2"),
        (lambda: LayerMethod(weight=None), "weight is None"),
        (lambda: Method.from_json([]), "a method is a JSON object"),
    ],
)
def test_bad_input_is_one_clear_line(call, named):
    with pytest.raises(ValueError, match=named):
        call()
