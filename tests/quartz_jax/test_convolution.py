"""Quantized convolutions: integers against an oracle, floats against the definition of a layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models.convolution import Conv
from pallas_kernels import device
from pallas_kernels.windows import Window
from quartz_jax import (
    Int,
    LayerRecipe,
    Match,
    Quartz,
    Recipe,
    Rule,
    dequantize,
    get_recipe,
    load_model,
    observe,
    place,
    quantize_model,
    save_model,
    sites,
)
from quartz_jax.engine.convolution import QuantizedConv
from quartz_jax.engine.linear import QuantizedLinear
from quartz_jax.formats import NVFP4
from quartz_jax.transforms import LowRank, Rotate, Smooth

INT8 = Int(width=8)
SEARCHED = Quartz(step="integer", levels="stretched", search=True)
STRETCHED = Quartz(step="integer", levels="stretched")
B, H, W, C, N = 2, 6, 5, 16, 8


def images(seed=0, shape=(B, H, W, C), dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])), dtype)


class Net(nnx.Module):
    """A convolution of each kind that UNets have, and a linear."""

    def __init__(self, rngs, c=C, n=N):
        self.first = Conv(3, c, 3, role="embed", rngs=rngs)
        self.plain = Conv(c, c, 3, role="conv", rngs=rngs)
        self.down = Conv(c, n, 3, strides=2, role="resample", rngs=rngs)
        self.shortcut = Conv(n, 2 * c, 1, use_bias=False, role="shortcut", rngs=rngs)
        self.last = nnx.Linear(2 * c, 4, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = self.plain(nnx.silu(x), residual=x)
        return self.last(self.shortcut(self.down(x)))


def net(config=None):
    return Net(nnx.Rngs(0))


PICTURES = images(1, (B, H, W, 3))


def conv(size=3, strides=1, padding=None, c=C, n=N, **options):
    padding = size // 2 if padding is None else padding
    options |= {"role": "conv", "rngs": nnx.Rngs(0)}
    layer = Conv(c, n, size, strides=strides, padding=padding, **options)
    if layer.bias is not None:
        layer.bias.set_value(jnp.arange(n, dtype=jnp.float32) / n)
    return nnx.Sequential(layer)


def quantized(model, weight=SEARCHED, activation=INT8, seen=None, **fields):
    layer = LayerRecipe(weight=weight, activation=activation, **fields)
    recipe = Recipe(name="test", rules=(Rule(match=Match(kind="conv", role="conv"), layer=layer),))
    return quantize_model(model, recipe, seen)[0].layers[0]


def relative_error(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def oracle(values, weight, size, strides, padding):
    """Sum products of integers over every window, pixel by pixel, in NumPy's int64."""
    values, weight = (np.asarray(x, np.int64) for x in (values, weight))
    padded = np.pad(values, ((0, 0), *padding, (0, 0)))
    rows = (padded.shape[1] - size[0]) // strides[0] + 1
    columns = (padded.shape[2] - size[1]) // strides[1] + 1
    found = np.zeros((len(values), rows, columns, len(weight)), np.int64)
    for i in range(rows):
        for j in range(columns):
            top, left = i * strides[0], j * strides[1]
            seen = padded[:, top : top + size[0], left : left + size[1]]
            found[:, i, j] = seen.reshape(len(values), -1) @ weight.T
    return found


WINDOWS = st.tuples(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
)


@settings(max_examples=12, deadline=None)
@given(WINDOWS, st.integers(4, 7), st.integers(4, 7), st.integers(0, 2**32 - 1))
def test_windows_of_integers_are_the_oracle_s_in_both_ways(geometry, height, width, seed):
    rng = np.random.default_rng(seed)
    window = Window(*geometry)
    x = rng.integers(-128, 128, (2, height, width, 3), np.int8)
    w = rng.integers(-128, 128, (4, window.taps * 3), np.int8)
    expected = oracle(x, w, *geometry)
    unfolded = np.asarray(window.unfold(jnp.asarray(x)))
    assert unfolded.shape[1:3] == window.grid(height, width)
    np.testing.assert_array_equal(unfolded.astype(np.int64) @ w.T.astype(np.int64), expected)
    found = window.convolve(jnp.asarray(x), jnp.asarray(w))
    assert found.dtype == jnp.float32 and abs(expected).max() < 2**24  # which float32 holds
    np.testing.assert_array_equal(found, expected)


def test_sums_of_int8_become_floats_in_the_program_that_convolves():
    """Or XLA refuses to give them to cuDNN, in calls that aren't traced too."""
    x, w = jnp.ones((1, 4, 4, 8), jnp.int8), jnp.ones((2, 72), jnp.int8)
    (program,) = jax.make_jaxpr(Window((3, 3)).convolve)(x, w).eqns
    made = [x.primitive.name for x in program.params["jaxpr"].eqns]
    assert made[-2:] == ["conv_general_dilated", "convert_element_type"]


def test_bytes_are_moved_four_at_a_time_on_a_gpu(monkeypatch):
    window, rng = Window((3, 3), (2, 1), ((1, 0), (1, 1))), np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, (2, 5, 6, 8), np.int8))
    expected, plain = window.unfold(x), jax.make_jaxpr(window.unfold)(x)
    chip = device.describe("gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(device, "current", lambda: chip)
    np.testing.assert_array_equal(window.unfold(x), expected)
    assert "i32[2,5,6,2]" in str(jax.make_jaxpr(window.unfold)(x))
    assert "i32[2" not in str(plain)


def test_an_image_smaller_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \[1, 2, 5, 3\]; .* one window of 3x3"):
        Window((3, 3)).unfold(jnp.zeros((1, 2, 5, 3)))


OPERANDS = [
    (INT8, INT8, 1),
    (SEARCHED, INT8, 2),
    (Quartz(), Quartz(), 2),
    (SEARCHED, STRETCHED, 1),
]


@pytest.mark.parametrize(("weight", "activation", "strides"), OPERANDS, ids=str)
def test_the_result_is_one_integer_dot_under_a_scale_an_image(weight, activation, strides):
    """The integers are those of the format with an image as one row, their sums the oracle's."""
    layer = quantized(conv(strides=strides, use_bias=False), weight, activation)
    assert layer.scales == "image"
    x = images()
    stored = activation.store(x.reshape(B, -1))
    values = dequantize(stored) / stored.scale
    weights = layer.weight.get_value()
    integers = np.round(dequantize(weights) / weights.scale)
    geometry = (3, 3), (strides, strides), ((1, 1), (1, 1))
    sums = oracle(np.round(values).reshape(x.shape), integers, *geometry)
    assert abs(sums).max() < 2**24  # which float32 holds
    expected = np.float32(sums) * np.asarray(stored.scale)[:, None, None]
    expected = expected * np.asarray(weights.scale)[:, 0]
    for module in (layer, place(nnx.Sequential(layer))[0].layers[0]):
        np.testing.assert_array_equal(module(x), expected)
    by_xla, placement = place(nnx.Sequential(layer), convolutions="xla")
    assert placement.layers == {"layers.0": "int8, XLA's convolution, a scale an image"}
    np.testing.assert_array_equal(by_xla.layers[0](x), layer(x))


def definition(module, x):
    """Windows of the input through the ops, in its format, times the dequantized weight."""
    ops = module.ops.get_value() if module.ops else ()
    k, window = module.in_features, module.window
    if module.scales == "image":
        for op in ops:
            x, _ = op(x)
        given = window.unfold(module.activation(x.reshape(len(x), -1)).reshape(x.shape))
        added = None
    else:
        given, added = window.unfold(x), None
        for op in ops:
            given, more = op(given)
            added = more if added is None else added if more is None else added + more
        given = given if module.activation is None else module.activation(given)
    y = given.reshape(-1, k) @ dequantize(module.weight.get_value()).T
    y = y.reshape(*given.shape[:3], -1) + module.bias.get_value()
    return y if added is None else y + added


CASES = [
    # fields of the layer's recipe, and what shares a scale
    ({}, "image"),
    ({"transforms": (Rotate(block=16),)}, "image"),
    ({"transforms": (Rotate(block=4),)}, "window"),  # which the pass lacks
    ({"transforms": (Smooth(alpha=0.5),)}, "window"),
    ({"transforms": (LowRank(rank=2, iterations=1),), "activation": STRETCHED}, "window"),
    ({"activation": Int(width=8, range="minmax")}, "window"),  # whose zero is no integer
    ({"activation": Quartz(group_size=32)}, "window"),  # two pixels to a group
    ({"activation": NVFP4()}, "window"),
    ({"activation": None}, "none"),
    ({"activation": None, "transforms": (Rotate(block=16),)}, "window"),
]


@pytest.mark.parametrize(("fields", "scales"), CASES, ids=str)
def test_the_output_is_what_the_formats_make_of_windows(fields, scales):
    model = conv(strides=2)
    needs = {"layers.0": frozenset({"rows", "absmax", "gram", "mean"})}
    seen = observe(model, [{"x": images(2)}], needs, call=lambda m, x: m(x))
    layer = quantized(model, seen=seen, **fields)
    assert layer.scales == scales
    x = images()
    # float32 rounding; a weight-only layer rounds few rows to 16 bits of their largest magnitude
    assert relative_error(layer(x), definition(layer, x)) < 1e-5
    simulated = place(nnx.Sequential(layer), simulate=True)[0].layers[0]
    assert relative_error(simulated(x), definition(layer, x)) < 1e-5


@pytest.mark.parametrize("activation", [INT8, None], ids=str)
def test_a_branch_of_windows_is_added(activation):
    layer, x = quantized(conv(strides=2), INT8, activation), images()
    rng = np.random.default_rng(4)
    down, up = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((9 * C, 2), (2, N)))
    more = layer.with_branch(down, up, jnp.float32)(x) - layer(x)
    # int8 inputs, for a scale a window and a scale an image
    assert relative_error(more, layer.window.unfold(x) @ down @ up) < 0.05


@pytest.mark.parametrize("padding", [0, 1, ((0, 1), (0, 1))])
def test_padding_is_zeros_where_the_model_has_it(padding):
    model = conv(strides=2, padding=padding)
    layer, x = quantized(model, INT8), images()
    y = model(x)
    assert layer(x).shape == y.shape
    assert relative_error(layer(x), y) < 0.02  # two int8 operands


def test_a_residual_is_added():
    layer, x = quantized(conv(n=C)), images()
    np.testing.assert_allclose(layer(x, residual=x), layer(x) + x, rtol=1e-6, atol=1e-6)


def test_a_convolution_over_pixels_is_a_linear():
    model = conv(size=1)
    layer, x = quantized(model, INT8), images()
    assert isinstance(layer, QuantizedConv) and layer.scales == "pixel"
    linear = QuantizedLinear(layer.weight.get_value(), layer.bias, INT8)
    np.testing.assert_array_equal(layer(x), linear(x))


def test_a_model_keeps_bfloat16():
    layer = quantized(conv(), INT8)
    y = layer(images(dtype=jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert relative_error(y.astype(jnp.float32), conv()(images())) < 0.03


def test_sites_tell_convolutions_with_their_windows():
    found = {site.path: (site.kind, site.role, site.n, site.k) for site in sites(net())}
    assert found == {
        "first": ("conv", "embed", C, 27),
        "plain": ("conv", "conv", C, 9 * C),
        "down": ("conv", "resample", N, 9 * C),
        "shortcut": ("conv", "shortcut", 2 * C, N),
        "last": ("linear", "embed", 4, 2 * C),
    }


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8x", "w4a4", "w4a16"])
def test_presets_quantize_convolutions_that_state_a_role(recipe):
    model = net()
    made, report = quantize_model(model, get_recipe(recipe))
    assert [layer.path for layer in report.layers] == ["down", "plain", "shortcut"]
    assert type(made.first) is Conv
    expected, found = model(PICTURES), made(PICTURES)
    # int8 operands leave 1 % of a layer's result, 4-bit ones some 15 %
    assert relative_error(found, expected) < (0.03 if recipe == "w8a8" else 0.4)
    placed, _ = place(made)
    np.testing.assert_array_equal(placed(PICTURES), found)


def test_gptq_halves_the_error_of_what_it_has_seen():
    """The statistics are of windows, so that the Gram matrix is over rows of the weight."""
    model = conv(n=32)
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(4, 8, 8, 4)) @ rng.normal(size=(4, C))  # four directions of sixteen
    x = jnp.asarray(mixed, jnp.float32)
    recipe = Recipe(
        name="gptq",
        rules=(dataclasses.replace(get_recipe("gptq+int4").rules[-1], match=Match(kind="conv")),),
    )
    seen = observe(model, [{"x": x}], recipe.needs(sites(model)), call=lambda m, x: m(x))
    assert seen["layers.0"].gram.shape == (9 * C, 9 * C)
    windows = Window((3, 3), padding=((1, 1), (1, 1))).unfold(x).reshape(-1, 9 * C)
    gram = windows.T @ windows / len(windows)
    assert relative_error(seen["layers.0"].gram, gram) < 1e-5
    _, report = quantize_model(model, recipe, seen)
    nearest = get_recipe("int4").rules[-1]
    plain = Recipe(name="plain", rules=(dataclasses.replace(nearest, match=Match(kind="conv")),))
    _, plain_report = quantize_model(model, plain, seen)
    assert report.layers[0].output_error < 0.5 * plain_report.layers[0].output_error


def test_a_calibrated_preset_runs_and_is_saved_and_loaded(tmp_path):
    recipe, model = get_recipe("w4a8x-gptq"), net()
    for layer in (model.shortcut,):  # 8 channels, of which no block of 16 can be rotated
        layer.role = "embed"
    seen = observe(model, [{"x": PICTURES}], recipe.needs(sites(model)), call=lambda m, x: m(x))
    made, report = quantize_model(model, recipe, seen)
    assert [layer.path for layer in report.layers] == ["down", "plain"]
    assert made.plain.scales == "image"  # rotated by pixels
    save_model(tmp_path / "net", made, recipe=recipe, report=report, config={})

    def build(config):
        model = net()
        model.shortcut.role = "embed"
        return model

    loaded, _ = load_model(tmp_path / "net", build)
    assert loaded.plain.window == made.plain.window
    np.testing.assert_array_equal(loaded(PICTURES), made(PICTURES))


def test_a_gradient_goes_to_the_image_as_through_the_dequantized_product():
    layer, x = quantized(conv()), images()
    weight = dequantize(layer.weight.get_value())
    size = jnp.asarray(np.random.default_rng(3).normal(size=layer(x).shape), jnp.float32)

    def plain(x):
        return jnp.sum(size * layer.window.convolve(x, weight))

    found = jax.grad(lambda x: jnp.sum(size * layer(x)))(x)
    assert relative_error(found, jax.grad(plain)(x)) < 1e-5


def test_a_layer_placed_again_runs_as_its_placement_says():
    """XLA's convolution leaves no trace in a layer that is then placed for matmuls."""
    layer, x = quantized(conv()), images()
    model = place(nnx.Sequential(layer), convolutions="xla")[0]
    again, placement = place(model)
    assert "XLA" not in placement.layers["layers.0"]
    primitives = str(jax.make_jaxpr(again.layers[0])(x))
    assert "conv_general_dilated" not in primitives
    np.testing.assert_array_equal(again.layers[0](x), layer(x))


def test_xla_s_way_has_no_gradient_and_says_so():
    layer = place(nnx.Sequential(quantized(conv())), convolutions="xla")[0].layers[0]
    with pytest.raises(ValueError, match="no gradient"):
        jax.grad(lambda x: jnp.sum(layer(x)))(images())


def test_an_unknown_way_to_convolve_is_refused():
    with pytest.raises(ValueError, match="convolutions is 'cudnn'; it must be 'matmul' or 'xla'"):
        place(net(), convolutions="cudnn")


REFUSED = {
    "convolution of groups": {"feature_group_count": 2},
    "dilated": {"kernel_dilation": 2},
    "pads 'CIRCULAR'": {"padding": "CIRCULAR"},
    r"pads 'SAME' with strides of \(2, 2\)": {"padding": "SAME", "strides": 2},
}


@pytest.mark.parametrize(("reason", "options"), REFUSED.items())
def test_a_convolution_of_another_form_is_refused_with_the_reason(reason, options):
    model = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0), **options))
    rule = Rule(match=Match(path=r"layers\.0"), layer=LayerRecipe(weight=INT8))
    with pytest.raises(ValueError, match=rf"would quantize layers.0, but it .*{reason}"):
        quantize_model(model, Recipe(name="test", rules=(rule,)))


def test_convolutions_of_a_model_without_roles_stay_as_they_are():
    model = nnx.Sequential(
        nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    )
    made, _ = quantize_model(model, get_recipe("w8a8"))
    assert type(made.layers[0]) is nnx.Conv
    assert isinstance(made.layers[1], QuantizedLinear)


def test_a_scale_an_image_costs_what_its_largest_value_is_above_a_window_s():
    """Of SiLU behind a norm, what these layers see: 1.1 % of the result, 0.8 % by windows."""
    model = conv(c=64, n=32)
    x = nnx.silu(jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 64)), jnp.float32))
    layer = quantized(model, INT8)
    exact = layer.window.convolve(x, dequantize(layer.weight.get_value())) + layer.bias.get_value()
    errors = [relative_error(y, exact) for y in (layer(x), layer.by_window(x))]
    assert errors[1] < errors[0] < 2.5 * errors[1]
