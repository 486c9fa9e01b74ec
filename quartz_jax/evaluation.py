"""Paired comparison of recipes with the 16-bit model: the same prompts, the same noise."""

import datetime
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quartz_jax.files import atomic_file
from quartz_jax.metrics import bootstrap_interval, psnr, ssim
from quartz_jax.recipe import Recipe
from quartz_jax.report import Report

Sample = Callable[[int, int], np.ndarray]  # images start..stop, [stop - start, h, w, 3] in 0..1
Scores = dict[str, list[float]]  # "psnr" and "ssim", one figure an image

_COLUMNS = {
    "recipe": "recipe",
    "weight_bits": "bits/element W",
    "activation_bits": "A",
    "megabytes": "transformer MB",
    "psnr": "PSNR, dB [95 %]",
    "ssim": "SSIM [95 %]",
    "relative_error": "weight error",
}


def score(
    sample: Sample, reference: Sample, count: int, batch: int, scores: Scores
) -> Iterator[int]:
    """Compare images batch by batch, adding to `scores`; what it already holds is not done again.

    Yields the number of images of each batch, after its scores were added.
    """
    for start in range(len(scores["psnr"]), count, batch):
        stop = min(start + batch, count)
        images, originals = sample(start, stop), reference(start, stop)
        scores["psnr"] += psnr(images, originals).tolist()
        scores["ssim"] += ssim(images, originals).tolist()
        yield stop - start


def summarize(recipe: Recipe, report: Report, scores: Scores) -> dict[str, Any]:
    """Return one row of the results: sizes, mean scores and their bootstrap intervals."""
    intervals = {name: vars(bootstrap_interval(values)) for name, values in scores.items()}
    return {
        "recipe": recipe.name,
        "weight_bits": report.weight_bits,
        "activation_bits": recipe.activation_bits,
        "megabytes": report.bytes / 1e6,
        **intervals,
        "relative_error": report.relative_error,
    }


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `summarize` as a markdown table."""
    lines = [_COLUMNS.values(), ["---"] * len(_COLUMNS)]
    lines += [[_cell(name, row[name]) for name in _COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def open_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results kept in a file, or new ones if there is no file.

    Raises:
      ValueError: the file can't be read or was made with other settings.
    """
    environment = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
    }
    new = {"settings": settings, "environment": environment, "recipes": {}}
    if path.exists():
        try:
            new["recipes"] = _same_settings(json.loads(path.read_text()), new)["recipes"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} can't be resumed: {error}; use another --out") from None
    return new


def open_scores(results: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's entry in the results; a new one unless it was made by the same rules."""
    entry = results["recipes"].get(recipe.name)
    if entry is None or entry["recipe"] != recipe.to_json():
        entry = {"recipe": recipe.to_json(), "scores": {"psnr": [], "ssim": []}}
        results["recipes"][recipe.name] = entry
    return entry


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results with the date and the command; the file is never half-written."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with atomic_file(path) as partial:
        text = json.dumps({"date": now, "command": sys.argv} | results, indent=1)
        partial.write_text(text + "\n")


def _same_settings(found: Any, new: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("it holds no results")
    for key in ("settings", "environment"):
        if found[key] != new[key]:
            raise ValueError(f"it was made with other {key}")
    return found


def _cell(name: str, value: Any) -> str:
    if isinstance(value, dict):
        digits = 2 if name == "psnr" else 4
        return "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(d=digits, **value)
    digits = {"relative_error": 4, "megabytes": 1}.get(name, 2)
    return value if isinstance(value, str) else f"{value:.{digits}f}"
