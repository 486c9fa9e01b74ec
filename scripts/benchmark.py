"""Time the matmul and quantize backends on real shapes, after checking them.

    python scripts/benchmark.py --shapes flux-mlp-up flux-mlp-down --out benchmark.json

Fresh random inputs. Integers are compared with == on activations of two +-1 a row, whose sums are
exact in bfloat16; then the whole result, also with ==. A backend that fails says why, and the
others go on. Times are medians over batches of calls; decoded weights are 4-bit, group 16, unless
the name says otherwise. `of bf16` and `of int8` are speeds relative to XLA's bfloat16 dot and to
the fastest plain int8 kernel of this run.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import codec
from pallas_kernels.dispatch import Backend, Operation
from pallas_kernels.matmul import MATMUL, MATMUL_INT8, mosaic_gpu, reference, xla
from pallas_kernels.matmul.shapes import SHAPES, Shape
from pallas_kernels.quantize import QUANTIZE
from pallas_kernels.quantize import reference as quantize_reference

DEFAULT_SHAPES = ("flux-mlp-up", "flux-mlp-down", "flux-single-in", "flux-single-out", "flux-adaln")
SWEEP = [
    mosaic_gpu.Config(tokens=tokens, stages=stages, snake=snake)
    for tokens, stages in ((256, 4), (224, 5), (192, 4), (192, 5))
    for snake in (4, 16)
]
QUANTIZE_SHAPES = ((4608, 3072), (4608, 12288))


@dataclasses.dataclass(kw_only=True)
class Row:
    """One line of the table."""

    work: str  # name of the shape, or "quantize"
    backend: str  # what ran
    exact: bool | None = None  # equal to the reference; None where it wasn't compared
    ms: float | None = None  # median time of a call
    times_ms: list[float] = dataclasses.field(default_factory=list)  # of each batch, a call
    operations: float = 0.0  # multiplications and additions
    bytes_moved: float = 0.0  # each input read once, each output written once
    of_bf16: float | None = None  # speed over the bfloat16 dot's
    of_int8: float | None = None  # speed over the fastest plain int8 matmul's
    error: str | None = None  # why it did not run


def main() -> int:
    """Run what the command line asks for; the exit status is 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--calls", type=int, default=20, help="calls a batch")
    parser.add_argument("--batches", type=int, default=7, help="batches whose median counts")
    parser.add_argument("--only", help="only backends whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="also time other tile sizes")
    parser.add_argument("--no-quantize", action="store_true", help="matmuls only")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}", flush=True)
    rows = []
    copy_rate = time_copy(options)
    print(f"copy: {copy_rate / 1e12:.2f} TB/s read plus write", flush=True)
    for name in options.shapes:
        rows += run_matmuls(name, SHAPES[name], options)
    if not options.no_quantize:
        for m, k in QUANTIZE_SHAPES:
            rows += run_quantize(m, k, options, copy_rate)
    if options.out:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device.device_kind,
            "jax": jax.__version__,
            "copy_bytes_per_second": copy_rate,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row.error or row.exact is False for row in rows))


def run_matmuls(name: str, shape: Shape, options) -> list[Row]:
    """Check and time every backend that can run a shape."""
    m, n, k = shape.m, shape.n, shape.k
    work = {"operations": 2.0 * m * n * k}
    weights = {"bfloat16": 2.0, "int8": 1.0, "g16": 0.53125, "g32": 0.515625}
    # A short call would time its launch: several, on different weights, go into one program.
    at_once = 8 if m <= 64 else 1
    sets = [make_operands(seed, m, n, k) for seed in range(max(2, at_once))]
    rows = []
    for backend, function, prepare, check in candidates(sets[0], options.sweep and m > 64):
        if options.only and options.only not in backend:
            continue
        kind = next((kind for kind in weights if kind in backend), "g16")
        x_bytes = 2.0 if kind == "bfloat16" else 1.0
        moved = m * k * x_bytes + n * k * weights[kind] + 2.0 * m * n
        row = Row(work=name, backend=backend, bytes_moved=moved, **work)
        rows.append(row)
        with report_failure(row):
            jitted = jax.jit(function)
            row.exact = check(jitted, prepare) if check else None
            arguments = [prepare(s) for s in sets]
            if at_once > 1:
                jitted = jax.jit(lambda *many, function=function: [function(*a) for a in many])
                arguments = [arguments]
            time_row(row, jitted, arguments, options, at_once)
        base = {r.backend: r.ms for r in rows if r.ms}
        plain = [ms for key, ms in base.items() if key.startswith("int8")]
        if row.ms:
            row.of_bf16 = base.get("bfloat16 xla", float("nan")) / row.ms
            row.of_int8 = min(plain) / row.ms if plain else None
        show(row)
    return rows


def candidates(operands: dict, sweep: bool):
    """Yield name, function, how to make its arguments, and how to check it, the fastest first."""
    x, w = operands["x"], operands["w"]

    def plain(s):
        return s["x"], s["w"], s["x_scale"], s["w_scale"]

    check_plain = functools.partial(check_exact, operands)

    def bfloat16(s):
        return s["x"].astype(jnp.bfloat16), s["w"].astype(jnp.bfloat16)

    yield "bfloat16 xla", bf16_dot, bfloat16, None
    for backend in able(MATMUL_INT8, x, w):
        if backend.name != "xla":
            run = functools.partial(backend.run, out_dtype=jnp.bfloat16)
            yield f"int8 {backend.name}", run, plain, check_plain
    for group_size, step in ((16, "power"), (32, "power"), (16, "integer")):
        options = {"group_size": group_size, "step": step}
        check = functools.partial(check_exact, operands, **options)
        label = f"g{group_size}" + (" integer step" if step == "integer" else "")
        packed = functools.partial(pack_operands, **options)
        for backend in able(MATMUL, x, w, **options):
            name = f"{label} {backend.name}"
            if backend.name == "mosaic_gpu":
                arrange = functools.partial(tile, **options)
                yield name, mosaic_gpu.matmul_tiled, arrange, check
                for config in SWEEP if sweep and label == "g16" else ():
                    run = functools.partial(mosaic_gpu.matmul_tiled, config=config)
                    label_of = f"{label} {config.tokens}x{config.stages} snake {config.snake}"
                    yield label_of, run, arrange, None
            elif step == "power" and group_size == 16:
                run = functools.partial(backend.run, out_dtype=jnp.bfloat16, **options)
                yield name, run, packed, check
    run = functools.partial(xla.matmul_int8, out_dtype=jnp.bfloat16)
    yield "int8 xla", run, plain, check_plain


def able(operation: Operation, *args, **kwargs) -> list[Backend]:
    """Return the backends that can run here, without the reference."""

    def runs(backend: Backend) -> bool:
        try:
            operation.choose(backend.name, *args, **kwargs)
        except ValueError:
            return False
        return backend.name != "reference"

    return [backend for backend in operation.backends if runs(backend)]


def bf16_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply in bfloat16 as XLA does, the baseline."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.bfloat16)


def make_operands(seed: int, m: int, n: int, k: int) -> dict:
    """Return random int8 x [m, k] and w [n, k], and positive scales."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-112, 113, (m, k), dtype=np.int8)
    w = rng.integers(-112, 113, (n, k), dtype=np.int8)
    scales = [rng.uniform(0.5, 2, (rows, 1)).astype(np.float32) for rows in (m, n)]
    names = ("x", "w", "x_scale", "w_scale")
    return dict(zip(names, map(jnp.asarray, (x, w, *scales)), strict=True))


@functools.partial(jax.jit, static_argnames=("group_size", "step"))
def encode(w: jax.Array, *, group_size: int, step: str) -> tuple[jax.Array, jax.Array]:
    """Return packed codes and shifts of int8 weights."""
    codes, shifts = codec.encode(w, group_size=group_size, step=step)
    return codec.pack(codes), codec.pack(shifts)


def pack_operands(operands: dict, *, group_size: int, step: str) -> tuple:
    """Return the arguments of a 4-bit matmul."""
    packed = encode(operands["w"], group_size=group_size, step=step)
    return operands["x"], *packed, operands["x_scale"], operands["w_scale"]


def tile(operands: dict, *, group_size: int, step: str) -> tuple:
    """Return the arguments of a 4-bit matmul whose weights are in the kernel's own order."""
    x, codes, shifts, *scales = pack_operands(operands, group_size=group_size, step=step)
    prepare = jax.jit(mosaic_gpu.prepare_weights, static_argnames=("group_size", "step"))
    return x, prepare(codes, shifts, group_size=group_size, step=step), *scales


def check_exact(operands: dict, function: Callable, prepare: Callable, **options) -> bool:
    """Compare a matmul with the integers of XLA's int8 dot, on sparse and on random activations."""
    w = operands["w"]
    if options:
        codes, shifts = encode(w, **options)
        w = jax.jit(functools.partial(codec.decode_packed, **options))(codes, shifts)
    exact = True
    for x, unit in ((two_a_row(operands["x"].shape), True), (operands["x"], False)):
        changed = dict(operands, x=x)
        if unit:
            changed |= {name: jnp.ones_like(operands[name]) for name in ("x_scale", "w_scale")}
        wanted = expected(x, w, changed["x_scale"], changed["w_scale"])
        found = function(*prepare(changed))
        same = np.asarray(jnp.mean(found == wanted))
        if same < 1:
            kind = "integers" if unit else "results"
            print(
                f"    {kind}: {100 * float(same):.3f} % equal; first ones "
                f"{found[0, :6].tolist()} wanted {wanted[0, :6].tolist()}",
                flush=True,
            )
        exact = exact and bool(same == 1)
    return exact


@jax.jit
def expected(x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array) -> jax.Array:
    """Return the result by XLA's int8 dot."""
    return reference.epilogue(
        xla.int8_dot(x, w), w, x_scale, w_scale, bias=None, x_lo=None, out_dtype=jnp.bfloat16
    )


def two_a_row(shape: tuple[int, int]) -> jax.Array:
    """Return int8 zeros with two elements of each row +-1."""
    rng = np.random.default_rng(0)
    x = np.zeros(shape, np.int8)
    for _ in range(2):
        columns = rng.integers(shape[1], size=shape[0])
        x[np.arange(shape[0]), columns] = rng.choice([-1, 1], size=shape[0])
    return jnp.asarray(x)


def run_quantize(m: int, k: int, options, copy_rate: float) -> list[Row]:
    """Check and time the quantize backends."""
    rng = np.random.default_rng(0)
    sets = [(jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16),) for _ in range(2)]
    rows = []
    defaults = {"bits": 4, "group_size": 16, "step": "power", "rounding": "nearest"}
    for change in (
        {"range": "absmax"},
        {"range": "absmax", "step": "integer"},
        {"range": "minmax"},
    ):
        settings = defaults | change
        wanted = jax.jit(functools.partial(quantize_reference.quantize, **settings))(*sets[0])
        for backend in [*able(QUANTIZE, *sets[0]), QUANTIZE.backends[-1]]:
            kind = "-".join(change.values())
            row = Row(work=f"quantize {m}x{k} {kind}", backend=backend.name)
            row.bytes_moved = 3.0 * m * k
            rows.append(row)
            with report_failure(row):
                jitted = jax.jit(functools.partial(backend.run, **settings))
                found = jitted(*sets[0])
                same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), found, wanted)
                row.exact = all(jax.tree.leaves(same))
                time_row(row, jitted, sets, options)
            show(row, copy_rate)
    return rows


def time_copy(options) -> float:
    """Return bytes a second of a large copy, read plus write."""
    sets = [(jnp.full((1 << 28,), i, jnp.int32),) for i in range(2)]
    row = Row(work="copy", backend="xla")
    time_row(row, jax.jit(lambda x: x + 1), sets, options)
    return 2 * 4 * (1 << 28) / (row.ms / 1e3)


def time_row(row: Row, function: Callable, sets: list[tuple], options, at_once: int = 1) -> None:
    """Fill in a row's times; calls rotate among the sets of arguments and do `at_once` each."""
    calls = options.calls
    jax.block_until_ready([function(*args) for args in sets])
    for _ in range(options.batches):
        start = time.perf_counter()
        for i in range(calls):
            result = function(*sets[i % len(sets)])
        jax.block_until_ready(result)
        row.times_ms.append((time.perf_counter() - start) / (calls * at_once) * 1e3)
    row.ms = statistics.median(row.times_ms)


class report_failure:
    """Turn an exception into the row's error, with the last lines of its traceback printed."""

    def __init__(self, row: Row):
        self.row = row

    def __enter__(self):
        """Do nothing yet."""

    def __exit__(self, kind, error, trace):
        """Note an error, unless the user interrupted."""
        if error is None or not isinstance(error, Exception):
            return False
        self.row.error = f"{kind.__name__}: {str(error)[:500]}"
        lines = "".join(traceback.format_exception(error)).splitlines()
        print(f"FAILED {self.row.work} {self.row.backend}", *lines[-12:], sep="\n    ", flush=True)
        return True


def show(row: Row, copy_rate: float | None = None) -> None:
    """Print a row."""
    exact = {None: "", True: "exact", False: "WRONG"}[row.exact]
    line = f"{row.work:32} {row.backend:24} {exact:6}"
    if row.ms:
        line += f" {row.ms:8.4f} ms {row.bytes_moved / row.ms / 1e6:7.0f} GB/s"
        if row.operations:
            line += f" {row.operations / row.ms / 1e9:7.0f} TOP/s"
        if row.of_bf16:
            line += f" {row.of_bf16:5.2f} of bf16"
        if row.of_int8:
            line += f" {row.of_int8:5.2f} of int8"
        if copy_rate:
            line += f" {100 * row.bytes_moved / (row.ms / 1e3) / copy_rate:5.0f} % of copy"
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
