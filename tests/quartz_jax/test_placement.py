"""What `place` does to a model: weights in the kernels' order, attention in one pass."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh
from layers import EVERY_OP, layer_of

from models.flux import FluxConfig, FluxTransformer
from pallas_kernels.matmul import PreparedWeights
from quartz_jax import Int, LayerRecipe, QuantizedLinear, Quartz, get_recipe, place, quantize_model
from quartz_jax.conversion.model import quantize_layer
from quartz_jax.engine.attention import attention_of
from quartz_jax.engine.linear import how_it_runs
from quartz_jax.engine.place import place_weight
from quartz_jax.formats import IF4, NVFP4, FittedTable

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


@nnx.jit
def run(model, *args):
    """Call a model, compiled whole: one program instead of one for each operation."""
    return model(*args).astype(jnp.float32)


@functools.cache
def quantized(recipe="w4a4x"):
    return quantize_model(build(), get_recipe(recipe))[0]


def arrays(model):
    return {p: x.get_value() for p, x in nnx.to_flat_state(nnx.state(model))}


def is_placed(model: nnx.Module) -> bool:
    """Whether a model holds weights in the order of some kernel."""
    return any(
        isinstance(module, QuantizedLinear)
        and isinstance(module.weight.get_value(), PreparedWeights)
        for _, module in nnx.iter_modules(model)
    )


def on(kind):
    """Tracing for a device that isn't there."""
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    chip = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip))


H100, V6E = "NVIDIA H100 80GB HBM3", "TPU v6 lite"


def test_a_placed_transformer_gives_the_same_output():
    model = quantized()
    placed, _ = place(model)
    expected = run(model, *inputs())
    assert np.std(expected) > 0.1
    np.testing.assert_array_equal(run(placed, *inputs()), expected)


def test_place_leaves_the_given_model_alone():
    model = quantized()
    before = arrays(model)
    placed, _ = place(model, expand=True)
    after = arrays(model)
    assert before.keys() == after.keys()
    for path, value in before.items():
        leaves = (jax.tree.leaves(x) for x in (value, after[path]))
        assert all(one is other for one, other in zip(*leaves, strict=True)), path
    attention = model.double_blocks[0].attention, placed.double_blocks[0].attention
    assert attention[0].attend is not attention[1].attend
    assert placed.double_blocks[0].img_mlp.up.weight.get_value().values.dtype == jnp.int8


def test_a_placement_names_every_quantized_layer_and_how_it_runs():
    model = quantized()
    placed, placement = place(model)
    layers = {p for p, m in nnx.iter_modules(placed) if isinstance(m, QuantizedLinear)}
    assert placement.layers.keys() == {".".join(map(str, p)) for p in layers}
    assert placement.layers["double_blocks.0.img_mod.lin"] == "weight-only"
    assert placement.layers["single_blocks.0.linear1"] == "int8, as stored"
    assert placement.attention == "16 bits, since in 8 bits it needs a Hopper GPU, not cpu"
    assert placement.table().splitlines()[-1] == f"attention: {placement.attention}"


def test_a_placed_bias_is_float32_as_kernels_add_it():
    """A step of FLUX.1 converted 228 of them, a launch each."""
    model = quantized()
    placed, _ = place(model, expand=True)
    assert model.single_blocks[0].linear1.bias.get_value().dtype == jnp.bfloat16
    assert placed.single_blocks[0].linear1.bias.get_value().dtype == jnp.float32


def test_a_recipe_whose_attention_reads_8_bits_falls_back_and_says_why():
    recipe = dataclasses.replace(get_recipe("w4a16"), attention="int8_fp8")
    placed, placement = place(quantize_model(build(), recipe)[0], in_place=True)
    assert placement.attention == "16 bits, since in 8 bits it needs a Hopper GPU, not cpu"
    assert placed.double_blocks[0].attention.attend is attention_of("bf16")[0]
    with on(H100):
        kernel, words = attention_of("int8_fp8")
    assert kernel is not attention_of("bf16")[0]
    assert words == "int8 and float8"


def test_heads_that_the_8_bit_kernel_lacks_get_16_bits():
    model = build()
    attention = model.double_blocks[0].attention
    assert attention.head_dim == model.double_blocks[0].img_attn.query_norm.scale.shape[0]
    with on(H100):
        attend, words = attention_of("int8_fp8", 96)
        assert attention_of("int8_fp8", 64)[1] == "int8 and float8"
    assert attend is attention_of("bf16")[0]
    assert words == "16 bits, since in 8 bits it needs heads of 64 or 128 channels, not 96"


# One layer of each op and way to run, and pairs of formats that place brings to another form.
FORMATS = {
    "stretched": (Quartz(step="integer", levels="stretched", search=True), Int(width=8)),
    "int4": (Int(width=4), Quartz()),
    "fitted table": (FittedTable(), Int(width=8)),
    "groups of 128": (Quartz(group_size=128), Quartz(group_size=128)),
    "blocks": (Quartz(scale_block=16), Int(width=8)),
    "nvfp4": (NVFP4(), NVFP4()),
    "simulated": (IF4(), Int(width=8)),
    "weight-only": (Quartz(), None),
}


PLACED = [(name, (), False) for name in FORMATS]
PLACED += [(name, (), True) for name in ("stretched", "int4", "weight-only")]
PLACED += [(name, EVERY_OP, False) for name in ("stretched", "nvfp4", "weight-only")]


@pytest.mark.parametrize(("formats", "transforms", "expand"), PLACED)
def test_a_placed_layer_computes_the_same_numbers(formats, transforms, expand):
    weight, activation = FORMATS[formats]
    recipe = LayerRecipe(weight=weight, activation=activation, transforms=transforms)
    layer = layer_of(0)
    fitted, _ = quantize_layer("x", layer.weight, layer.bias, recipe, layer.seen)
    module = nnx.Dict({"x": QuantizedLinear(fitted.weight, None, activation, fitted.ops)})
    placed, placement = place(module, expand=expand)
    x = layer.seen.rows
    np.testing.assert_array_equal(placed["x"](x), module["x"](x))
    assert placement.layers["x"].partition(",")[0] == how_it_runs(
        weight.store(layer.weight), activation
    )
    again, same = place(placed)  # what is placed stays so
    assert same.layers["x"].partition(",")[0] == placement.layers["x"].partition(",")[0]
    np.testing.assert_array_equal(again["x"](x), module["x"](x))


@pytest.mark.parametrize(("formats", "transforms", "expand"), PLACED)
def test_a_layer_computes_what_its_simulation_does(formats, transforms, expand):
    weight, activation = FORMATS[formats]
    recipe = LayerRecipe(weight=weight, activation=activation, transforms=transforms)
    layer = layer_of(0)
    fitted, _ = quantize_layer("x", layer.weight, layer.bias, recipe, layer.seen)
    module = nnx.Dict({"x": QuantizedLinear(fitted.weight, None, activation, fitted.ops)})
    simulated, placement = place(module, expand=expand, simulate=True)
    assert placement.layers == {"x": "simulated"}
    x = layer.seen.rows
    y = place(module, expand=expand)[0]["x"](x)
    # The same numbers but for float32 sums: exact integers against products of decoded values.
    np.testing.assert_allclose(simulated["x"](x), y, atol=2e-5 * float(jnp.abs(y).max()))
    assert not module["x"].simulated


@pytest.mark.parametrize("kind", [H100, V6E])
def test_weights_are_placed_in_the_order_of_the_devices_kernel(kind):
    weight = Quartz().store(layer_of(0, 8, 128).weight)
    with on(kind):
        placed = jax.eval_shape(lambda w: place_weight(w, False), weight)
    assert placed.implementation == ("mosaic_gpu" if kind == H100 else "mosaic_tpu")
    assert placed.shape == (8, 128)


def test_a_weight_only_layer_keeps_the_packed_order():
    placed, _ = place(quantized(), expand=True)
    assert placed.double_blocks[0].img_mod.lin.weight.get_value().codes.dtype == jnp.uint8


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_defect_4_a_placed_model_of_any_dtype_can_be_called_on_hopper(dtype, stated):
    """Weights were prepared for a kernel that writes 16 bits, whatever the model computes in."""
    layer = layer_of(0, 128, 128)
    bias = nnx.Param(layer.bias if stated else layer.bias.astype(dtype))
    options = {"dtype": dtype} if stated else {}
    stored = Quartz().store(layer.weight)
    model = nnx.Dict({"x": QuantizedLinear(stored, bias, Int(width=8), **options)})

    def run(model, x):
        placed, placement = place(model)
        assert ("mosaic_gpu" in placement.layers["x"]) == (dtype == jnp.bfloat16)
        return placed["x"](x)

    with on(H100):
        y = nnx.eval_shape(run, model, jax.ShapeDtypeStruct((256, 128), dtype))
    assert y.dtype == dtype


def test_a_placed_model_says_that_it_is():
    layer = layer_of(0, 128, 128)
    model = nnx.Dict({"x": QuantizedLinear(Quartz().store(layer.weight), None, Int(width=8))})
    assert not is_placed(model)

    def check(model):
        assert is_placed(place(model)[0])
        return jnp.zeros(())

    with on(H100):
        nnx.eval_shape(check, model)


def test_attention_that_does_not_say_that_the_kernel_computes_the_same_is_left_alone():
    class Other(nnx.Module):
        def __init__(self):
            self.qk_norm_rope = "something else of that name"

    placed, placement = place(Other())
    assert placed.qk_norm_rope == "something else of that name"
    assert placement.attention == "as the model has it"


def test_defect_3_a_placed_transformer_keeps_the_epsilon_of_its_norms():
    model = quantized()
    expected = run(model, *inputs())
    changed = nnx.clone(model)
    for _, module in nnx.iter_modules(changed):
        if isinstance(module, nnx.RMSNorm):
            module.epsilon = 0.5
    placed, _ = place(changed)
    found = run(placed, *inputs())
    np.testing.assert_array_equal(found, run(changed, *inputs()))
    assert (found != expected).any()


def test_norms_and_rotations_of_a_placed_transformer_are_a_kernel_on_gpus():
    """One of the block with two streams, one of that with one; without `place` none."""

    def kernels(model):
        with on(H100):
            traced = jax.jit(lambda *args: model(*args)).trace(*inputs())
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return len(re.findall(r'custom_call.*name = "qk_norm_rope"', text))

    model = build()
    assert kernels(model) == 0
    assert kernels(place(model)[0]) == 2


def test_placing_in_place_gives_the_given_model():
    model = quantized("w4a4")
    placed, placement = place(model, in_place=True)
    assert placed is model
    assert placement.layers
