"""A whole quantized step through the TPU compiler, on a machine without a TPU."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from pallas_kernels import compat

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
import aot_step
from small_families import SMALL

pytestmark = pytest.mark.skipif(
    compat.libtpu_why_not() is not None, reason=f"no TPU compiler: {compat.libtpu_why_not()}"
)


@pytest.mark.parametrize(("name", "chip"), [("klein", "v5e"), ("Z-Image", "v6e")])
def test_a_quantized_step_compiles_with_the_kernels_and_fits(name, chip):
    family = dataclasses.replace(SMALL[name].family, sizes={"small": SMALL[name].sizes})
    model = aot_step.quantized(family, family.sizes["small"]["transformer"], "w4a8x")
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
    step = aot_step.planned(chip, family, "small", model, (64, 32), 32)
    assert step.kernels == {"quartz_matmul", "quartz_quantize"}
    assert weights < step.arguments < 4 * weights
