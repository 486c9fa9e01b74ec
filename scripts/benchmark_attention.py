"""Time 8-bit attention and the pass before it against cuDNN's bfloat16, after checking them.

    python scripts/benchmark_attention.py --out attention.json

Fresh random inputs, normed, turned and attended to as a model does. Errors are relative to float32
attention on the bfloat16 queries, keys and values, over some of the queries; the kernel is held to
the reference on the same codes too, and the pass to its own. What is wrong or fails is marked and
the exit status is 1, but the rest still runs. Times are medians over batches of calls: the device's
own record of its kernels where the profiler gives one, else wall time. "of bf16" counts the pass
before the attention on both sides. --tune times every configuration of the kernels too.
"""

import argparse
import dataclasses
import faulthandler
import functools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import timing
from pallas_kernels.attention import (
    ATTENTION,
    ATTENTION_INT8_FP8,
    QuantizedHeads,
    mosaic_gpu,
    quantize_heads,
    value_scale,
)
from pallas_kernels.qk_norm_rope import QK_NORM_ROPE, QK_NORM_ROPE_8BIT, Stream, triton_8bit
from quartz_jax.cli import arguments as cli
from quartz_jax.io import provenance
from quartz_jax.io.files import check_output

CHECKED = 128  # queries whose result is compared, from the first and from the last ones
# As in tests/pallas_kernels/test_attention.py, with the reasons.
ERROR, GAIN, TO_REFERENCE = 0.05, (0.99, 1.01), 0.01
# Codes of the pass that may differ from its reference's by one, at a rounding's edge.
DIFFERING = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Shapes of one attention: tokens of each stream, batch elements, heads and their channels."""

    tokens: tuple[int, ...]
    batch: int = 1
    heads: int = 24
    head_dim: int = 128

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.batch} x {'+'.join(map(str, self.tokens))} x {self.heads} x {self.head_dim}"

    @property
    def operations(self) -> float:
        """Multiplications and additions of both products."""
        return 4.0 * self.batch * self.heads * self.head_dim * sum(self.tokens) ** 2


WORKS = {
    "1024": Work(tokens=(512, 4096)),
    "512": Work(tokens=(512, 1024)),
    "2048": Work(tokens=(512, 16384)),
    "64": Work(tokens=(512, 4096), head_dim=64),
    "odd": Work(tokens=(77, 1013), batch=2, heads=8),
}


@dataclasses.dataclass(kw_only=True)
class Row:
    """One line of the table."""

    work: str
    variant: str
    ms: float | None = None  # median time of a call
    times_ms: list[float] = dataclasses.field(default_factory=list)  # of each batch, a call
    tops: float | None = None  # 1e12 operations a second, of the attention alone
    checks: dict[str, float] = dataclasses.field(default_factory=dict)
    wrong: bool = False  # a check is outside its bound
    of_cudnn: float | None = None  # speed over cuDNN's, the attention alone
    of_bf16: float | None = None  # the same with the passes before
    error: str | None = None  # why it did not run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Something to check and time."""

    name: str
    run: Callable[..., Any]
    arguments: tuple
    timed: bool = True
    operations: float = 0.0
    check: Callable[[Any], tuple[dict[str, float], bool]] | None = None  # of the result


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status is 1 if something failed."""
    options = parse(argv)
    if options.out:
        check_output(options.out)
    # A kernel that hangs ends the script; what was measured until then is in the file.
    faulthandler.dump_traceback_later(options.seconds + 45, exit=True)
    environment = provenance.environment()
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    print(f"{environment['device']}, {versions}, seed {options.seed}", flush=True)
    rows, start = [], time.perf_counter()

    def keep() -> None:
        if options.out:
            table = {"rows": [dataclasses.asdict(row) for row in rows]}
            about = {"environment": environment, "seed": options.seed}
            provenance.write_results(options.out, about | table)

    with ThreadPoolExecutor() as pool:
        keys = jax.random.split(jax.random.key(options.seed), len(options.works))
        ready = [
            (WORKS[name], compile_all(WORKS[name], options.tune, pool)) for name in options.works
        ]
        for key, (work, futures) in zip(keys, ready, strict=True):
            if time.perf_counter() - start > options.seconds:
                print(f"{work.name} not run: {options.seconds} s are over", flush=True)
                continue
            for row in run_work(key, work, futures, options.batches):
                rows.append(row)
                show(row)
                keep()
    faulthandler.cancel_dump_traceback_later()
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    bad = [f"{row.work} {row.variant}" for row in rows if row.error or row.wrong]
    if bad:
        print("error: wrong or failed:", "; ".join(bad), file=sys.stderr)
    return int(bool(bad))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--works", nargs="+", choices=WORKS, default=list(WORKS), help="image sides, or others")
    add("--out", type=Path, help="JSON file for the results")
    add("--batches", type=cli.positive, default=3, help="batches whose median counts")
    add("--tune", action="store_true", help="every configuration of the kernels")
    add("--seconds", type=cli.positive, default=50, help="after which no other work is begun")
    cli.add_seed(parser)
    return parser.parse_args(argv)


# ---- the work


def make_inputs(key: jax.Array, work: Work) -> tuple[list[dict], jax.Array]:
    """Return the fields of random streams, and a rotation [2, t, d / 2]."""
    heads, d = work.heads, work.head_dim
    *keys, angle, scale = jax.random.split(key, len(work.tokens) + 2)
    scales = jnp.exp(0.3 * jax.random.normal(scale, (2, d))).astype(jnp.bfloat16)
    streams = [
        {
            "qkv": _normal(k, (work.batch, t, 3 * heads * d)),
            "query_scale": scales[0],
            "key_scale": scales[1],
        }
        for k, t in zip(keys, work.tokens, strict=True)
    ]
    angles = jax.random.uniform(angle, (sum(work.tokens), d // 2), maxval=2 * math.pi)
    return streams, jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return Gaussian numbers, rounded to bfloat16.

    JAX draws only 128 different ones in bfloat16, with a mean of -0.012. Float8 rounds all of a
    kind alike, so that errors add up instead of averaging out: attention was 10 % off for 4 %.
    """
    return jax.random.normal(key, shape).astype(jnp.bfloat16)


def make_outliers(key: jax.Array, work: Work) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return bfloat16 q, k and v with a few large channels, others of all sizes, and a mean."""
    keys = jax.random.split(key, 5)
    shape = (work.batch, sum(work.tokens), work.heads, work.head_dim)
    q, k, v = (jax.random.normal(x, shape) for x in keys[:3])
    k = k + 2 * jax.random.normal(keys[3], shape[2:])
    k = k * jnp.where(jnp.arange(work.head_dim) < 3, 6, 1)
    v = v * jnp.exp(0.7 * jax.random.normal(keys[4], shape[2:])) + 0.5
    q, k = (x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True)) for x in (q, k))
    return tuple(x.astype(jnp.bfloat16) for x in (q, k, v))


def pass_bf16(fields: list[dict], rope: jax.Array, *, work: Work) -> tuple:
    """Norm and turn queries and keys, and leave all three in 16 bits."""
    streams = tuple(Stream(**f, epsilon=1e-6) for f in fields)
    return QK_NORM_ROPE(streams, rope, heads=work.heads)


def pass_int8(
    fields: list[dict], rope: jax.Array, *, work: Work, config: triton_8bit.Config | None = None
) -> QuantizedHeads:
    """Norm and turn queries and keys, and write all three in 8 bits."""
    streams = tuple(Stream(**f, epsilon=1e-6) for f in fields)
    if config is not None:
        return triton_8bit.qk_norm_rope_8bit(streams, rope, heads=work.heads, config=config)
    return QK_NORM_ROPE_8BIT(streams, rope, heads=work.heads)


def pass_reference(fields: list[dict], rope: jax.Array, *, work: Work) -> QuantizedHeads:
    """Do what `pass_int8` does by the definition."""
    streams = tuple(Stream(**f, epsilon=1e-6) for f in fields)
    return QK_NORM_ROPE_8BIT(streams, rope, heads=work.heads, implementation="reference")


def attention_bf16(q, k, v) -> jax.Array:
    """Attend in bfloat16: cuDNN on a GPU."""
    return ATTENTION(q, k, v, scale=1 / math.sqrt(q.shape[3]))


def attention_int8(heads: QuantizedHeads, *, config: mosaic_gpu.Config | None = None) -> jax.Array:
    """Attend in 8 bits."""
    scale = 1 / math.sqrt(heads.q.shape[3])
    if config is not None:
        run = mosaic_gpu.attention_int8_fp8
        return run(heads, scale=scale, streams=(heads.tokens,), config=config)[0]
    return ATTENTION_INT8_FP8(heads, scale=scale, streams=(heads.tokens,))[0]


def some(x: jax.Array) -> jax.Array:
    """Return the first and the last queries of [b, t, heads, d]."""
    return jnp.concatenate([x[:, :CHECKED], x[:, -CHECKED:]], axis=1)


def attention_32(q, k, v) -> jax.Array:
    """Return float32 attention of some of the queries, a head at a time."""

    def head(qkv):
        q, k, v = (x.astype(jnp.float32) for x in qkv)
        logits = jnp.einsum("bqd,bkd->bqk", q, k, precision="highest") / math.sqrt(q.shape[2])
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(logits), v, precision="highest")

    arrays = (x.transpose(2, 0, 1, 3) for x in (some(q), k, v))
    return lax.map(head, tuple(arrays)).transpose(1, 2, 0, 3)


def attention_reference(heads: QuantizedHeads) -> jax.Array:
    """Return the definition's attention of the first queries."""
    few = min(CHECKED, heads.tokens)
    q, q_scale = heads.q[:, :CHECKED], heads.q_scale[:, :, :CHECKED]
    heads = dataclasses.replace(heads, q=q, q_scale=q_scale, tokens=few)
    scale = 1 / math.sqrt(q.shape[3])
    return ATTENTION_INT8_FP8(
        heads, scale=scale, streams=(heads.tokens,), implementation="reference"
    )[0]


def quantized(q, k, v) -> QuantizedHeads:
    """Quantize by the definition, values under a scale of each channel."""
    return quantize_heads(q, k, v, v_scale=value_scale(v))


def compile_all(work: Work, tune: bool, pool: ThreadPoolExecutor) -> dict[str, Future]:
    """Compile what a work needs, all at the same time; by name."""
    fields, rope = jax.eval_shape(functools.partial(make_inputs, work=work), jax.random.key(0))
    qkv = jax.eval_shape(functools.partial(pass_bf16, work=work), fields, rope)
    heads = jax.eval_shape(functools.partial(pass_reference, work=work), fields, rope)
    scaled = jax.eval_shape(quantized, *qkv)
    calls = {
        "pass bf16": (functools.partial(pass_bf16, work=work), fields, rope),
        "pass int8": (functools.partial(pass_int8, work=work), fields, rope),
        "pass reference": (functools.partial(pass_reference, work=work), fields, rope),
        "bf16": (attention_bf16, *qkv),
        "int8": (attention_int8, heads),
        "scaled": (attention_int8, scaled),
        "quantized": (quantized, *qkv),
        "32 bits": (attention_32, *qkv),
        "reference": (attention_reference, heads),
        "reference scaled": (attention_reference, scaled),
    }
    if tune:
        for config in mosaic_gpu.search_space(sum(work.tokens)):
            calls[f"int8 {config}"] = (functools.partial(attention_int8, config=config), heads)
        for config in triton_8bit.SEARCH_SPACE:
            run = functools.partial(pass_int8, work=work, config=config)
            calls[f"pass int8 {config}"] = (run, fields, rope)
    return {name: pool.submit(compile_call, *call) for name, call in calls.items()}


def compile_call(function: Callable, *arguments) -> Callable:
    """Return the function compiled for arguments of these shapes."""
    return jax.jit(function).lower(*arguments).compile()


# ---- checks


@jax.jit
def compare(found: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the relative error and the gain of a result."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    size = jnp.sum(wanted**2)
    return jnp.sqrt(jnp.sum((found - wanted) ** 2) / size), jnp.sum(found * wanted) / size


def check_8_bits(found, wanted, by_definition) -> tuple[dict[str, float], bool]:
    """Compare with float32 attention, and with the definition's."""
    error, gain = map(float, compare(some(found), wanted))
    to_reference = float(compare(found[:, : by_definition.shape[1]], by_definition)[0])
    checks = {"error": error, "gain": gain, "to reference": to_reference}
    # So written that a NaN is wrong.
    right = error <= ERROR and GAIN[0] <= gain <= GAIN[1] and to_reference <= TO_REFERENCE
    return checks, not right


def check_bf16(found, wanted) -> tuple[dict[str, float], bool]:
    """Compare with float32 attention; both p and the result are rounded to bfloat16."""
    error, gain = map(float, compare(some(found), wanted))
    return {"error": error, "gain": gain}, not error <= 0.004


def check_pass(found: QuantizedHeads, wanted: QuantizedHeads) -> tuple[dict[str, float], bool]:
    """Compare codes with the definition's."""
    checks = {}
    for name in ("q", "k", "v"):
        codes = (getattr(heads, name).astype(jnp.float32) for heads in (found, wanted))
        checks[f"{name} differing"] = float(jnp.mean(jnp.not_equal(*codes)))
    for name in ("q_scale", "k_scale"):
        scales = (getattr(heads, name) for heads in (found, wanted))
        checks[name] = float(compare(*scales)[0])
    right = all(value <= (1e-5 if "scale" in name else DIFFERING) for name, value in checks.items())
    return checks, not right


# ---- the run


def run_work(key: jax.Array, work: Work, futures: dict[str, Future], batches: int) -> Iterator[Row]:
    """Check and time all variants of a work; a variant that fails is a row with its error."""
    times: dict[str, float | None] = {}
    for variant in variants(key, work, futures):
        row = variant if isinstance(variant, Row) else run_variant(work, variant, batches)
        times[row.variant] = row.ms
        add_ratios(row, times)
        yield row


def variants(key: jax.Array, work: Work, futures: dict[str, Future]) -> Iterator[Variant | Row]:
    """Yield what to run, or a row for inputs that can't be made."""

    def variant(name: str, call: str, *arguments, **more) -> Variant:
        def run(*arguments):
            return futures[call].result()(*arguments)

        return Variant(name=name, run=run, arguments=arguments, **more)

    def wanted(*qkv):
        return futures["32 bits"].result()(*qkv)

    rate = {"operations": work.operations}
    try:
        fields, rope = make_inputs(key, work)
        qkv = futures["pass bf16"].result()(fields, rope)
        heads = futures["pass reference"].result()(fields, rope)
        right, by_definition = wanted(*qkv), futures["reference"].result()(heads)
    except Exception as error:
        yield failed(Row(work=work.name, variant="inputs"), error)
        return
    check = functools.partial(check_bf16, wanted=right)
    yield variant("bf16", "bf16", *qkv, check=check, **rate)
    yield variant("pass bf16", "pass bf16", fields, rope)
    check = functools.partial(check_pass, wanted=heads)
    for call in (name for name in futures if name.startswith("pass int8")):
        yield variant(call, call, fields, rope, check=check)
    check = functools.partial(check_8_bits, wanted=right, by_definition=by_definition)
    for call in (name for name in futures if name.startswith("int8")):
        yield variant(call, call, heads, check=check, **rate)
    try:
        for name, data in (("scaled values", qkv), ("outliers", make_outliers(key, work))):
            heads = futures["quantized"].result()(*data)
            by_definition = futures["reference scaled"].result()(heads)
            check = functools.partial(
                check_8_bits, wanted=wanted(*data), by_definition=by_definition
            )
            yield variant(f"int8 {name}", "scaled", heads, check=check, timed=False)
    except Exception as error:
        yield failed(Row(work=work.name, variant="outliers"), error)


def run_variant(work: Work, variant: Variant, batches: int) -> Row:
    """Check a variant, then time it."""
    row = Row(work=work.name, variant=variant.name)
    try:
        if variant.check is not None:
            row.checks, row.wrong = variant.check(variant.run(*variant.arguments))
        if variant.timed:
            seconds = timing.measure(variant.run, [variant.arguments] * 3, batches=batches)
            row.times_ms = [1e3 * s for s in seconds]
            row.ms = statistics.median(row.times_ms)
            row.tops = variant.operations / row.ms / 1e9 or None
    except Exception as error:
        failed(row, error)
    return row


def failed(row: Row, error: Exception) -> Row:
    """Note an error in a row and print it."""
    row.error = f"{type(error).__name__}: {str(error)[:500]}"
    lines = "".join(traceback.format_exception(error)).splitlines()
    print(f"FAILED {row.work} {row.variant}", *lines[-12:], sep="\n    ", flush=True)
    return row


def add_ratios(row: Row, times: dict[str, float | None]) -> None:
    """Compare a row of 8-bit attention with bf16, alone and with the passes before."""
    base, passes = times.get("bf16"), (times.get("pass bf16"), times.get("pass int8"))
    if row.ms and base and row.tops and row.variant != "bf16":
        row.of_cudnn = base / row.ms
        if all(passes):
            row.of_bf16 = (base + passes[0]) / (row.ms + passes[1])


def show(row: Row) -> None:
    """Print a row."""
    line = f"{row.work:26} {row.variant:32}"
    line += f" {row.ms:8.4f} ms" if row.ms else " " * 12
    line += f" {row.tops:6.0f} TOP/s" if row.tops else ""
    line += f" {row.of_cudnn:5.2f} of cuDNN" if row.of_cudnn else ""
    line += f" {row.of_bf16:5.2f} of bf16" if row.of_bf16 else ""
    line += "".join(f"  {name} {value:.3g}" for name, value in row.checks.items())
    print(line + "  WRONG" * row.wrong + "  FAILED" * bool(row.error), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
