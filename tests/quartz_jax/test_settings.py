"""JAX's settings that change dtypes or look for NaN: the same bits."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from quartz_jax import *
from quartz_jax.formats import NVFP4, FittedTable, Table
from quartz_jax.rounding import Gptq
from quartz_jax.transforms import LowRank, Rotate, Seen
from quartz_jax.conversion.model import quantize_layer

random = np.random.default_rng(0)
x, w = (jnp.asarray(random.normal(size=(n, 64)).astype(np.float32)) for n in (3, 4))
searched = Quartz(step="integer", levels="stretched", search=True)

def product(x, format_):
    y = quartz_matmul(quantize(x, format_), quantize(w), activation="gelu", out_dtype=jnp.float32)
    return y.sum(), y

def layer():
    recipe = LayerRecipe(
        weight=FittedTable(),
        activation=Int(width=8),
        transforms=(LowRank(rank=2, iterations=1), Rotate(block=16)),
        rounding=Gptq(),
    )
    seen = Seen(rows=x[None], absmax=jnp.abs(x).max(0), mean=x.mean(0), gram=x.T @ x)
    fitted, _ = quantize_layer("x", w, None, recipe, seen)
    made = QuantizedLinear(fitted.weight, None, recipe.activation, fitted.ops)
    return fitted.weight, fitted.ops, made(x)

def model():
    linears = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    quantized, _ = quantize_model(linears, get_recipe("w4a8x"))
    return nnx.state(quantized), place(quantized)[0](x)

def digest(tree):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    text = b"".join(str(a.dtype).encode() + a.tobytes() for a in leaves)
    return hashlib.sha256(text).hexdigest()

made = {str(f): [quantize(x, f), f(x), product(x, f)] for f in (searched, Table(), NVFP4())}
made["gradient"] = jax.grad(product, has_aux=True)(x, Quartz())
made["layer"], made["model"] = layer(), model()
print(json.dumps({name: digest(value) for name, value in made.items()}))
"""
SETTINGS = [
    "JAX_ENABLE_X64=1",
    "JAX_NUMPY_DTYPE_PROMOTION=strict",
    "JAX_DEBUG_NANS=1",
]


def digests(setting=None):
    environment = os.environ | ({} if setting is None else dict([setting.split("=")]))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def usual():
    return digests()


@pytest.mark.parametrize("setting", SETTINGS)
def test_formats_products_gradients_layers_and_models_are_the_same_bits(usual, setting):
    assert digests(setting) == usual
