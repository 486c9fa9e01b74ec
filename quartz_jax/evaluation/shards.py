"""Processes that share the rows of a comparison, and the device or several."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from quartz_jax.evaluation.bench import Bench, OutOfTime, Row, shard_path
from quartz_jax.io import provenance

COMMAND = (sys.executable, "-m", "quartz_jax.cli", "evaluate")


def spread(bench: Bench, jobs: int, argv: Sequence[str]) -> None:
    """Evaluate the rows of a bench in processes, each its share, and take in what they found.

    What all need is made first: bf16's images and program, and what the linears are given.

    Args:
      bench: holds the rows.
      jobs: processes.
      argv: arguments of the command that they run.

    Raises:
      ValueError: a process failed; its log is named.
      OutOfTime: the minutes are over.
    """
    bench.take_in()
    for row in bench.rows:
        if row.is_16_bit:
            bench.evaluate(row)
    provenance.write_results(bench.options.out, bench.results)
    if missing := [row for row in bench.rows if not bench.finished(row)]:
        _run(bench, missing, min(jobs, len(bench.rows)), argv)
    for path in bench.shards():
        path.unlink()


def _run(bench: Bench, missing: list[Row], jobs: int, argv: Sequence[str]) -> None:
    """Run the processes to their end; what isn't finished then raises, and stays in their files."""
    bench.prepare(missing)
    out = bench.options.out
    logs = [shard_path(out, i).with_suffix(".log") for i in range(jobs)]
    processes = [_start(bench, (i, jobs), log, argv) for i, log in enumerate(logs)]
    try:
        with tqdm(total=len(bench.rows), desc=bench.options.model.name, unit="recipe") as bar:
            while any(process.poll() is None for process in processes):
                time.sleep(1)
                bench.take_in()
                bar.update(sum(map(bench.finished, bench.rows)) - bar.n)
    finally:  # whatever ends this ends them
        for process in processes:
            process.terminate()
            process.wait()
    bench.take_in()
    provenance.write_results(out, bench.results)
    for process, log in zip(processes, logs, strict=True):
        if process.returncode:
            raise ValueError(f"a process of {len(processes)} failed; {log} says why")
    if not all(map(bench.finished, bench.rows)):
        raise OutOfTime
    for log in logs:
        log.unlink()


def _start(
    bench: Bench, shard: tuple[int, int], log: Path, argv: Sequence[str]
) -> subprocess.Popen:
    """Start a process that evaluates every n-th row, from number i on, into a file of its own."""
    more = ["--jobs", "1", "--shard", "{}/{}".format(*shard)]
    left = bench.minutes_left()
    if left is not None:
        more += ["--minutes", str(max(left, 1e-9))]
    env = dict(os.environ)
    if jax.default_backend() == "gpu":  # in turn on every GPU
        every = ",".join(str(device.id) for device in jax.local_devices())
        names = env.get("CUDA_VISIBLE_DEVICES", every).split(",")
        env["CUDA_VISIBLE_DEVICES"] = names[shard[0] % len(names)]
    with log.open("w") as file:
        return subprocess.Popen([*COMMAND, *argv, *more], stdout=file, stderr=file, env=env)
