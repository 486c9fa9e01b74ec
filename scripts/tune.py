"""Search tile sizes of the GPU matmul kernels and keep the fastest: tuning/<device>.json.

    python scripts/tune.py --shapes flux-mlp-up flux-mlp-down

Every configuration's times are kept, so that a choice can be judged later. A result that isn't
within one rounding of the reference's is reported, not timed, and the exit status is 1. Shapes that
were searched before are searched again and replaced; the others stay.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from benchmark import (
    compile_function,
    encode,
    expected,
    make_operands,
    weight_sets,
    within_a_rounding,
)
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import aot, device, timing
from pallas_kernels.matmul import MATMUL, mosaic_gpu, triton, triton_few_rows, tuned
from pallas_kernels.matmul.shapes import SHAPES, Shape
from pallas_kernels.operands import Epilogue, Int8Rows
from quartz_jax.cli import arguments as cli
from quartz_jax.io import provenance
from quartz_jax.io.files import check_output

FOLDER = Path(tuned.__file__).parent / "tuning"
# What the searches pack weights as: the sizes serve every kind of them.
GROUP = {"group_size": 16, "step": "integer", "levels": "stretched"}
WRONG = "differs from the reference"
CLOSE = 1.04  # times the fastest's first time: what is timed again


def main(argv: Sequence[str] | None = None) -> int:
    """Search what the command line asks for and write the file; 1 if a result was wrong."""
    options = parse(argv)
    out = options.out or FOLDER / tuned.file_name(jax.devices()[0].device_kind)
    check_output(out)
    entries = {_key(entry): entry for entry in read_entries(out)}
    asked = list(itertools.product(options.shapes, options.kernels))
    reasons = {(name, kernel): why_not(SHAPES[name], kernel) for name, kernel in asked}
    if all(reasons.values()):
        listed = dict.fromkeys(f"{kernel}: {why}" for (_, kernel), why in reasons.items())
        raise ValueError(f"no kernel with sizes to tune runs here ({'; '.join(listed)})")
    print(f"seed {options.seed}", flush=True)
    wrong = 0
    with ThreadPoolExecutor() as pool:
        for (name, kernel), reason in reasons.items():
            if reason:
                print(f"{name:20} {kernel:20} not searched: {reason}", flush=True)
                continue
            entry = search(SHAPES[name], kernel, options.seed, pool)
            failed = [t for t in entry["times"] if t.get("error") == WRONG]
            wrong += len(failed)
            for config in failed:
                print(f"{name:20} {kernel:20} WRONG {config['config']}", flush=True)
            if not entry["best"]:
                print(f"{name:20} {kernel:20} no configuration ran", flush=True)
                continue
            entries[_key(entry)] = entry
            us = 1e6 * min(map(_median, _timed(entry["times"])))
            print(f"{name:20} {kernel:20} {us:8.1f} us {entry['best']}", flush=True)
            table = {"processors": device.processors(), "entries": list(entries.values())}
            provenance.write_results(out, provenance.environment() | table)
    return int(wrong > 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--kernels", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    add("--out", type=Path, help="default: the package's own file of this device")
    cli.add_seed(parser)
    return parser.parse_args(argv)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Return what a file of sizes holds, nothing if there is none."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())["entries"]
        for entry in entries:
            _key(entry)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} holds no table of sizes; choose another --out") from None
    return entries


def why_not(shape: Shape, kernel: str) -> str | None:
    """Say why a kernel can't be searched on a shape here, or return None."""
    x, w = aot.abstract_rows(shape.m, shape.k), aot.abstract_rows(shape.n, shape.k)
    backend = MATMUL.backend(kernel.removesuffix("_int8"))
    reason = backend.why_not(device.current(), x, w, Epilogue())
    if reason is None and not list(SEARCHES[kernel][2](shape.m)):
        reason = f"has no sizes for {shape.m} rows"
    return reason


def search(shape: Shape, kernel: str, seed: int, pool) -> dict[str, Any]:
    """Time every configuration of a kernel on a shape; the best is None if none can be."""
    m, n, k = shape.m, shape.n, shape.k
    keys = jax.random.split(jax.random.key(seed), weight_sets(n, k, 6))
    operands = [make_operands(key, m, n, k) for key in keys]
    run, arrange, configs = SEARCHES[kernel]
    sets = [arrange(*pair) for pair in operands]
    x, w = operands[0]
    wanted = expected(x, w if kernel.endswith("_int8") else encode(w, **GROUP))

    def with_config(config):
        return lambda x, w: run(x, w, Epilogue(), config=config)

    compiled = {
        config: pool.submit(compile_function, with_config(config), sets[0]) for config in configs(m)
    }
    times: list[dict[str, Any]] = []
    functions: dict[int, Callable] = {}  # to time, by their place in times
    for config, future in tqdm(compiled.items(), f"{kernel} {m}x{n}x{k}", leave=False):
        try:
            function = future.result()
        except Exception as error:  # too large for shared memory, say: compilers raise many kinds
            times.append({"config": dataclasses.asdict(config), "error": str(error)[:200]})
            continue
        if within_a_rounding(function(*sets[0]), wanted):
            functions[len(times)] = function
            seconds = timing.measure(function, sets, batches=1)
            times.append({"config": dataclasses.asdict(config), "seconds": seconds})
        else:
            times.append({"config": dataclasses.asdict(config), "error": WRONG})
    limit = CLOSE * min(map(_median, _timed(times)), default=0.0)
    for i, function in functions.items():
        if _median(times[i]) <= limit:
            times[i]["seconds"] += timing.measure(function, sets, batches=2)
    best = min(_timed(times), key=_median, default={"config": None})["config"]
    return {"kernel": kernel, "m": m, "n": n, "k": k, "seed": seed, "best": best, "times": times}


def _timed(times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in times if "seconds" in entry]


def _median(entry: dict[str, Any]) -> float:
    return statistics.median(entry["seconds"])


def _key(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in ("kernel", "m", "n", "k"))


def _mosaic_configs(m: int) -> Iterator[mosaic_gpu.Config]:
    for tokens, snake in itertools.product(mosaic_gpu.TOKEN_TILES, (8, 16)):
        if m > 64 and tokens >= 160:
            yield mosaic_gpu.Config(tokens=tokens, stages=4, snake=snake)


def _triton_configs(m: int) -> Iterator[triton.Config]:
    for tile, stages in itertools.product(((128, 128), (128, 256), (256, 128)), (3, 4)):
        for warps in (4, 8):
            if m > 64 and (warps == 8 or tile == (128, 128)):
                yield triton.Config(tile_m=tile[0], tile_n=tile[1], warps=warps, stages=stages)


def _few_rows_configs(m: int) -> Iterator[triton_few_rows.Config]:
    for n, words, warps in itertools.product((1, 2, 4, 8), (32, 64, 128), (1, 2, 4, 8)):
        for passes in (1, 2, 4) if words == 128 and n > 1 else (1,):
            yield triton_few_rows.Config(tile_n=n, passes=passes, words=words, warps=warps)


def _int8(x: Int8Rows, w: Int8Rows) -> tuple:
    return x, w


def _packed(x: Int8Rows, w: Int8Rows) -> tuple:
    return x, encode(w, **GROUP)


def _tiled(x: Int8Rows, w: Int8Rows) -> tuple:
    return x, jax.jit(mosaic_gpu.prepare)(encode(w, **GROUP))


def _tiled_int8(x: Int8Rows, w: Int8Rows) -> tuple:
    return x, jax.jit(mosaic_gpu.prepare)(w)


# Name in the file to what runs, how its arguments are made, and the configurations for m rows.
SEARCHES: dict[str, tuple[Callable, Callable, Callable]] = {
    "mosaic_gpu": (mosaic_gpu.matmul_prepared, _tiled, _mosaic_configs),
    "mosaic_gpu_int8": (mosaic_gpu.matmul_prepared, _tiled_int8, _mosaic_configs),
    "triton_int8": (triton.matmul, _int8, _triton_configs),
    "triton_few_rows": (triton_few_rows.matmul, _packed, _few_rows_configs),
}


if __name__ == "__main__":
    sys.exit(cli.run(main))
