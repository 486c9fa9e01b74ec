"""Time one denoising step of a full-size FLUX.1-dev transformer in several recipes.

    python scripts/benchmark_model.py --recipes bf16 w8a8 w4a4 --out step.json

Weights are random (normal, deviation 1 / sqrt(inputs)) and made on the device; speed doesn't depend
on them. Each recipe is quantized from the same weights. `queued` is the time a step when steps are
enqueued without waiting, which is how the sampler runs; `kernels` is the device's own record; the
peak of memory is what the compiler plans for a step, weights included.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.compiled import compiled
from models.flux import FluxConfig, FluxTransformer
from models.flux.latents import image_ids
from models.sampler import denoising_step
from pallas_kernels import timing
from quartz_jax import get_recipe, place
from quartz_jax.cli import arguments as cli
from quartz_jax.conversion.model import quantize_shapes
from quartz_jax.io import provenance
from quartz_jax.io.files import check_output

# Part of a kernel's name to what it does; the first that matches counts.
GROUPS = {
    "sdpa": "attention",
    "fmha": "attention",
    "mosaic_gpu": "matmuls",
    "matmul_int8": "matmuls",
    "few_rows": "modulation matmuls",
    "decode": "decoding",
    "qk_norm_rope": "norms and rotations of q and k",
    "quantize": "quantize passes",
    "nvjet": "matmuls",
    "gemm": "matmuls",
    "cutlass": "matmuls",
}


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    args = parse(argv)
    if args.out:
        check_output(args.out)
    width, height = cli.parse_size(args.size)
    print(f"seed {args.seed}", flush=True)
    weights_key, inputs_key = jax.random.split(jax.random.key(args.seed))
    config = FluxConfig(guidance_embeds=True)
    model = random_transformer(config, weights_key)
    inputs = random_inputs(config, inputs_key, width // 16, height // 16, args.text_tokens)
    results = {}
    if args.together:
        subjects = {name: in_recipe(model, name, args.expand, weights_key) for name in args.recipes}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda subject: run_once(subject, inputs), subjects.values()))
    for name in args.recipes:
        subject = (
            subjects.pop(name)
            if args.together
            else in_recipe(model, name, args.expand, weights_key)
        )
        results[name] = measure(subject, inputs, args.steps)
        if args.together:  # it was compiled among the others
            results[name]["first_call_s"] = None
        del subject
        show(name, results[name], results.get("bf16"))
    if args.out:
        record = {"environment": provenance.environment(), "seed": args.seed, "results": results}
        provenance.write_results(args.out, record)


def in_recipe(model: FluxTransformer, name: str, expand: bool, key: jax.Array) -> nnx.Module:
    """Return a model as a recipe stores it, ready for this device's kernels; itself for bf16.

    Its arrays are random, not quantized from the model's: a step takes as long, and recipes that
    are calibrated need no samples.
    """
    if name == "bf16":
        return place(model)[0]
    shapes = quantize_shapes(nnx.eval_shape(lambda: model), get_recipe(name))
    graphdef, state = nnx.split(shapes)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    given = dict(jax.tree_util.tree_leaves_with_path(nnx.state(model)))
    made = [
        given[path] if path in given else random_array(jax.random.fold_in(key, i), path, leaf)
        for i, (path, leaf) in enumerate(leaves)
    ]
    quantized = nnx.merge(graphdef, jax.tree_util.tree_unflatten(structure, made))
    return place(quantized, expand=expand, dtype=jnp.bfloat16)[0]


def random_array(key: jax.Array, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array of a quantized layer whose values are as large as those of a real one."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if leaf.dtype == jnp.uint8:
        first, second = random_nibbles(key, leaf.shape, name)
        return first | (second << 4)
    if leaf.dtype == jnp.int8:
        return jax.random.randint(key, leaf.shape, -127, 128, jnp.int8)
    if name == "scale":
        return jnp.full(leaf.shape, 1 / 64 / 64, leaf.dtype)
    if leaf.dtype == jnp.float32:  # factors
        return jnp.ones(leaf.shape, leaf.dtype)
    return random_normal(key, leaf.shape, leaf.shape[0] ** -0.5)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_nibbles(key: jax.Array, shape: tuple[int, ...], name: str) -> jax.Array:
    """Return steps that every format has, or codes but -8; uint8 [2, *shape]."""
    if name == "shifts":
        return jax.random.randint(key, (2, *shape), 0, 5).astype(jnp.uint8)
    return (jax.random.randint(key, (2, *shape), -7, 8) & 15).astype(jnp.uint8)


def random_transformer(config: FluxConfig, key: jax.Array) -> FluxTransformer:
    """Return a bfloat16 transformer with random weights, made on the device."""
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: FluxTransformer(config, rngs=nnx.Rngs(0), **dtypes))
    )
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    made = []
    for i, (path, leaf) in enumerate(leaves):
        if "scale" in jax.tree_util.keystr(path):
            made.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            deviation = leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 0.02
            made.append(random_normal(jax.random.fold_in(key, i), leaf.shape, deviation))
    return nnx.merge(graphdef, jax.tree_util.tree_unflatten(structure, made))


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    """Return bfloat16 values."""
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(deviation)


def random_inputs(
    config: FluxConfig, key: jax.Array, columns: int, rows: int, text_tokens: int
) -> tuple:
    """Return the arguments of a denoising step, for one image."""
    keys = jax.random.split(key, 3)
    latents = jax.random.normal(keys[0], (1, rows * columns, config.in_channels))
    text = jax.random.normal(keys[1], (1, text_tokens, config.joint_attention_dim), jnp.bfloat16)
    pooled = jax.random.normal(keys[2], (1, config.pooled_projection_dim), jnp.bfloat16)
    ids = image_ids(rows, columns), np.zeros((text_tokens, 3), np.float32)
    sigmas = np.float32(1.0), np.float32(0.9)
    return latents, text, pooled, *ids, *sigmas, np.float32(3.5), None


def measure(model: FluxTransformer, inputs: tuple, steps: int) -> dict:
    """Compile, run and profile a step."""
    start = time.perf_counter()
    step = compiled(denoising_step, model)
    memory = step.func.lower(*step.args, *inputs).compile().memory_analysis()
    run_once(model, inputs)  # what was just compiled
    first = time.perf_counter() - start
    kernels = timing.kernel_times(functools.partial(step, *inputs), 3)
    groups: dict[str, float] = {}
    for name, seconds in kernels.items():
        group = next((g for part, g in GROUPS.items() if part in name.lower()), "the rest")
        groups[group] = groups.get(group, 0) + 1e3 * seconds
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "first_call_s": first,
        "queued_ms": statistics.median(queued(step, inputs, steps) for _ in range(5)),
        "kernels_ms": 1e3 * sum(kernels.values()),
        "groups_ms": groups,
        "largest_kernels_ms": {name: 1e3 * t for name, t in list(kernels.items())[:40]},
        "peak_bytes": held + memory.temp_size_in_bytes,
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))),
    }


def run_once(model: FluxTransformer, inputs: tuple) -> None:
    """Compute a step, compiling if it is the first."""
    if not bool(jnp.isfinite(compiled(denoising_step, model)(*inputs)).all()):
        raise ValueError("the step's result isn't finite")


def queued(step: Callable, inputs: tuple, steps: int) -> float:
    """Return milliseconds a step of several that are enqueued at once."""
    start = time.perf_counter()
    for _ in range(steps):
        latents = step(*inputs)
    jax.block_until_ready(latents)
    return (time.perf_counter() - start) / steps * 1e3


def show(name: str, result: dict, base: dict | None) -> None:
    """Print a recipe's figures."""
    line = f"{name:10} step {result['queued_ms']:7.2f} ms"
    if result["first_call_s"]:
        line += f", first call {result['first_call_s']:6.1f} s"
    line += f", kernels {result['kernels_ms']:7.2f} ms"
    line += f", weights {result['weight_bytes'] / 2**30:6.2f} GiB"
    line += f", peak {result['peak_bytes'] / 2**30:6.2f} GiB"
    if base:
        line += f", {base['queued_ms'] / result['queued_ms']:.2f}x bf16"
    print(line)
    total = sum(result["groups_ms"].values())
    for group, ms in sorted(result["groups_ms"].items(), key=lambda item: -item[1]):
        print(f"    {group:32} {ms:7.2f} ms {ms / total:5.0%}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--recipes", nargs="+", metavar="RECIPE", default=["bf16", "w8a8", "w4a8x", "w4a4"])
    add("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels, multiples of 16")
    add("--text-tokens", type=cli.positive, default=512)
    add("--steps", type=cli.positive, default=5, help="steps that are enqueued together")
    add("--expand", action="store_true", help="4-bit weights decoded to int8 beforehand")
    add("--together", action="store_true", help="compile all at once; no first calls")
    add("--out", type=Path, help="JSON file for the results")
    cli.add_seed(parser)
    args = parser.parse_args(argv)
    for name in args.recipes:
        get_recipe(name)  # refuses what isn't one
    return args


if __name__ == "__main__":
    sys.exit(cli.run(main))
