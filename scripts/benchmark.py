"""Time the matmul and quantize backends on real shapes, after checking them.

    python scripts/benchmark.py --shapes flux-mlp-up flux-mlp-down --out benchmark.json

Fresh random inputs. Integers are compared with == on activations of two +-1 a row, whose sums are
exact in bfloat16, then the whole result within one rounding. Times are medians over batches of
calls: the device's own record of its kernels where the profiler gives one, else wall time. 4-bit
weights have groups of 16 unless the name says otherwise, and lie in the order that the kernel reads
("prepared") where it has one. `of bf16` and `of int8` are speeds relative to XLA's bfloat16 dot on
the same values and to the fastest plain int8 kernel, both of this run.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import codec, device, timing
from pallas_kernels.dispatch import Backend, Operation
from pallas_kernels.matmul import MATMUL, MATMUL_INT8, reference, xla
from pallas_kernels.matmul.shapes import SHAPES, Shape
from pallas_kernels.quantize import QUANTIZE
from pallas_kernels.quantize import reference as quantize_reference

QUANTIZE_SHAPES = ((4608, 3072), (4608, 12288), (4608, 15360))
FORMATS = ({"group_size": 16, "step": "power"}, {"group_size": 32, "step": "power"})
FORMATS += ({"group_size": 16, "step": "integer"},)
COPIED = 1 << 28  # int32 elements of the copy that measures bandwidth
SETS_BYTES = 200e6  # of weights that calls rotate among: more than a cache holds
# Operations a second of the matrix units, dense, from the makers' data sheets.
PEAK = {
    "H100": {"int8": 1979e12, "bfloat16": 989e12},
    "H200": {"int8": 1979e12, "bfloat16": 989e12},
    "A100": {"int8": 624e12, "bfloat16": 312e12},
    "L4": {"int8": 242e12, "bfloat16": 121e12},
    "TPU v5 lite": {"int8": 394e12, "bfloat16": 197e12},
    "TPU v5p": {"int8": 918e12, "bfloat16": 459e12},
    "TPU v6 lite": {"int8": 1836e12, "bfloat16": 918e12},
}


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
    of_limit: float | None = None  # of the time that bandwidth and matrix units allow
    error: str | None = None  # why it did not run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Something to check and time."""

    name: str  # of the backend and format
    sets: list[tuple]  # of arguments
    compiled: Future  # of the function, for one set
    check: Callable[[Callable], bool] | None  # whether the compiled function's results are right
    weight_bytes: float  # of an element of w


def main() -> int:
    """Run what the command line asks for; the exit status is 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--batches", type=int, default=5, help="batches whose median counts")
    parser.add_argument("--only", help="only backends whose name contains this")
    parser.add_argument("--no-quantize", action="store_true", help="matmuls only")
    options = parser.parse_args()
    chip = jax.devices()[0]
    print(f"{chip.device_kind}, JAX {jax.__version__}", flush=True)
    copy_rate = time_copy(options.batches)
    print(f"copy: {copy_rate / 1e12:.2f} TB/s read plus write", flush=True)
    rows = []
    with ThreadPoolExecutor() as pool:
        for name in options.shapes:
            rows += run_matmuls(name, SHAPES[name], options, copy_rate, pool)
        for m, k in () if options.no_quantize else QUANTIZE_SHAPES:
            rows += run_quantize(m, k, options, copy_rate)
    if options.out:
        result = {
            "command": " ".join(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": chip.device_kind,
            "jax": jax.__version__,
            "copy_bytes_per_second": copy_rate,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row.error or row.exact is False for row in rows))


def run_matmuls(name: str, shape: Shape, options, copy_rate: float, pool) -> list[Row]:
    """Check and time every backend that can run a shape."""
    m, n, k = shape.m, shape.n, shape.k
    peak = next((p for chip, p in PEAK.items() if chip in device.current().kind), {})
    rows = []
    for case in matmul_cases(shape, options.only, pool):
        bfloat16 = case.weight_bytes == 2
        moved = m * k * (2 if bfloat16 else 1) + n * k * case.weight_bytes + 2.0 * m * n
        row = Row(work=name, backend=case.name, operations=2.0 * m * n * k, bytes_moved=moved)
        rows.append(row)
        with report_failure(row):
            function = case.compiled.result()
            row.exact = case.check(function) if case.check else None
            time_row(row, function, case.sets, options.batches)
            rate = peak.get("bfloat16" if bfloat16 else "int8", float("inf"))
            floor = max(moved / copy_rate, row.operations / rate)
            row.of_limit = floor * 1e3 / row.ms
        base = {r.backend: r.ms for r in rows if r.ms}
        plain = [ms for key, ms in base.items() if key.startswith("int8")]
        if row.ms:
            row.of_bf16 = base.get("bfloat16 xla", float("nan")) / row.ms
            row.of_int8 = min(plain) / row.ms if plain else None
        show(row)
    return rows


def matmul_cases(shape: Shape, only: str | None, pool) -> Iterator[Case]:
    """Yield the cases of a shape; all of them compile at the same time."""
    m, n, k = shape.m, shape.n, shape.k
    count = max(2, min(8, -(-int(SETS_BYTES) // (n * k))))
    operands = [make_operands(seed, m, n, k) for seed in range(count)]
    plans = []

    def plan(name, function, arrange, weight_bytes, check=None):
        if not only or only in name:
            sets = [arrange(**o) for o in operands]
            compiled = pool.submit(compile_function, function, sets[0])
            verify = check and functools.partial(check, operands[0], arrange)
            plans.append(
                Case(
                    name=name, sets=sets, compiled=compiled, check=verify, weight_bytes=weight_bytes
                )
            )

    plan("bfloat16 xla", bf16_dot, to_bfloat16, 2.0)
    x, w = operands[0]["x"], operands[0]["w"]
    for backend in able(MATMUL_INT8, x, w):
        check = functools.partial(check_exact, plain=True)
        plan(f"int8 {backend.name}", backend.run, as_they_are, 1.0, check)
        if backend.prepare:
            arrange = functools.partial(prepare_int8, backend=backend)
            plan(f"int8 {backend.name} prepared", backend.run_prepared, arrange, 1.0, check)
    for options in FORMATS:
        label = f"g{options['group_size']}" + " integer" * (options["step"] == "integer")
        stored = 0.5 + 0.5 / options["group_size"]
        check = functools.partial(check_exact, **options)
        for backend in able(MATMUL, x, w, **options):
            if backend.prepare:
                arrange = functools.partial(prepare, backend=backend, **options)
                plan(f"{label} {backend.name}", backend.run_prepared, arrange, stored, check)
            elif options == FORMATS[0] or "few_rows" in backend.name:
                arrange = functools.partial(pack, **options)
                run = functools.partial(backend.run, **options)
                plan(f"{label} {backend.name}", run, arrange, stored, check)
    yield from plans


def compile_function(function: Callable, arguments: tuple) -> Callable:
    """Return the function compiled for one set of arguments."""
    return jax.jit(function).lower(*arguments).compile()


def able(operation: Operation, *args, **kwargs) -> list[Backend]:
    """Return the backends that can run here, without the reference."""

    def runs(backend: Backend) -> bool:
        return backend.why_not(device.current(), *args, **kwargs) is None

    return [b for b in operation.backends if b.name != "reference" and runs(b)]


def bf16_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply in bfloat16 as XLA does, the baseline."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.bfloat16)


def make_operands(seed: int, m: int, n: int, k: int) -> dict[str, jax.Array]:
    """Return random int8 x [m, k] and w [n, k], and positive scales."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "x": jax.random.randint(keys[0], (m, k), -112, 113, jnp.int8),
        "w": jax.random.randint(keys[1], (n, k), -112, 113, jnp.int8),
        "x_scale": jax.random.uniform(keys[2], (m, 1), jnp.float32, 0.5, 2),
        "w_scale": jax.random.uniform(keys[3], (n, 1), jnp.float32, 0.5, 2),
    }


def to_bfloat16(x, w, x_scale, w_scale) -> tuple:
    """Arguments of the bfloat16 dot."""
    return x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)


def as_they_are(x, w, x_scale, w_scale) -> tuple:
    """Arguments of an int8 matmul."""
    return x, w, x_scale, w_scale


def prepare_int8(x, w, x_scale, w_scale, *, backend: Backend) -> tuple:
    """Arguments of an int8 matmul whose weights are in the kernel's own order."""
    return x, jax.jit(backend.prepare)(w, w_scale), x_scale


def pack(x, w, x_scale, w_scale, **options) -> tuple:
    """Arguments of a 4-bit matmul."""
    return x, *encode(w, **options), x_scale, w_scale


def prepare(x, w, x_scale, w_scale, *, backend: Backend, **options) -> tuple:
    """Arguments of a 4-bit matmul whose weights are in the kernel's own order."""
    arrange = jax.jit(functools.partial(backend.prepare, k=x.shape[1], **options))
    return x, arrange(*encode(w, **options), w_scale), x_scale


@functools.partial(jax.jit, static_argnames=("group_size", "step"))
def encode(w: jax.Array, *, group_size: int, step: str) -> tuple[jax.Array, jax.Array]:
    """Return packed codes and shifts of int8 weights."""
    codes, shifts = codec.encode(w, group_size=group_size, step=step)
    return codec.pack(codes), codec.pack(shifts)


def check_exact(
    operands: dict, arrange: Callable, function: Callable, *, plain: bool = False, **options
) -> bool:
    """Compare integers with == on sparse activations, and random ones' results within a rounding.

    Two products of int8 are exact in bfloat16, so that scales of one leave the integers themselves.
    """
    w = operands["w"]
    if not plain:
        w = jax.jit(functools.partial(codec.decode_packed, **options))(*encode(w, **options))
    ones = {name: jnp.ones_like(operands[name]) for name in ("x_scale", "w_scale")}
    sparse = operands | ones | {"x": two_a_row(operands["x"].shape)}
    found, wanted = function(*arrange(**sparse)), expected(w=w, **without_w(sparse))
    if not bool(jnp.all(found == wanted)):
        return False
    found, wanted = function(*arrange(**operands)), expected(w=w, **without_w(operands))
    # A fused product and sum may round the float32 result, and so the bfloat16, the other way.
    near = jnp.abs(found - wanted) <= 2.0**-7 * jnp.abs(wanted)
    return bool(jnp.all(near)) and float(jnp.mean(found == wanted)) > 0.999


def without_w(operands: dict) -> dict:
    """Return all operands but the weights."""
    return {name: value for name, value in operands.items() if name != "w"}


@jax.jit
def expected(x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array) -> jax.Array:
    """Return the result by XLA's int8 dot."""
    return reference.epilogue(xla.int8_dot(x, w), w, x_scale, w_scale)


def two_a_row(shape: tuple[int, int]) -> jax.Array:
    """Return int8 zeros with two elements of each row +-1."""
    keys = jax.random.split(jax.random.key(1), 2)
    columns = jax.random.randint(keys[0], (shape[0], 2), 0, shape[1])
    signs = jax.random.rademacher(keys[1], (shape[0], 2), jnp.int8)
    return jnp.zeros(shape, jnp.int8).at[jnp.arange(shape[0])[:, None], columns].set(signs)


def run_quantize(m: int, k: int, options, copy_rate: float) -> list[Row]:
    """Check and time the quantize backends."""
    keys = jax.random.split(jax.random.key(0), 6)
    sets = [(jax.random.normal(key, (m, k), jnp.bfloat16),) for key in keys[:4]]
    shift, scale = (jax.random.normal(key, (k,), jnp.bfloat16) for key in keys[4:])
    rows = []
    for name, change in {
        "absmax": {},
        "minmax": {"range": "minmax"},
        "integer step": {"step": "integer"},
        "8 bits": {"bits": 8},
        "packed": {"packed": True},
        "norm": {"norm": (shift, scale)},
    }.items():
        settings = {"bits": 4, "group_size": 16, "step": "power", "rounding": "nearest"}
        settings |= {"range": "absmax"} | change
        wanted = jax.jit(functools.partial(quantize_reference.quantize, **settings))(*sets[0])
        for backend in able(QUANTIZE, *sets[0]):
            row = Row(work=f"quantize {m}x{k} {name}", backend=backend.name)
            row.bytes_moved = m * k * (2.53125 if name == "packed" else 3.0)
            rows.append(row)
            if options.only and options.only not in backend.name:
                continue
            with report_failure(row):
                function = jax.jit(functools.partial(backend.run, **settings))
                found = function(*sets[0])
                row.exact = all(
                    # A norm sums in an order of its own: values at a boundary may fall either way.
                    float(jnp.mean(a != b)) <= (1e-4 if name == "norm" else 0)
                    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
                    if a.dtype != jnp.float32 or name != "norm"
                )
                time_row(row, function, sets, options.batches)
                row.of_limit = row.bytes_moved / copy_rate * 1e3 / row.ms
            show(row)
    return rows


def time_copy(batches: int) -> float:
    """Return bytes a second of a large copy, read plus write."""
    sets = [(jnp.full((COPIED,), i, jnp.int32),) for i in range(2)]
    seconds = timing.measure(jax.jit(lambda x: x + 1), sets, batches=batches)
    return 2 * 4 * COPIED / statistics.median(seconds)


def time_row(row: Row, function: Callable, sets: list[tuple], batches: int) -> None:
    """Fill in a row's times."""
    row.times_ms = [1e3 * t for t in timing.measure(function, sets, batches=batches)]
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


def show(row: Row) -> None:
    """Print a row."""
    exact = {None: "", True: "exact", False: "WRONG"}[row.exact]
    line = f"{row.work:28} {row.backend:22} {exact:6}"
    if row.ms:
        line += f" {row.ms:8.4f} ms {row.bytes_moved / row.ms / 1e6:6.0f} GB/s"
        if row.operations:
            line += f" {row.operations / row.ms / 1e9:6.0f} TOP/s"
        for name in ("bf16", "int8"):
            ratio = getattr(row, f"of_{name}")
            line += f" {ratio:5.2f} of {name}" if ratio else ""
        line += f" {row.of_limit:5.0%} of limit" if row.of_limit else ""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
