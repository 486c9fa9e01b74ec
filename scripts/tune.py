"""Search tile sizes of the GPU matmul kernels and keep the fastest: tuning/<device>.json.

    python scripts/tune.py --shapes flux-mlp-up flux-mlp-down

Every configuration's times are kept, so that a choice can be judged later. A result that isn't
within one rounding of the reference's never counts. Shapes that were searched before are searched
again and replaced; the others stay.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from benchmark import compile_function, encode, expected, make_operands
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels import codec, device, timing
from pallas_kernels.matmul import MATMUL, mosaic_gpu, triton, triton_few_rows, tuned
from pallas_kernels.matmul.shapes import SHAPES, Shape

FOLDER = Path(tuned.__file__).parent / "tuning"
GROUP = {"group_size": 16, "step": "power"}


def main() -> None:
    """Search what the command line asks for and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kernels", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--out", type=Path, help="default: the package's own file of this device")
    options = parser.parse_args()
    kind = jax.devices()[0].device_kind
    out = options.out or FOLDER / tuned.file_name(kind)
    entries = {}
    if out.exists():
        entries = {_key(entry): entry for entry in json.loads(out.read_text())["entries"]}
    with ThreadPoolExecutor() as pool:
        for name, kernel in itertools.product(options.shapes, options.kernels):
            entry = search(SHAPES[name], kernel, pool)
            if entry is None:
                continue
            entries[_key(entry)] = entry
            best = min(entry["times"], key=lambda t: statistics.median(t["seconds"]))
            us = 1e6 * statistics.median(best["seconds"])
            print(f"{name:20} {kernel:20} {us:8.1f} us {entry['best']}", flush=True)
            table = {"device": kind, "jax": jax.__version__}
            table |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "entries": list(entries.values())}
            out.write_text(json.dumps(table, indent=1) + "\n")


def search(shape: Shape, kernel: str, pool) -> dict[str, Any] | None:
    """Time every configuration of a kernel on a shape; None where the kernel doesn't run."""
    m, n, k = shape.m, shape.n, shape.k
    operands = [make_operands(seed, m, n, k) for seed in range(max(2, min(6, int(2e8) // (n * k))))]
    backend = MATMUL.backend(kernel.removesuffix("_int8"))
    if backend.why_not(device.current(), operands[0]["x"], operands[0]["w"]):
        return None
    run, arrange, configs = SEARCHES[kernel]
    sets = [arrange(**o) for o in operands]
    w = jax.jit(functools.partial(codec.decode_packed, **GROUP))(*encode(operands[0]["w"], **GROUP))
    if kernel.endswith("_int8"):
        w = operands[0]["w"]
    wanted = expected(**operands[0] | {"w": w})
    compiled = {
        config: pool.submit(compile_function, functools.partial(run, config=config), sets[0])
        for config in configs(m)
    }
    times = []
    for config, future in tqdm(compiled.items(), f"{kernel} {m}x{n}x{k}", leave=False):
        try:
            function = future.result()
        except Exception as error:  # too large for shared memory, say: compilers raise many kinds
            times.append({"config": dataclasses.asdict(config), "error": str(error)[:200]})
            continue
        near = jnp.abs(function(*sets[0]) - wanted) <= 2.0**-7 * jnp.abs(wanted)
        if bool(jnp.all(near)):
            seconds = timing.measure(function, sets, batches=3)
            times.append({"config": dataclasses.asdict(config), "seconds": seconds})
    timed = [entry for entry in times if "seconds" in entry]
    if not timed:
        return None
    best = min(timed, key=lambda entry: statistics.median(entry["seconds"]))["config"]
    return {"kernel": kernel, "m": m, "n": n, "k": k, "best": best, "times": times}


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
    for n, words, warps in itertools.product((2, 4, 8, 16), (32, 64, 128), (2, 4, 8)):
        yield triton_few_rows.Config(tile_n=n, words=words, warps=warps)


def _int8(x, w, x_scale, w_scale) -> tuple:
    return x, w, x_scale, w_scale


def _packed(x, w, x_scale, w_scale) -> tuple:
    return x, *encode(w, **GROUP), x_scale, w_scale


def _tiled(x, w, x_scale, w_scale) -> tuple:
    arrange = jax.jit(functools.partial(mosaic_gpu.prepare_weights, k=x.shape[1], **GROUP))
    return x, arrange(*encode(w, **GROUP), w_scale), x_scale


# Name in the file to what runs, how its arguments are made, and the configurations for m rows.
SEARCHES: dict[str, tuple[Callable, Callable, Callable]] = {
    "mosaic_gpu": (mosaic_gpu.matmul_prepared, _tiled, _mosaic_configs),
    "mosaic_gpu_int8": (mosaic_gpu.matmul_int8, _int8, _mosaic_configs),
    "triton_int8": (triton.matmul_int8, _int8, _triton_configs),
    "triton_few_rows": (
        functools.partial(triton_few_rows.matmul, **GROUP),
        _packed,
        _few_rows_configs,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
