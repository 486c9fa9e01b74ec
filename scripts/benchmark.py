"""Time the backends of every kernel on real shapes, after checking them.

    python scripts/benchmark.py --shapes flux-mlp-up flux-mlp-down --out benchmark.json

Fresh random inputs. Integers are compared with == on activations of two +-1 a row, whose sums are
exact in bfloat16, then the whole result within one rounding; what differs is marked and not timed,
and the exit status is 1. Times are medians over batches of calls: the device's own record of its
kernels where the profiler gives one, else wall time. 4-bit weights are of the kind that the name
says and lie in the order that the kernel reads ("prepared") where it has one; a branch is one of
rank 32 in bfloat16. "w4a16" multiplies bfloat16 by such weights, decoded in the call.
`of bf16` and, for 4-bit weights, `of int8` are speeds relative to XLA's bfloat16 dot on the same
values and to the fastest plain int8 kernel, both of this run.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import aot, codec, device, timing
from pallas_kernels.dispatch import Backend, Operation
from pallas_kernels.functions import Norm, Part
from pallas_kernels.matmul import MATMUL, MATMUL_INT8, xla
from pallas_kernels.matmul.dequantize import DEQUANTIZE
from pallas_kernels.matmul.shapes import SHAPES, Shape
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows
from pallas_kernels.qk_norm_rope import QK_NORM_ROPE, Stream
from pallas_kernels.quantize import QUANTIZE
from pallas_kernels.quantize import reference as quantize_reference
from pallas_kernels.quantize.channels import SIZES
from quartz_jax.cli import arguments as cli
from quartz_jax.io import provenance
from quartz_jax.io.files import check_output

QUANTIZE_SHAPES = ((4608, 3072), (4608, 12288), (4608, 15360))
# (tokens of each stream, columns) of FLUX.1's double-stream and single-stream blocks
QK_SHAPES = (((512, 4096), 9216), ((4608,), 21504))
HEADS, HEAD_DIM = 24, 128
# Share of results that may fall either way of a rounding: a norm sums in an order of its own (a few
# units in the last place of float32), GELU may be approximate (a few more, and a row's largest
# element moves all of the row); one such unit is 2**-16 of a bfloat16's.
DIFFERING = {"norm": 1e-4, "norm, rms": 1e-4, "gelu": 1e-3, "gated silu": 1e-3, "rotation": 1e-3}
# Of a block that is rotated then, every element may fall either way.
DIFFERING |= {f"{name}, Hadamard": 16 * share for name, share in DIFFERING.items()}
# Kinds of 4-bit weights, by name
STRETCHED = {"step": "integer", "levels": "stretched"}
FORMATS = {
    "g16": {"group_size": 16},
    "g32": {"group_size": 32},
    "g16 integer": {"group_size": 16, "step": "integer"},
    "g16 stretched": {"group_size": 16, **STRETCHED},
    "g8 stretched": {"group_size": 8, **STRETCHED},
}
ANY_BACKEND = ("g16", "g16 stretched")  # timed on backends that read the packed order too
BRANCH = "g16 stretched"  # also timed with a 16-bit branch
RANK = 32  # of the branch
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

    work: str  # name of the shape, or of the operation and its shape
    backend: str  # what ran
    exact: bool | None = None  # equal to the reference, else not timed; None: not compared
    ms: float | None = None  # median time of a call
    times_ms: list[float] = dataclasses.field(default_factory=list)  # of each batch, a call
    operations: float = 0.0  # multiplications and additions
    bytes_moved: float = 0.0  # each input read once, each output written once
    of_bf16: float | None = None  # speed over the bfloat16 dot's
    of_int8: float | None = None  # with 4-bit weights: speed over the fastest plain int8 matmul's
    of_limit: float | None = None  # of the time that bandwidth and matrix units allow
    error: str | None = None  # why it did not run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Something to check and time."""

    name: str  # of the backend and format
    function: Callable  # of one set of arguments
    arrange: Callable[..., tuple]  # int8 x and w to the function's arguments
    # (key, x, w, arrange, compiled function) to whether its results are right
    check: Callable[..., bool] | None = None
    weight_bytes: float  # of an element of w
    bfloat16: bool = False  # what the matrix units multiply, else int8


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status is 1 if something failed."""
    options = parse(argv)
    if options.out:
        check_output(options.out)
    check_only(options)
    environment = provenance.environment()
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    print(f"{environment['device']}, {versions}, seed {options.seed}", flush=True)
    copy_rate = time_copy(options.batches)
    print(f"copy: {copy_rate / 1e12:.2f} TB/s read plus write", flush=True)
    rows = []
    with ThreadPoolExecutor() as pool:
        for name in [] if options.passes_only else options.shapes:
            rows += run_matmuls(name, SHAPES[name], options, copy_rate, pool)
        if not options.matmuls_only:
            for m, k in QUANTIZE_SHAPES:
                rows += run_quantize(m * options.batch, k, options, copy_rate)
            for tokens, columns in QK_SHAPES:
                rows += run_qk_norm_rope(tokens, columns, options, copy_rate)
    if options.out:
        result = {
            "environment": environment,
            "seed": options.seed,
            "copy_bytes_per_second": copy_rate,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        provenance.write_results(options.out, result)
    bad = [f"{row.work} {row.backend}" for row in rows if row.error or row.exact is False]
    if bad:
        print("error: not timed, since wrong or failed:", "; ".join(bad), file=sys.stderr)
    return int(bool(bad))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--out", type=Path, help="JSON file for the results")
    add("--batch", type=cli.positive, default=1, help="images, of which each has its own norm")
    add("--batches", type=cli.positive, default=5, help="batches whose median counts")
    add("--only", nargs="+", default=[""], help="only backends whose name contains one of these")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--matmuls-only", action="store_true", help="neither quantize nor qk_norm_rope"
    )
    only.add_argument("--passes-only", action="store_true", help="these two alone")
    cli.add_seed(parser)
    return parser.parse_args(argv)


def check_only(options: argparse.Namespace) -> None:
    """Raise ValueError if `--only` leaves nothing to time."""
    shapes = [] if options.passes_only else options.shapes
    names = [case.name for name in shapes for case in matmul_cases(SHAPES[name])]
    if not options.matmuls_only:
        for shape in QUANTIZE_SHAPES:
            names += [b.name for b in able(QUANTIZE, jax.ShapeDtypeStruct(shape, jnp.bfloat16))]
        names += [b.name for shape in QK_SHAPES for b in qk_backends(*shape)]
    if not any(is_asked(options, name) for name in names):
        known, asked = ", ".join(dict.fromkeys(names)), " ".join(options.only)
        raise ValueError(f"--only {asked!r} is in no name of what runs here: {known}")


def is_asked(options: argparse.Namespace, name: str) -> bool:
    """Whether `--only` leaves a backend's name."""
    return any(part in name for part in options.only)


def run_matmuls(name: str, shape: Shape, options, copy_rate: float, pool) -> list[Row]:
    """Check and time every backend that can run a shape; all of them compile at the same time."""
    m, n, k = shape.m, shape.n, shape.k
    peak = next((p for chip, p in PEAK.items() if chip in device.current().kind), {})
    cases = [case for case in matmul_cases(shape) if is_asked(options, case.name)]
    key, *keys = jax.random.split(jax.random.key(options.seed), 1 + weight_sets(n, k, 8))
    operands = [make_operands(key, m, n, k) for key in keys if cases]
    sets = [[case.arrange(*pair) for pair in operands] for case in cases]
    compiled = [
        pool.submit(compile_function, case.function, arguments[0])
        for case, arguments in zip(cases, sets, strict=True)
    ]
    rows = []
    for case, arguments, future in zip(cases, sets, compiled, strict=True):
        moved = m * k * (2 if case.bfloat16 else 1) + n * k * case.weight_bytes + 2.0 * m * n
        row = Row(work=name, backend=case.name, operations=2.0 * m * n * k, bytes_moved=moved)
        rows.append(row)
        with report_failure(row):
            function = future.result()
            if case.check:
                row.exact = case.check(key, *operands[0], case.arrange, function)
            rate = peak.get("bfloat16" if case.bfloat16 else "int8", float("inf"))
            floor = max(moved / copy_rate, row.operations / rate)
            time_row(row, function, arguments, options.batches, floor)
        base = {r.backend: r.ms for r in rows if r.ms}
        plain = [ms for name, ms in base.items() if name.startswith("int8")]
        if row.ms and "bfloat16 xla" in base:
            row.of_bf16 = base["bfloat16 xla"] / row.ms
        if row.ms and plain and case.weight_bytes < 1 and not case.bfloat16:
            row.of_int8 = min(plain) / row.ms
        show(row)
    return rows


def matmul_cases(shape: Shape) -> Iterator[Case]:
    """Yield what can run a shape here."""
    x, w = aot.abstract_rows(shape.m, shape.k), aot.abstract_rows(shape.n, shape.k)
    in_16_bits = {"arrange": to_bfloat16, "weight_bytes": 2.0, "bfloat16": True}
    yield Case(name="bfloat16 xla", function=bf16_dot, **in_16_bits)
    for backend in able(MATMUL_INT8, x, w, Epilogue()):
        rest = {"check": check_exact, "weight_bytes": 1.0}
        name, run = f"int8 {backend.name}", call(backend.run)
        yield Case(name=name, function=run, arrange=lambda x, w: (x, w), **rest)
        if backend.prepare:
            arrange, run = functools.partial(prepared, backend), call(backend.run_prepared)
            yield Case(name=f"{name} prepared", function=run, arrange=arrange, **rest)
    for label, kind in FORMATS.items():
        yield from packed_cases(label, kind, x, w)
    yield from dequantized_cases(FORMATS[BRANCH], w)


def dequantized_cases(kind: dict, w: Int8Rows) -> Iterator[Case]:
    """Yield what can multiply bfloat16 by weights in 4 bits, which are decoded to bfloat16."""
    rest = {"weight_bytes": 0.5 + 0.5 / kind["group_size"], "bfloat16": True}
    for backend in able(DEQUANTIZE, aot.abstract_packed(*w.shape, **kind), jnp.bfloat16):
        yield Case(
            name=f"w4a16 {backend.name}",
            function=functools.partial(dequantized_dot, backend),
            arrange=lambda x, w: (x.values.astype(jnp.bfloat16), encode(w, **kind)),
            check=functools.partial(check_weights, backend, kind=kind),
            **rest,
        )


def dequantized_dot(backend: Backend, x: jax.Array, w: PackedRows) -> jax.Array:
    """Decode the weights and multiply."""
    return bf16_dot(x, backend.run(w, jnp.bfloat16))


def check_weights(
    backend: Backend, key: jax.Array, x: Int8Rows, w: Int8Rows, *arguments, kind: dict
) -> bool:
    """Compare decoded weights with XLA's, with ==."""
    packed = encode(w, **kind)
    backends = backend, DEQUANTIZE.backend("xla")
    found, right = (jax.jit(lambda w, run=b.run: run(w, jnp.bfloat16))(packed) for b in backends)
    return bool(jnp.all(found == right))


def packed_cases(label: str, kind: dict, x: Int8Rows, w: Int8Rows) -> Iterator[Case]:
    """Yield what can multiply shapes of x and w, the latter in 4 bits."""
    rest = {"weight_bytes": 0.5 + 0.5 / kind["group_size"]}
    rest["check"] = functools.partial(check_exact, kind=kind)
    packed = aot.abstract_packed(*w.shape, **kind)
    for backend in able(MATMUL, x, packed, Epilogue()):
        name = f"{label} {backend.name}"
        if backend.prepare:
            arrange, run = functools.partial(prepared, backend, kind=kind), backend.run_prepared
        elif label in ANY_BACKEND or "few_rows" in backend.name:
            arrange, run = functools.partial(pack, kind=kind), backend.run
        else:
            continue
        yield Case(name=name, function=call(run), arrange=arrange, **rest)
        branch = make_branch(x, w)
        if label == BRANCH and backend in able(MATMUL, x, packed, Epilogue(branch=branch)):
            arrange = functools.partial(add_branch, arrange)
            name = f"{label} branch {backend.name}"
            yield Case(name=name, function=call(run), arrange=arrange, **rest)


def call(run: Callable) -> Callable:
    """Return a backend's function of x, w and perhaps a branch."""
    return lambda x, w, branch=None: run(x, w, Epilogue(branch=branch))


def weight_sets(n: int, k: int, limit: int) -> int:
    """Return how many sets of int8 weights [n, k] calls rotate among, at least 2."""
    return max(2, min(limit, -(-int(SETS_BYTES) // (n * k))))


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


def make_operands(key: jax.Array, m: int, n: int, k: int) -> tuple[Int8Rows, Int8Rows]:
    """Return random x [m, k] and w [n, k] under positive scales."""
    keys = jax.random.split(key, 4)

    def rows(values_key, scale_key, rows):
        return Int8Rows(
            values=jax.random.randint(values_key, (rows, k), -112, 113, jnp.int8),
            scale=jax.random.uniform(scale_key, (rows, 1), jnp.float32, 0.5, 2),
        )

    return rows(keys[0], keys[2], m), rows(keys[1], keys[3], n)


def to_bfloat16(x: Int8Rows, w: Int8Rows) -> tuple:
    """Arguments of the bfloat16 dot."""
    return x.values.astype(jnp.bfloat16), w.values.astype(jnp.bfloat16)


def prepared(backend: Backend, x: Int8Rows, w: Int8Rows, kind: dict | None = None) -> tuple:
    """Arguments of a matmul whose weights, int8 or packed, are in the kernel's own order."""
    return x, jax.jit(backend.prepare)(encode(w, **kind) if kind else w)


def pack(x: Int8Rows, w: Int8Rows, kind: dict) -> tuple:
    """Arguments of a 4-bit matmul."""
    return x, encode(w, **kind)


def add_branch(arrange: Callable, x: Int8Rows, w: Int8Rows) -> tuple:
    """Arguments with a branch behind them."""
    return *arrange(x, w), make_branch(x, w)


def make_branch(x: Int8Rows, w: Int8Rows) -> Branch:
    """Return a branch of integers, whose products' sums float32 holds; of shapes, its shapes."""

    def make(x, w):
        sides = (rows.values[:, :RANK].astype(jnp.bfloat16) for rows in (x, w))
        return Branch(**dict(zip(("input", "up"), sides, strict=True)))

    abstract = isinstance(x.values, jax.ShapeDtypeStruct)
    return jax.eval_shape(make, x, w) if abstract else make(x, w)


@functools.partial(jax.jit, static_argnames=("group_size", "step", "levels"))
def encode(
    w: Int8Rows, *, group_size: int, step: str = "power", levels: str = "uniform"
) -> PackedRows:
    """Return int8 weights in 4 bits."""
    kind = {"group_size": group_size, "step": step, "levels": levels}
    codes, shifts = codec.encode(w.values, **kind)
    packed = {"codes": codec.pack(codes), "shifts": codec.pack(shifts), "scale": w.scale}
    return PackedRows(**packed, **kind, padding=-w.k % group_size)


def check_exact(
    key: jax.Array,
    x: Int8Rows,
    w: Int8Rows,
    arrange: Callable,
    function: Callable,
    *,
    kind: dict | None = None,
) -> bool:
    """Compare integers with == on sparse activations, and random ones' results within a rounding.

    Two products of int8 are exact in bfloat16, so that scales of one leave the integers themselves.
    """
    ones = Int8Rows(values=two_a_row(key, x.shape), scale=jnp.ones_like(x.scale))
    unscaled = dataclasses.replace(w, scale=jnp.ones_like(w.scale))
    for operands, exact in (((ones, unscaled), True), ((x, w), False)):
        arguments = arrange(*operands)
        weights = encode(operands[1], **kind) if kind else operands[1]
        found, right = function(*arguments), expected(operands[0], weights, *arguments[2:])
        if exact and not bool(jnp.all(found == right)):
            return False
    # A fused product and sum may round the float32 result, and so the bfloat16, the other way; the
    # branch may cancel the dot, which leaves float32's error of both.
    slack = float(jnp.max(jnp.abs(right))) * 2.0**-20 if len(arguments) > 2 else 0.0
    return within_a_rounding(found, right, slack) and float(jnp.mean(found == right)) > 0.999


def within_a_rounding(found: jax.Array, wanted: jax.Array, slack: float = 0.0) -> bool:
    """Whether bfloat16 results are at most a rounding and `slack` apart; a NaN never is."""
    return bool(jnp.all(jnp.abs(found - wanted) <= 2.0**-7 * jnp.abs(wanted) + slack))


@jax.jit
def expected(x: Int8Rows, w: Int8Rows | PackedRows, branch: Branch | None = None) -> jax.Array:
    """Return the result by XLA's int8 dot."""
    return xla.matmul(x, w, Epilogue(branch=branch))


def two_a_row(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Return int8 zeros with two elements of each row +-1."""
    keys = jax.random.split(key, 2)
    columns = jax.random.randint(keys[0], (shape[0], 2), 0, shape[1])
    signs = jax.random.rademacher(keys[1], (shape[0], 2), jnp.int8)
    return jnp.zeros(shape, jnp.int8).at[jnp.arange(shape[0])[:, None], columns].set(signs)


def run_quantize(m: int, k: int, options, copy_rate: float) -> list[Row]:
    """Check and time the quantize backends."""
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    backends = [b for b in able(QUANTIZE, x) if is_asked(options, b.name)]
    if not backends:
        return []
    *keys, vectors = jax.random.split(jax.random.key(options.seed), 5)
    sets = [(jax.random.normal(key, (m, k)).astype(jnp.bfloat16),) for key in keys]
    rows = []
    for name, change in quantize_forms(k, vectors, options.batch).items():
        settings = {"bits": 4, "group_size": 16, "step": "power", "rounding": "nearest"}
        settings |= {"range": "absmax"} | change
        part = {"start": 0, "size": k} | settings.pop("part", {})
        wanted = jax.jit(quantize_part(quantize_reference.quantize, part, settings))(*sets[0])
        for backend in backends:
            row = Row(work=f"quantize {m}x{k} {name}", backend=backend.name)
            written = 0.53125 if settings.get("packed") else 1
            row.bytes_moved = m * (2.0 * k + written * part["size"])
            rows.append(row)
            function = jax.jit(quantize_part(backend.run, part, settings))
            right = functools.partial(same_integers, wanted, name)
            check_and_time(row, function, sets, right, options.batches, copy_rate)
    return rows


def quantize_forms(k: int, key: jax.Array, images: int = 1) -> dict[str, dict]:
    """Return what is asked of a pass over rows of k elements, by name."""
    keys = jax.random.split(key, 3)
    shift, scale = (jax.random.normal(key, (images, k)) for key in keys[:2])
    multiplier = jax.random.normal(keys[2], (k,))
    forms = {
        "absmax": {},
        "minmax": {"range": "minmax"},
        "integer step": {"step": "integer"},
        "stretched": STRETCHED,
        "stretched, an eighth of the groups in 8 bits": STRETCHED
        | {"wide": tuple(i % 8 == 0 for i in range(-(-k // 16)))},
        "packed": {"packed": True},
        "multiplier": {"multiplier": jnp.exp(multiplier)},
    }
    before = {
        "": {},
        "norm": {"norm": Norm(shift=shift.astype(jnp.bfloat16), scale=1 + scale)},
        "norm, rms": {"norm": Norm(scale=1 + scale, kind="rms")},
        "gelu": {"part": {"activation": "gelu"}},
    }
    if k % 256 == 0:  # of whole blocks of every rotation
        before["gated silu"] = {"part": {"activation": "silu", "size": k // 2, "times": k // 2}}
    after = {"": {}} | {f"Hadamard {n}": {"rotation": n} for n in SIZES if k % n == 0}
    for bits, (first, a), (last, b) in itertools.product((4, 8), before.items(), after.items()):
        if bits == 4 and b.get("rotation", 16) != 16:
            continue
        names = first, last, "8 bits" if bits == 8 else ""
        name = ", ".join(filter(None, names)) or "absmax"
        forms[name] = a | b | {"bits": bits}
    return forms


def same_integers(wanted: tuple, name: str, found: tuple) -> bool:
    """Whether results are equal, up to what may fall either way; floats aren't compared then."""
    allowed = [share for start, share in DIFFERING.items() if name.startswith(start)]
    return all(
        float(jnp.mean(a != b)) <= max(allowed, default=0)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        if a.dtype != jnp.float32 or not allowed
    )


def quantize_part(run: Callable, part: dict, settings: dict) -> Callable:
    """Return a backend's quantization of an array's columns, with settings."""
    return lambda x: run((Part(array=x, **part),), **settings)


def run_qk_norm_rope(
    tokens: tuple[int, ...], columns: int, options: argparse.Namespace, copy_rate: float
) -> list[Row]:
    """Check and time norm and rotation of queries and keys."""

    def make(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 3)
        qkv = [jax.random.normal(keys[0], (1, t, columns)).astype(jnp.bfloat16) for t in tokens]
        scale = jax.random.uniform(keys[1], (HEAD_DIM,), minval=0.5, maxval=2).astype(jnp.bfloat16)
        angles = jax.random.uniform(keys[2], (sum(tokens), HEAD_DIM // 2), jnp.float32, -3, 3)
        return qkv, scale, jnp.stack([jnp.cos(angles), jnp.sin(angles)])

    sets = [make(key) for key in jax.random.split(jax.random.key(options.seed), 3)]
    wanted = jax.jit(qk_call(QK_NORM_ROPE.backend("reference")))(*sets[0])
    rows = []
    for backend in qk_backends(tokens, columns):
        if not is_asked(options, backend.name):
            continue
        row = Row(work=f"qk_norm_rope {'+'.join(map(str, tokens))}", backend=backend.name)
        row.bytes_moved = 2 * 3 * sum(tokens) * HEADS * HEAD_DIM * 2
        rows.append(row)
        right = functools.partial(same_rotations, wanted)
        function = jax.jit(qk_call(backend))
        check_and_time(row, function, sets, right, options.batches, copy_rate)
    return rows


def qk_backends(tokens: tuple[int, ...], columns: int) -> list[Backend]:
    """Return what can norm and rotate here: first the reference, which XLA compiles."""
    shape = jax.ShapeDtypeStruct
    qkv = [shape((1, t, columns), jnp.bfloat16) for t in tokens]
    rope = shape((2, sum(tokens), HEAD_DIM // 2), jnp.float32)
    streams = as_streams(qkv, shape((HEAD_DIM,), jnp.bfloat16))
    return [QK_NORM_ROPE.backend("reference"), *able(QK_NORM_ROPE, streams, rope)]


def qk_call(backend: Backend) -> Callable:
    """Return a backend's norm and rotation as a function of arrays."""
    return lambda qkv, scale, rope: backend.run(as_streams(qkv, scale), rope, heads=HEADS)


def as_streams(qkv: Sequence, scale) -> tuple[Stream, ...]:
    """Return streams of one scale."""
    norm = {"query_scale": scale, "key_scale": scale, "epsilon": 1e-6}
    return tuple(Stream(qkv=x, **norm) for x in qkv)


def same_rotations(wanted: tuple, found: tuple) -> bool:
    """Whether results differ by roundings alone, and rarely.

    The terms of a rotation may cancel, which leaves float32's error of them.
    """
    return all(
        within_a_rounding(a, b, slack=1e-5) and float(jnp.mean(a != b)) <= DIFFERING["rotation"]
        for a, b in zip(found, wanted, strict=True)
    )


def time_copy(batches: int) -> float:
    """Return bytes a second of a large copy, read plus write."""
    sets = [(jnp.full((COPIED,), i, jnp.int32),) for i in range(2)]
    seconds = timing.measure(jax.jit(lambda x: x + 1), sets, batches=batches)
    return 2 * 4 * COPIED / statistics.median(seconds)


def check_and_time(
    row: Row,
    function: Callable,
    sets: list[tuple],
    right: Callable[[tuple], bool],
    batches: int,
    copy_rate: float,
) -> None:
    """Check, time and print what memory alone should bound; `right` judges the first result."""
    with report_failure(row):
        row.exact = right(function(*sets[0]))
        time_row(row, function, sets, batches, row.bytes_moved / copy_rate)
    show(row)


def time_row(row: Row, function: Callable, sets: list[tuple], batches: int, floor: float) -> None:
    """Fill in a row's times, unless its result is wrong; `floor` is the least that it can take."""
    if row.exact is False:
        return
    row.times_ms = [1e3 * t for t in timing.measure(function, sets, batches=batches)]
    row.ms = statistics.median(row.times_ms)
    row.of_limit = floor * 1e3 / row.ms


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
    line = f"{row.work:28} {row.backend:32} {exact:6}"
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
    sys.exit(cli.run(main))
