"""TPU kernels through the real TPU compiler at FLUX shapes, on a machine without a TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, compat
from pallas_kernels.functions import Norm
from pallas_kernels.matmul import MATMUL, mosaic_tpu
from pallas_kernels.matmul.shapes import SHAPES
from pallas_kernels.operands import Branch, Epilogue
from pallas_kernels.quantize import channels
from pallas_kernels.quantize import mosaic_tpu as quantize_tpu
from quartz_jax import Int, Quartz, quantize, quartz_matmul
from quartz_jax.engine.linear import Given
from quartz_jax.engine.place import place_weight

pytestmark = pytest.mark.skipif(
    compat.libtpu_why_not() is not None, reason=f"no TPU compiler: {compat.libtpu_why_not()}"
)

CHIPS = list(aot.TPU_CHIPS)
FLUX = [name for name in SHAPES if name.startswith("flux")]

on_chips = pytest.mark.parametrize("chip", CHIPS)
at_flux_shapes = pytest.mark.parametrize("shape", FLUX)


def compiled_text(chip, shape, *, group_size=None, operand=None, **kind):
    shape = SHAPES[shape]
    arguments = aot.tpu_matmul_arguments(shape.m, shape.n, shape.k, group_size=group_size, **kind)
    run = functools.partial(mosaic_tpu.matmul_prepared, operand=operand)
    return aot.compile_for_tpu(chip, run, *arguments, Epilogue()).as_text()


@on_chips
@at_flux_shapes
def test_packed_matmul_compiles(chip, shape):
    assert "quartz_matmul" in compiled_text(chip, shape, group_size=16)


@on_chips
@at_flux_shapes
def test_plain_int8_matmul_compiles(chip, shape):
    assert "int8_matmul" in compiled_text(chip, shape)


@on_chips
@at_flux_shapes
@pytest.mark.parametrize("levels", ["uniform", "stretched"])
def test_integer_steps_compile(chip, shape, levels):
    kind = {"group_size": 32, "step": "integer", "levels": levels}
    assert "quartz_matmul" in compiled_text(chip, shape, **kind)


@on_chips
@pytest.mark.parametrize("group_size", [8, 16])
def test_stretched_levels_of_small_groups_compile(chip, group_size):
    kind = {"group_size": group_size, "step": "integer", "levels": "stretched"}
    assert "quartz_matmul" in compiled_text(chip, "flux-mlp-down", **kind)


@at_flux_shapes
def test_float8_operands_compile_for_v7x(shape):
    text = compiled_text("v7x", shape, group_size=16, operand=jnp.float8_e4m3fn)
    assert "f8e4m3fn" in text


@on_chips
def test_the_whole_epilogue_compiles(chip):
    m, n = SHAPES["flux-single-out"].m, SHAPES["flux-single-out"].n

    def run(x, weights, epilogue):
        x = dataclasses.replace(x, lo=x.scale)
        return mosaic_tpu.matmul_prepared(x, weights, epilogue)

    arguments = aot.tpu_matmul_arguments(m, n, SHAPES["flux-single-out"].k, group_size=16)
    shape = jax.ShapeDtypeStruct
    column = shape((n,), jnp.float32)
    epilogue = Epilogue(
        bias=column,
        activation="gelu",
        gate=column,
        residual=shape((m, n), jnp.bfloat16),
        branch=Branch(input=shape((m, 32), jnp.bfloat16), up=shape((n, 32), jnp.bfloat16)),
    )
    assert aot.compile_for_tpu(chip, run, *arguments, epilogue)


def compile_quantize(chip, m, k, *, norm=False, **options):
    config = {"bits": 4, "group_size": 16, "range": "absmax", "step": "power"}
    run = functools.partial(quantize_tpu.quantize, **config | {"rounding": "nearest"} | options)
    x, vector = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((k,), jnp.bfloat16)
    arguments = (x, vector, vector) if norm else (x,)

    def normed(x, shift, scale):
        return run(x, norm=Norm(shift=shift, scale=scale, epsilon=1e-6))

    text = aot.compile_for_tpu(chip, normed if norm else run, *arguments).as_text()
    assert "quartz_quantize" in text


@on_chips
@pytest.mark.parametrize("k", [3072, 12288, 15360])
@pytest.mark.parametrize(
    "options", [{}, {"range": "minmax"}, {"step": "integer"}, {"bits": 8}], ids=str
)
def test_quantize_compiles(chip, k, options):
    compile_quantize(chip, 4608, k, **options)


@on_chips
@pytest.mark.parametrize("k", [3072, 12288, 15360])
def test_packing_quantize_compiles(chip, k):
    compile_quantize(chip, 4608, k, packed=True)


@on_chips
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"packed": True, "group_size": 32}], ids=str)
def test_quantize_after_a_norm_compiles(chip, options):
    compile_quantize(chip, 4608, 3072, norm=True, **options)


@on_chips
@pytest.mark.parametrize("rotation", channels.SIZES)
@pytest.mark.parametrize("m", [1, 4608])
def test_rotated_channels_stretched_levels_and_wide_groups_compile(chip, rotation, m):
    options = {"rotation": rotation, "multiplier": np.ones(3072, np.float32), "norm": True}
    options |= {"step": "integer", "levels": "stretched"}
    compile_quantize(chip, m, 3072, wide=tuple(i % 8 == 0 for i in range(192)), **options)


@on_chips
@pytest.mark.parametrize("first", [3072, 48])
def test_rows_that_are_rotated_from_a_channel_on_compile(chip, first):
    options = {"rotation": 16, "rotated_from": first, "step": "integer", "levels": "stretched"}
    compile_quantize(chip, 256, 15360, **options)


@on_chips
@pytest.mark.parametrize("group_size", [8, 64])
def test_odd_rows_and_other_groups_compile(chip, group_size):
    options = {"norm": True, "packed": True, "range": "minmax", "group_size": group_size}
    compile_quantize(chip, 37, 1100, **options)


@on_chips
def test_dispatch_runs_the_named_kernel_on_a_tpu(chip):
    def run(*arguments):
        return MATMUL(*arguments, implementation="mosaic_tpu")

    arguments = aot.abstract_rows(100, 320), aot.abstract_packed(200, 320), Epilogue()
    assert "quartz_matmul" in aot.compile_for_tpu(chip, run, *arguments).as_text()


POWER, INTEGER = Quartz(), Quartz(step="integer")


@pytest.mark.parametrize(
    ("activation", "placed", "float8"),
    [
        (POWER, False, True),
        (POWER, True, True),
        (Quartz(range="minmax"), True, True),
        (INTEGER, False, False),
        (Int(width=8), True, False),
    ],
    ids=str,
)
def test_four_bits_on_both_sides_multiply_in_float8_on_v7x(activation, placed, float8):
    def run(x, w):
        w = quantize(w)
        x = Given(rows=x).quantized(activation)
        return quartz_matmul(x, place_weight(w, False) if placed else w)

    shape = jax.ShapeDtypeStruct
    x, w = shape((100, 320), jnp.bfloat16), shape((200, 320), jnp.bfloat16)
    text = aot.compile_for_tpu("v7x", run, x, w).as_text()
    assert "quartz_matmul" in text
    assert ("f8e4m3fn" in text) == float8
