"""Time one denoising step of a full-size transformer in several recipes.

    python scripts/benchmark_model.py --model flux1-dev --recipes bf16 w8a8 w4a4 --out step.json

Weights are random (normal, deviation 1 / sqrt(inputs)) and made on the device; speed doesn't depend
on them. Each recipe is quantized from the same weights. `queued` is the time a step when steps are
enqueued without waiting, which is how the sampler runs; `kernels` is the device's own record, and
`gaps` is what the first has beyond it, when no kernel runs. A step is of `--batch` images; the
peak of memory is what the compiler plans for a step, weights included.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.compiled import compiled
from models.denoiser import Configs
from models.families import FAMILIES
from models.family import Family
from models.lora import Adapter, Branch, add_lora
from models.sampler import denoising_step
from models.schedulers import scheduler_from_json
from pallas_kernels import timing
from quartz_jax import QuantizedLinear, get_recipe, place
from quartz_jax.cli import arguments as cli
from quartz_jax.conversion.model import quantize_shapes
from quartz_jax.io import provenance
from quartz_jax.io.files import check_output

MODELS = {name: family for family in FAMILIES for name in family.sizes}
# Part of a kernel's name to what it does; the first that matches counts.
GROUPS = {
    "sdpa": "attention",
    "fmha": "attention",
    "attention": "attention",
    "mosaic_gpu": "matmuls",
    "matmul_int8": "matmuls",
    "few_rows": "modulation matmuls",
    "decode": "decoding",
    "dequantize": "decoding",
    "qk_norm_rope": "norms and rotations of q and k",
    "quantize": "quantize passes",
    "fprop": "convolutions",
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
    family = MODELS[args.model]
    model = random_model(family, family.sizes[args.model][family.main], weights_key)
    step = Step.of(
        family, args.model, model, inputs_key, (height, width), args.text_tokens, args.batch
    )
    made = functools.partial(
        in_recipe,
        model,
        expand=args.expand,
        convolutions=args.convolutions,
        key=weights_key,
        lora_rank=args.lora_rank,
    )
    results = {}
    if args.together:
        subjects = {name: made(name) for name in args.recipes}
        with ThreadPoolExecutor() as pool:
            list(pool.map(step.run_once, subjects.values()))
    for name in args.recipes:
        subject = subjects.pop(name) if args.together else made(name)
        results[name] = measure(subject, step, args.steps)
        if args.together:  # it was compiled among the others
            results[name]["first_call_s"] = None
        del subject
        show(name, results[name], results.get("bf16"))
    if args.out:
        record = {"environment": provenance.environment(), "seed": args.seed}
        record |= {"model": args.model, "batch": args.batch, "lora_rank": args.lora_rank}
        record |= {"results": results}
        provenance.write_results(args.out, record)


def in_recipe(
    model: nnx.Module,
    name: str,
    *,
    expand: bool,
    convolutions: str,
    key: jax.Array,
    lora_rank: int = 0,
) -> nnx.Module:
    """Return a model as a recipe stores it, ready for this device's kernels; itself for bf16.

    Its arrays are random, not quantized from the model's: a step takes as long, and recipes that
    are calibrated need no samples. With a rank an adapter stands beside every linear.
    """
    if name == "bf16":
        return place(with_adapter(model, lora_rank, key))[0]
    shapes = quantize_shapes(nnx.eval_shape(lambda: model), get_recipe(name))
    graphdef, state = nnx.split(shapes)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    given = dict(jax.tree_util.tree_leaves_with_path(nnx.state(model)))
    made = [
        given[path] if path in given else random_array(jax.random.fold_in(key, i), path, leaf)
        for i, (path, leaf) in enumerate(leaves)
    ]
    quantized = nnx.merge(graphdef, jax.tree_util.tree_unflatten(structure, made))
    quantized = with_adapter(quantized, lora_rank, key)
    options = {"expand": expand, "convolutions": convolutions}
    return place(quantized, dtype=jnp.bfloat16, **options)[0]


def with_adapter(model: nnx.Module, rank: int, key: jax.Array) -> nnx.Module:
    """Return a model with a random adapter on every linear; the model itself for a rank of 0."""
    if not rank:
        return model
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    branches = {
        ".".join(map(str, path)): Branch(
            down=rng.standard_normal((x.in_features, rank), np.float32) * x.in_features**-0.5,
            up=rng.standard_normal((rank, x.out_features), np.float32) / 64,
        )
        for path, x in nnx.iter_modules(model)
        if isinstance(x, nnx.Linear | QuantizedLinear)
    }
    return add_lora(model, [Adapter(path=Path("random"), branches=branches)])


def random_array(key: jax.Array, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array of a quantized layer whose values are as large as those of a real one."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if leaf.dtype == jnp.uint8:
        first, second = random_nibbles(key, leaf.shape, name)
        return first | (second << 4)
    if leaf.dtype == jnp.bool_:
        return jnp.zeros(leaf.shape, leaf.dtype)
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


def random_model(family: Family, config: Any, key: jax.Array) -> nnx.Module:
    """Return a family's main component in bfloat16 with random weights, made on the device."""
    component = family.components[family.main]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: component.build(config, jnp.bfloat16)))
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
    return (deviation * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


def random_condition(key: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Return bfloat16 values of states, and ones of what counts or masks."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return random_normal(key, shape.shape, 1.0)
    return jnp.ones(shape.shape, shape.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A denoising step of one or more images, and what it is called with."""

    static: tuple  # the family's denoiser, and the scheduler
    arguments: tuple  # arrays, as `denoising_step` takes them

    @classmethod
    def of(
        cls,
        family: Family,
        name: str,
        model: nnx.Module,
        key: jax.Array,
        size: tuple[int, int],  # height, width
        text_tokens: int,
        batch: int = 1,  # images
    ) -> "Step":
        """Return the first step of a published model in its family's first schedule."""
        denoiser = family.denoiser(Configs(family.sizes[name]))
        schedule, _ = family.schedule_of(family.sizes[name], family.index)
        scheduler = scheduler_from_json(family.schedules[schedule].scheduler)
        canvas, keys = denoiser.canvas(*size), jax.random.split(key)
        shapes = denoiser.shapes(batch, text_tokens)
        texts = {name: random_condition(keys[0], shape) for name, shape in shapes.items()}
        conditions = denoiser.prepare(model, texts, canvas)
        latents = jax.random.normal(keys[1], (batch, *canvas.shape))
        level = denoiser.levels(scheduler, 4, canvas, 1.0)[0]
        guidance = np.float32(3.5) if denoiser.guided else None
        memory = scheduler.memory(latents)
        noise = latents if scheduler.stochastic else None
        arguments = (latents, memory, [conditions], level, guidance, None, noise)
        return cls(static=(denoiser, scheduler), arguments=arguments)

    def compiled(self, model: nnx.Module) -> Callable:
        """Return the step of a model."""
        return compiled(denoising_step, model, *self.static)

    def run_once(self, model: nnx.Module) -> None:
        """Compute a step, compiling if it is the first."""
        latents, _ = self.compiled(model)(*self.arguments)
        if not bool(jnp.isfinite(latents).all()):
            raise ValueError("the step's result isn't finite")


def measure(model: nnx.Module, subject: Step, steps: int) -> dict:
    """Compile, run and profile a step."""
    start = time.perf_counter()
    step, inputs = subject.compiled(model), subject.arguments
    memory = step.func.lower(*step.args, *inputs).compile().memory_analysis()
    subject.run_once(model)  # what was just compiled
    first = time.perf_counter() - start
    kernels = timing.kernel_times(functools.partial(step, *inputs), 3)
    groups: dict[str, float] = {}
    for name, seconds in kernels.items():
        group = next((g for part, g in GROUPS.items() if part in name.lower()), "the rest")
        groups[group] = groups.get(group, 0) + 1e3 * seconds
    times = statistics.median(queued(step, inputs, steps) for _ in range(5))
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "first_call_s": first,
        "queued_ms": times,
        "kernels_ms": 1e3 * sum(kernels.values()),
        "gaps_ms": times - 1e3 * sum(kernels.values()) if kernels else None,
        "groups_ms": groups,
        "largest_kernels_ms": {name: 1e3 * t for name, t in list(kernels.items())[:40]},
        "peak_bytes": held + memory.temp_size_in_bytes,
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))),
    }


def queued(step: Callable, inputs: tuple, steps: int) -> float:
    """Return milliseconds a step of several that are enqueued at once."""
    start = time.perf_counter()
    for _ in range(steps):
        made = step(*inputs)
    jax.block_until_ready(made)
    return (time.perf_counter() - start) / steps * 1e3


def show(name: str, result: dict, base: dict | None) -> None:
    """Print a recipe's figures."""
    line = f"{name:10} step {result['queued_ms']:7.2f} ms"
    if result["first_call_s"]:
        line += f", first call {result['first_call_s']:6.1f} s"
    line += f", kernels {result['kernels_ms']:7.2f} ms"
    if result["gaps_ms"] is not None:
        line += f", gaps {result['gaps_ms']:5.2f} ms"
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
    add("--model", choices=MODELS, default="flux1-dev", help="whose sizes to take")
    add("--recipes", nargs="+", metavar="RECIPE", default=["bf16", "w8a8", "w4a8x", "w4a4"])
    add("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels, multiples of 16")
    add("--batch", type=cli.positive, default=1, help="images of a step")
    add("--text-tokens", type=cli.positive, default=512)
    add("--steps", type=cli.positive, default=5, help="steps that are enqueued together")
    add("--expand", action="store_true", help="4-bit weights decoded to int8 beforehand")
    add("--lora-rank", type=cli.positive, default=0, help="of an adapter on every linear")
    ways = {"choices": ("matmul", "xla"), "default": "matmul"}
    add("--convolutions", **ways, help="how quantized ones run, see `place`")
    add("--together", action="store_true", help="compile all at once; no first calls")
    add("--out", type=Path, help="JSON file for the results")
    cli.add_seed(parser)
    args = parser.parse_args(argv)
    for name in args.recipes:
        get_recipe(name)  # refuses what isn't one
    return args


if __name__ == "__main__":
    sys.exit(cli.run(main))
