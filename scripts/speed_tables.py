"""Write the tables of docs/speed.md anew from the files of measurements that they name.

    python scripts/speed_tables.py

A table stands between `<!-- KIND FILE [PART] -->` and `<!-- end -->`; files lie in
pallas_kernels/benchmarks. Below each the command, device, versions and date are told.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from quartz_jax.cli import arguments as cli
from quartz_jax.io.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
FILES = ROOT / "pallas_kernels" / "benchmarks"
_TABLE = re.compile(r"<!-- (?!end)(\w+) (\S+\.json)(?: (\w+))? -->\n.*?<!-- end -->", re.S)


def step(record: dict[str, Any]) -> list[list[str]]:
    """Return rows of what `benchmark_model.py` measured."""
    results, rows = record["results"], [["recipe", "a step, ms", "of bf16", "weights, GiB"]]
    base = results.get("bf16", {}).get("queued_ms")
    for name, found in results.items():
        ratio = f"{base / found['queued_ms']:.2f}x" if base else ""
        weights = f"{found['weight_bytes'] / 2**30:.2f}"
        rows.append([f"`{name}`", f"{found['queued_ms']:.1f}", ratio, weights])
    return rows


def groups(record: dict[str, Any]) -> list[list[str]]:
    """Return rows of where the kernels' time in a step goes."""
    results = record["results"]
    names = sorted({x for found in results.values() for x in found["groups_ms"]})
    rows = [["ms in", *(f"`{name}`" for name in results)]]
    for name in names:
        times = (found["groups_ms"].get(name) for found in results.values())
        rows.append([name, *("" if ms is None else f"{ms:.1f}" for ms in times)])
    return rows


def start(record: dict[str, Any]) -> list[list[str]]:
    """Return rows of what each stage of `quartz generate` took."""
    runs = record["runs"]
    stages = dict.fromkeys(x for run in runs.values() for x in run["stages"] if x != "median step")
    rows = [["seconds", *runs]]
    for name in stages:
        times = (run["stages"].get(name) for run in runs.values())
        rows.append([name, *("" if s is None else f"{s:.1f}" for s in times)])
    return [*rows, ["all of it", *(f"{run['seconds']:.1f}" for run in runs.values())]]


def attention(record: dict[str, Any]) -> list[list[str]]:
    """Return rows of what `benchmark_attention.py` measured."""
    rows = [["tokens, heads and channels", "kernel", "us", "10**12 operations a second"]]
    for found in record["rows"]:
        if found["ms"] is not None:
            us, rate = f"{1e3 * found['ms']:.0f}", found["tops"]
            rows.append([found["work"], found["variant"], us, f"{rate:.0f}" if rate else ""])
    return rows


def kernels(record: dict[str, Any]) -> list[list[str]]:
    """Return rows of what `benchmark.py` measured."""
    rows = [["work", "kernel", "us", "of bf16"]]
    for found in record["rows"]:
        if found.get("ms") is not None:
            ratio = found.get("of_bf16")
            shown = f"{ratio:.2f}x" if ratio else ""
            rows.append([found["work"], found["backend"], f"{1e3 * found['ms']:.0f}", shown])
    return rows


def peers(record: dict[str, Any]) -> list[list[str]]:
    """Return rows of what `scripts/peers/diffusers_step.py` measured."""
    rows = [["diffusers", "a step, ms", "first call, s", "memory, GiB"]]
    for name, found in record["results"].items():
        figures = (found["queued_ms"], found["first_call_s"], found["peak_bytes"] / 2**30)
        rows.append([name, *(f"{x:.1f}" for x in figures)])
    return rows


def products(record: dict[str, Any]) -> list[list[str]]:
    """Return rows of what `scripts/peers/humming_matmul.py` measured."""
    results = record["results"]
    rows = [["us, and 10**12 operations a second", *results]]
    for way in next(iter(results.values()))["ms"]:
        cells = (f"{1e3 * x['ms'][way]:.0f}, {x['tops'][way]:.0f}" for x in results.values())
        rows.append([way, *cells])
    return rows


KINDS: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {
    "step": step,
    "groups": groups,
    "start": start,
    "attention": attention,
    "kernels": kernels,
    "peers": peers,
    "products": products,
}


def source(name: str, record: dict[str, Any]) -> str:
    """Return the line below a table: what was run, on what, and when."""
    environment = record["environment"]
    versions = ", ".join(f"{key} {x}" for key, x in environment["versions"].items() if x)
    command = " ".join(record.get("command", ()))
    told = f"`{command}`, " if command else ""
    date = record["date"][:10]
    return f"[`{name}`](../pallas_kernels/benchmarks/{name}): {told}{environment['device']}, " + (
        f"{versions}, {date}"
    )


def table(kind: str, name: str, part: str | None) -> str:
    """Return a table in Markdown with its source.

    Raises:
      ValueError: a kind of table that there is none of.
    """
    if kind not in KINDS:
        raise ValueError(f"{PAGE} has a table {kind!r}; it must be one of {', '.join(KINDS)}")
    record = json.loads((FILES / name).read_text())
    record = record[part] if part else record
    first, *rows = KINDS[kind](record)
    lines = [first, ["---"] * len(first), *rows]
    shown = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{shown}\n\n{source(name, record)}"


def renewed(page: str) -> str:
    """Return the page with every table anew."""

    def put(match: re.Match[str]) -> str:
        opening = match[0].partition("\n")[0]
        return f"{opening}\n{table(*match.groups())}\n<!-- end -->"

    return _TABLE.sub(put, page)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.parse_args(argv)
    with atomic_file(PAGE) as partial:
        partial.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.run(main))
