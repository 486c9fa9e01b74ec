"""Paired comparison of recipes with the 16-bit model: the same prompts, the same noise."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quartz_jax.conversion.model import linears
from quartz_jax.conversion.report import Report
from quartz_jax.engine.linear import QuartzLinear, round_to_bf16
from quartz_jax.evaluation.metrics import bootstrap_interval
from quartz_jax.io import provenance
from quartz_jax.io.files import atomic_file
from quartz_jax.io.images import to_bytes
from quartz_jax.methods import LayerStatistics, Method, SimulatedLinear, get_method
from quartz_jax.recipes.recipe import RECIPES, Recipe, get_recipe

Sample = Callable[[int, int], np.ndarray]  # images start..stop, [stop - start, h, w, 3] in 0..1
Scores = dict[str, list[float]]  # "psnr", "ssim" and such, one figure an image
# Index of the first image, images and reference to figures [batch] by name.
Measure = Callable[[int, np.ndarray, np.ndarray], Mapping[str, np.ndarray]]

COLUMNS = {
    "recipe": "recipe",
    "weight_bits": "bits/element W",
    "activation_bits": "A",
    "megabytes": "transformer MB",
    "psnr": "PSNR, dB [95 %]",
    "ssim": "SSIM [95 %]",
    "lpips": "LPIPS [95 %]",
    "stlpips": "ST-LPIPS [95 %]",
    "fid": "FID",
    "fid_to_bf16": "FID to bf16",
    "clip": "CLIP score [95 %]",
    "kid": "KID-EffNetLite0 x1000 [95 %]",
    "agreement": "class agreement [95 %]",
    "velocity": "velocity error [95 %]",
    "sqnr": "layer SQNR, dB",
    "relative_error": "weight error",
}
_DIGITS = {"psnr": 2, "kid": 2, "sqnr": 1, "megabytes": 1, "weight_bits": 2, "activation_bits": 2}
_DIGITS |= {"fid": 2, "fid_to_bf16": 2, "clip": 2}


def resolve(name: str) -> Recipe | Method:
    """Return a recipe by name, one from a .json file of either kind, or a method by its parts.

    Raises:
      ValueError: none of them.
    """
    if name in RECIPES:
        return get_recipe(name)
    if not name.endswith(".json"):
        return get_method(name)
    try:
        value = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe file {name} can't be read: {error}") from None
    return Method.from_json(value) if "method" in value else get_recipe(name)


def score(
    sample: Sample,
    reference: Sample,
    count: int,
    batch: int,
    scores: Scores,
    measure: Measure,
) -> Iterator[int]:
    """Compare images batch by batch, adding to `scores`; what it already holds is not done again.

    Yields the number of images of each batch, after its scores were added.
    """
    for start in range(len(scores["psnr"]), count, batch):
        stop = min(start + batch, count)
        figures = measure(start, sample(start, stop), reference(start, stop))
        for name, values in figures.items():
            scores.setdefault(name, []).extend(values.tolist())
        yield stop - start


def summarize(
    recipe: Recipe | Method, report: Report, scores: Scores, activation_bits: float, **more: Any
) -> dict[str, Any]:
    """Return one row of the results: sizes, mean scores and their bootstrap intervals."""
    intervals = {name: vars(bootstrap_interval(values)) for name, values in scores.items()}
    return {
        "recipe": recipe.name,
        "weight_bits": report.weight_bits,
        "activation_bits": activation_bits,
        "megabytes": report.bytes / 1e6,
        **intervals,
        **more,
        "relative_error": report.relative_error,
    }


def mean_activation_bits(model: nnx.Module, recipe: Recipe | Method) -> float:
    """Return stored bits an element of the quantized inputs, scales included, mean over layers.

    16 if all is weight-only.
    """
    found = linears(model)
    bits = []
    for path, rule in recipe.assign(found).items():
        k, format_ = found[path].in_features, rule.activation
        if isinstance(recipe, Method):
            bits += [] if format_ is None else [format_.bits(k)]
        elif format_.kind != "bf16":
            block = (format_.config and format_.config.scale_block) or k
            bits.append(format_.bits + (32 if format_.symmetric else 64) / block)
    return float(np.mean(bits)) if bits else 16.0


def layer_sqnr(
    model: nnx.Module, quantized: nnx.Module, rows: dict[str, LayerStatistics]
) -> dict[str, float]:
    """Return 10 log10(|y|**2 / |y - y_quantized|**2) of each quantized linear on recorded inputs.

    Inputs are the 16-bit model's, so that no layer's figure depends on another's error.
    """
    exact, found = linears(model), {}
    for path, module in nnx.iter_modules(quantized):
        name = ".".join(map(str, path))
        if isinstance(module, QuartzLinear | SimulatedLinear):
            linear = exact[name]
            x = jnp.asarray(rows[name].rows, linear.dtype)  # as the model computes
            bias = None if linear.bias is None else linear.bias.get_value()
            graphdef, state = nnx.split(module)
            found[name] = float(_sqnr(graphdef)(state, x, linear.kernel.get_value(), bias))
    return found


@functools.lru_cache(maxsize=64)
def _sqnr(graphdef: nnx.GraphDef) -> Callable:
    def sqnr(state, x, kernel, bias):
        wide, kernel = x.astype(jnp.float32), round_to_bf16(kernel).astype(jnp.float32)
        y = jnp.matmul(wide, kernel, precision=jax.lax.Precision.HIGHEST)
        y = y if bias is None else y + round_to_bf16(bias)
        error = nnx.merge(graphdef, state)(x) - y
        return 10 * jnp.log10(jnp.sum(y**2) / jnp.maximum(jnp.sum(error**2), 1e-30))

    return jax.jit(sqnr)


def class_of_prompts(prompts: list[str], classes: list[dict[str, Any]]) -> np.ndarray:
    """Return the index of the class whose name each prompt holds, the longest if several.

    Raises:
      ValueError: a prompt names no class; it is given.
    """
    names = [str(entry["name"]).lower() for entry in classes]
    order = sorted(range(len(names)), key=lambda i: -len(names[i]))
    found = []
    for prompt in prompts:
        index = next((i for i in order if names[i] in prompt.lower()), None)
        if index is None:
            raise ValueError(f"prompt {prompt!r} names no class of the class file")
        found.append(index)
    return np.array(found)


class ImageStore:
    """Images of one recipe as 8-bit .npy files, one a batch, each complete or absent."""

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, start: int, images: np.ndarray) -> None:
        """Keep images [batch, h, w, 3] in 0..1; the first batch clears what was there."""
        for old in self.folder.glob("*.npy") if start == 0 else ():
            old.unlink()
        with atomic_file(self.folder / f"{start:06d}.npy") as partial, partial.open("wb") as file:
            np.save(file, to_bytes(images))

    def images(self, count: int) -> Iterator[np.ndarray]:
        """Yield `count` images, uint8 [h, w, 3], with one batch in memory.

        Raises:
          ValueError: images are missing.
        """
        batches = (np.load(path) for path in sorted(self.folder.glob("*.npy")))
        found = 0
        for image in itertools.islice(itertools.chain.from_iterable(batches), count):
            yield image
            found += 1
        if found < count:
            raise ValueError(f"{self.folder} lacks images; delete the results to make them again")

    def load(self, count: int) -> np.ndarray:
        """Return uint8 [count, h, w, 3]; raises ValueError if images are missing."""
        return np.stack(list(self.images(count)))


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `summarize` as a markdown table; columns that no row has are left out."""
    columns = {name: title for name, title in COLUMNS.items() if any(name in row for row in rows)}
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(name, row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def open_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results kept in a file, or new ones if there is no file.

    Raises:
      ValueError: the file can't be read or was made with other settings.
    """
    new = {"settings": settings, "environment": provenance.environment(), "recipes": {}}
    if path.exists():
        try:
            new["recipes"] = _same_settings(json.loads(path.read_text()), new)["recipes"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} can't be resumed: {error}; use another --out") from None
    return new


def open_scores(results: dict[str, Any], recipe: Recipe | Method) -> dict[str, Any]:
    """Return a recipe's entry in the results; a new one unless it was made by the same rules."""
    entry = results["recipes"].get(recipe.name)
    if entry is None or entry["recipe"] != recipe.to_json():
        entry = {"recipe": recipe.to_json(), "scores": {"psnr": [], "ssim": []}}
        results["recipes"][recipe.name] = entry
    return entry


def _same_settings(found: Any, new: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("it holds no results")
    for key in ("settings", "environment"):
        if found[key] != new[key]:
            raise ValueError(f"it was made with other {key}")
    return found


def cell(name: str, value: Any) -> str:
    """Return a figure, or a mean with its interval, as text."""
    if value is None or isinstance(value, str):
        return value or "-"
    digits = _DIGITS.get(name, 4)
    if isinstance(value, dict):
        return "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(d=digits, **value)
    return f"{value:.{digits}f}"
