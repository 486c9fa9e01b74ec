"""Paired comparison of recipes with the 16-bit model: the same prompts, the same noise."""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quartz_jax import schema
from quartz_jax.conversion.model import round_to_bf16
from quartz_jax.conversion.report import Report
from quartz_jax.engine.linear import QuantizedLinear
from quartz_jax.evaluation.metrics import Interval, bootstrap_interval
from quartz_jax.io import provenance
from quartz_jax.io.files import atomic_file, read_json
from quartz_jax.io.images import to_bytes
from quartz_jax.recipes.recipe import Recipe
from quartz_jax.recipes.sites import layers, weight_rows
from quartz_jax.transforms import Seen

Sample = Callable[[int, int], np.ndarray]  # images start..stop, [stop - start, h, w, 3] in 0..1
Scores = dict[str, list[float]]  # "psnr", "ssim" and such, one figure an image
# Index of the first image, images and reference to figures [batch] by name.
Measure = Callable[[int, np.ndarray, np.ndarray], Mapping[str, np.ndarray]]

COLUMNS = {
    "recipe": "recipe",
    "weight_bits": "bits/element W",
    "activation_bits": "A",
    "runs": "runs",
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


def summarize(name: str, report: Report, scores: Scores, **more: Any) -> dict[str, Any]:
    """Return one row of the results: sizes, mean scores and their bootstrap intervals."""
    intervals = {name: vars(bootstrap_interval(values)) for name, values in scores.items()}
    return {
        "recipe": name,
        "weight_bits": report.weight_bits,
        "activation_bits": report.input_bits,
        "runs": runs(report),
        "megabytes": report.bytes / 1e6,
        **intervals,
        "relative_error": report.relative_error,
        **more,
    }


def runs(report: Report) -> str:
    """Return whether a model's quantized layers are executed, and in what, or simulated."""
    ways = report.execution.split(", ")
    if "simulated" not in ways:
        return f"executed ({report.execution})"
    return "simulated" if ways == ["simulated"] else "partly simulated"


def layer_sqnr(
    model: nnx.Module, quantized: nnx.Module, seen: Mapping[str, Seen]
) -> dict[str, float]:
    """Return 10 log10(|y|**2 / |y - y_quantized|**2) of each quantized layer on recorded inputs.

    Inputs are the 16-bit model's, so that no layer's figure depends on another's error.
    """
    exact, found = dict(layers(model)), {}
    for path, module in nnx.iter_modules(quantized):
        name = ".".join(map(str, path))
        if isinstance(module, QuantizedLinear):
            layer, rows = exact[name], seen[name].rows
            assert rows is not None
            x = jnp.asarray(rows, layer.dtype).reshape(-1, rows.shape[-1])
            bias = None if layer.bias is None else layer.bias.get_value()
            graphdef, state = nnx.split(module)
            kernel = weight_rows(layer.kernel.get_value()).T
            found[name] = float(_sqnr(graphdef)(state, x, kernel, bias))
    return found


@functools.lru_cache(maxsize=64)
def _sqnr(graphdef: nnx.GraphDef) -> Callable:
    def sqnr(state, x, kernel, bias):
        wide, kernel = x.astype(jnp.float32), round_to_bf16(kernel).astype(jnp.float32)
        y = jnp.matmul(wide, kernel, precision=jax.lax.Precision.HIGHEST)
        y = y if bias is None else y + round_to_bf16(bias)
        error = QuantizedLinear.__call__(nnx.merge(graphdef, state), x) - y
        return 10 * jnp.log10(jnp.sum(y**2) / jnp.maximum(jnp.sum(error**2), 1e-30))

    return jax.jit(sqnr)


def class_of_prompts(prompts: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the index of the class whose name each prompt holds, the longest if several.

    Raises:
      ValueError: a prompt names no class; it is given.
    """
    names = [name.lower() for name in classes]
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
          ValueError: images are missing, or a file holds none.
        """
        batches = map(self._batch, sorted(self.folder.glob("*.npy")))
        found = 0
        for image in itertools.islice(itertools.chain.from_iterable(batches), count):
            yield image
            found += 1
        if found < count:
            raise ValueError(f"{self.folder} lacks images; delete the results to make them again")

    def _batch(self, path: Path) -> np.ndarray:
        try:
            batch = np.load(path, allow_pickle=False)
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path} holds no images: {error}") from None
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
            raise ValueError(f"{path} holds {batch.dtype} {list(batch.shape)}, which is no images")
        return batch

    def load(self, count: int) -> np.ndarray:
        """Return uint8 [count, h, w, 3]; raises ValueError if images are missing."""
        images = list(self.images(count))
        if sizes := {image.shape for image in images} - {images[0].shape}:
            raise ValueError(f"{self.folder} holds images of several sizes, such as {sizes.pop()}")
        return np.stack(images)


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
            new["recipes"] = _same_settings(read_results(path), new)["recipes"]
        except ValueError as error:
            raise ValueError(f"{path} can't be resumed: {error}; use another --out") from None
    return new


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """What is relied on of a row's entry in a results file; it holds more."""

    scores: dict[str, tuple[float, ...]]  # a figure an image
    summary: dict[str, Interval | float | str | None] | None = None  # of a finished row
    velocity: tuple[tuple[float, ...], ...] | None = None  # a row a noise level
    sigmas: tuple[float, ...] | None = None  # noise levels
    sqnr: dict[str, float] | None = None  # by layer

    def check(self, prompts: int) -> None:
        """Raise ValueError unless the parts fit each other, and the number of prompts."""
        lengths = {len(figures) for figures in self.scores.values()}
        if not all(map(math.isfinite, itertools.chain(*self.scores.values()))):
            raise ValueError("scores must be finite")
        if "psnr" not in self.scores or len(lengths) > 1 or max(lengths) > prompts:
            raise ValueError(f"scores must have psnr, and as many figures of each, up to {prompts}")
        if self.summary is None:
            return
        wanted: dict[str, type] = dict.fromkeys(self.scores, Interval)
        wanted |= dict.fromkeys(("weight_bits", "activation_bits"), float)
        for name, kind in wanted.items():
            if not isinstance(self.summary.get(name), kind):
                raise ValueError(f"summary.{name} must be a {kind.__name__.lower()}")
        steps = self.velocity or ()
        if len(steps) != len(self.sigmas or ()) or len({len(step) or None for step in steps}) > 1:
            raise ValueError("velocity must have a row for each of sigmas, all of one length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Origin:
    """What is relied on of a results file besides its rows."""

    model: str
    prompts: tuple[str, ...]
    device: str
    versions: dict[str, str]
    date: str
    command: tuple[str, ...]

    def __post_init__(self):
        if not (self.prompts and self.command):
            raise ValueError("prompts and command must not be empty")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
      ValueError: it can't be read, or isn't what evaluate writes; says where.
      OSError: the same.
    """
    found = read_json(path)
    try:
        given = dict(found["settings"]) | found["environment"] | found
        recipes = dict(found["recipes"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} holds no results of evaluate") from None
    prompts = len(schema.from_larger(_Origin, given, str(path)).prompts)
    for name, value in recipes.items():
        where = f"{path}: recipes.{name}"
        entry = schema.from_larger(_Entry, value, where)
        try:
            entry.check(prompts)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return found


def open_scores(results: dict[str, Any], name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's entry in the results; a new one unless it was made by the same rules.

    Args:
      results: of `open_results`.
      name: of the row.
      identity: JSON of what the figures are of; it is what the entry starts with.
    """
    entry = results["recipes"].get(name)
    if entry is None or not is_of(entry, identity):
        entry = {**identity, "scores": {"psnr": [], "ssim": []}}
        results["recipes"][name] = entry
    return entry


def is_of(entry: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether an entry's figures are of a row; fields that recipes lacked then have defaults."""
    return all(
        entry.get(key) == value or (key == "recipe" and _same_recipe(entry.get(key), value))
        for key, value in identity.items()
    )


def _same_recipe(found: Any, expected: Any) -> bool:
    """Whether two recipes in JSON are the same."""
    try:
        return Recipe.from_json(found) == Recipe.from_json(expected)
    except ValueError:
        return False


def folder_name(name: str) -> str:
    """Return a name of a row as one of a folder, whatever is in it, and another for each."""
    safe = re.sub(r"[^\w.+-]", "_", name).lstrip(".")
    if safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _same_settings(found: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
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
