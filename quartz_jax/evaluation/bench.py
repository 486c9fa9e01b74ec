"""One comparison: the 16-bit model, prompts, noise, what is measured, and the results file.

Every row is sampled as users sample: placed, with this device's kernels, and from the checkpoint
where there is one.
"""

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from quartz_jax import pipelines
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.calibrate import Blockwise, run_blocks
from quartz_jax.conversion.report import Report
from quartz_jax.engine.observe import load_statistics, observe, save_statistics
from quartz_jax.evaluation import paired, results
from quartz_jax.evaluation.judges import Judges
from quartz_jax.evaluation.metrics import bootstrap_interval
from quartz_jax.evaluation.prompts import read_lines, read_prompts
from quartz_jax.io import provenance
from quartz_jax.io.files import atomic_file, check_output, hash_files, join_hashes
from quartz_jax.recipes import Recipe, get_recipe, sites
from quartz_jax.recipes.names import split_names
from quartz_jax.recipes.sites import Site
from quartz_jax.transforms import Seen
from quartz_jax.transforms.base import Need

_OTHER_NOISE = 1_000_003  # added to the seed: calibration must not see the noise of the images
_BESIDE = ("calibration.npz", "rows.npz", "real.npy", "bf16.npy")  # statistics and features
# What of the options shapes the images or the statistics.
_SETTINGS = (
    *("steps", "guidance", "true_cfg", "size", "seed0", "batch"),
    *("calibration", "calibration_rows"),
)


class OutOfTime(Exception):
    """The time that was given is over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared on, and where the results go."""

    model: Path  # folder of the 16-bit model
    prompts: Path  # as `read_prompts` takes it
    out: Path  # the results file
    count: int  # images a row
    batch: int  # images at a time
    size: tuple[int, int] | tuple[None, None]  # width, height; None for the model's own
    steps: int | None  # the same
    guidance: float | None  # the same
    true_cfg: float | None  # the same
    seed0: int  # of the noise
    calibration_prompts: Path | None  # one a line; None for what goes with the model's kind
    calibration: int  # prompts to calibrate on, at most
    calibration_rows: int  # tokens kept of a call of a layer
    networks: Path  # these seven: see `Judges`
    real: Path | None
    real_count: int
    inception: Path | None
    clip: Path | None
    lpips: Path | None
    classes: Path | None
    minutes: float | None  # after which `OutOfTime` is raised
    shard: tuple[int, int] | None  # index and number of processes that share the rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is compared with the 16-bit model: a recipe, or a checkpoint that followed one."""

    name: str  # in tables, in the results and, made safe, of its folder of images
    recipe: Recipe
    checkpoint: Path | None = None  # that is sampled from; None quantizes the model
    hashes: tuple[str, ...] = ()  # of the checkpoint's parts
    simulated: bool = False  # computed in float32 what kernels would

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """JSON of what the figures are of."""
        given = {"recipe": self.recipe.to_json()} | ({"simulated": True} if self.simulated else {})
        return given | ({"checkpoint": list(self.hashes)} if self.checkpoint else {})

    @property
    def is_16_bit(self) -> bool:
        """Whether nothing is quantized, neither layers nor attention."""
        plain = not self.recipe.rules and self.recipe.attention == "bf16"
        return self.checkpoint is None and plain


def open_rows(
    recipes: str, checkpoints: Sequence[Path] = (), *, simulated: bool = False
) -> list[Row]:
    """Return the rows of a comparison, bf16 first.

    Args:
      recipes: names and .json files, with commas; "bench" for the whole comparison.
      checkpoints: folders of quantized ones.
      simulated: add each recipe simulated, to compare with.

    Raises:
      ValueError: an unknown name, a file or folder that can't be used, or two rows of one name.
    """
    named = [get_recipe(name) for name in split_names(recipes)]
    rows = [Row(name=recipe.name, recipe=recipe) for recipe in named]
    if simulated:
        rows += [
            Row(name=f"{row.name} (simulated)", recipe=row.recipe, simulated=True)
            for row in rows
            if not row.is_16_bit
        ]
    rows += [_checkpoint_row(folder) for folder in checkpoints]
    bf16 = Row(name="bf16", recipe=get_recipe("bf16"))
    others = [row for row in rows if row.identity != bf16.identity]
    found = {bf16.name: bf16}
    for row in others:
        if found.setdefault(row.name, row) != row:
            raise ValueError(f"{row.name!r} is the name of several rows; give each its own")
    return list(found.values())


def _checkpoint_row(folder: Path) -> Row:
    manifest = checkpoint.read_manifest(folder)
    parts = [part for x in manifest.components.values() for part in x.parts.values()]
    return Row(
        name=f"{folder.resolve().name} (checkpoint)",
        recipe=manifest.recipe,
        checkpoint=folder,
        hashes=tuple(parts),
    )


class Bench:
    """What all rows share; `evaluate` measures one of them, or what is still missing of it."""

    def __init__(self, options: Options, rows: Sequence[Row]):
        self.options, self.rows = options, list(rows)
        self.started = time.monotonic()
        prompts = read_prompts(options.prompts, options.count)
        self.prompts = prompts.texts
        given = options.calibration_prompts
        calibration = read_lines(given) if given else []
        check_output(options.out)
        names = ("networks", "real", "real_count", "inception", "clip", "lpips", "classes")
        judged = {name: getattr(options, name) for name in names}
        self.judges = Judges(prompts, self.beside, **judged)
        for row in self.rows:
            if row.checkpoint:
                pipelines.warn_of_other_base(row.checkpoint, options.model)
        self.original = pipelines.load_16_bit(options.model)
        calibration = calibration or pipelines.calibration_prompts(self.original)
        self.calibration_prompts = calibration[: options.calibration]
        self.sampling = paired.SamplingOptions.of(
            self.original, options.size, options.steps, options.guidance, options.true_cfg
        )
        for row in self.rows:  # refuse a rule that matches nothing before any work
            row.recipe.assign(self._sites)
        self._open_results()
        # Parameters in bfloat16 values: what statistics are of, and what all is compared with.
        self.rounded, self._report16 = pipelines.apply_recipe(self.original, get_recipe("bf16"))
        self.base, self._placement16 = pipelines.placed(self.rounded)
        self.noise = self._noise(options.seed0, len(self.prompts))

    def _open_results(self) -> None:
        out = self.options.out
        self.results = results.open_results(out, self.settings)
        self.out, self.known = out, {}
        if self.options.shard is not None:
            self.out, self.known = shard_path(out, self.options.shard[0]), self.results["recipes"]
            self.results = results.open_results(self.out, self.settings)
        elif not out.exists():  # files beside it are of other results
            for path in (*self.shards(), *map(self.beside, _BESIDE)):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.beside("reference"), ignore_errors=True)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What must be the same for results to go into one file."""
        options = self.options
        settings = {name: getattr(options, name) for name in _SETTINGS}
        settings["size"] = list(settings["size"])
        settings |= {"model": options.model.resolve().name, "sha256": _hash_model(options.model)}
        settings |= self.judges.settings
        settings["calibration_prompts"] = self.calibration_prompts
        return settings | {"prompts": self.prompts}

    def evaluate(self, row: Row) -> None:
        """Measure one row, or what is still missing of it, and write the results."""
        if self.finished(row):
            return
        entry = results.open_scores(self.results, row.name, row.identity)
        self.check_time()
        began = time.monotonic()
        pipeline, report, entry["placement"] = self.sampled(row)
        store = self.store(row.name)
        self._score(row, pipeline, entry, store)
        more = {} if row.is_16_bit else self._inside(pipeline, entry)
        more |= self.judges.overall(row.name, store, None if row.is_16_bit else self.originals())
        entry["report"] = report.to_json()
        entry["seconds"] = entry.get("seconds", 0) + time.monotonic() - began
        more |= {"runs": "simulated"} if row.simulated else {}
        entry["summary"] = results.summarize(row.name, report, entry["scores"], **more)
        provenance.write_results(self.out, self.results)

    def sampled(self, row: Row) -> tuple[Any, Report, str]:
        """Return the pipeline that a row's images come from, its report, and how its layers run."""
        if row.is_16_bit:
            return self.base, self._report16, self._placement16.table()
        if row.checkpoint:
            opened = pipelines.open_checkpoint(row.checkpoint)
            pipeline, placement = pipelines.placed(opened.pipeline.load())
            return pipeline, opened.report, placement.table()
        seen = self.calibration(row.recipe) if row.recipe.calibrated else None
        pipeline, report = pipelines.apply_recipe(self.original, row.recipe, seen)
        pipeline, placement = pipelines.placed(pipeline, simulate=row.simulated)
        return pipeline, report, placement.table()

    def _score(
        self, row: Row, pipeline: Any, entry: dict[str, Any], store: results.ImageStore
    ) -> None:
        """Make the images that are missing and compare them with the 16-bit ones."""

        def measure(start: int, images: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
            store.put(start, images)
            return self.judges.measure(start, images, originals)

        count, scores = len(self.prompts), entry["scores"]
        sampler = self._sampler(pipeline)
        batches = results.score(sampler, self.reference, count, self.options.batch, scores, measure)
        with tqdm(total=count, initial=len(scores["psnr"]), desc=row.name, unit="image") as bar:
            for images in batches:
                provenance.write_results(self.out, self.results)
                bar.update(images)
                self.check_time()

    def _inside(self, pipeline: Any, entry: dict[str, Any]) -> dict[str, Any]:
        """Add the errors by step and by layer to an entry; return their means."""
        path = self.trajectory
        entry["velocity"] = paired.velocity_errors(pipeline, path, self.sampling)
        entry["sigmas"] = [float(level["time"]) for level in path.levels]
        exact = pipelines.loaded_main(self.rounded)
        entry["sqnr"] = results.layer_sqnr(exact, pipelines.loaded_main(pipeline), self.inputs)
        velocity = vars(bootstrap_interval(np.mean(entry["velocity"], axis=0)))
        layers = list(entry["sqnr"].values())  # none where attention alone is in 8 bits
        return {"velocity": velocity} | ({"sqnr": float(np.mean(layers))} if layers else {})

    def finished(self, row: Row) -> bool:
        """Whether all images of a row are measured."""
        found = (x.get(row.name) for x in (self.results["recipes"], self.known))
        return any(results.is_of(x, row.identity) and self.complete(x) for x in found if x)

    def complete(self, entry: dict[str, Any]) -> bool:
        """Whether an entry of the results holds all images and the summary."""
        return bool(entry.get("summary")) and len(entry["scores"]["psnr"]) == len(self.prompts)

    def shards(self) -> list[Path]:
        """Return the results of processes that are there."""
        out = self.options.out
        return sorted(out.parent.glob(f"{_without_patterns(out.stem)}.shard*.json"))

    def take_in(self) -> None:
        """Add the rows that processes finished."""
        for path in self.shards():
            found = results.open_results(path, self.settings)["recipes"]
            whole = {name: entry for name, entry in found.items() if self.complete(entry)}
            self.results["recipes"] |= whole

    def prepare(self, rows: Sequence[Row]) -> None:
        """Make what other processes find: inputs beside the results, programs in the cache."""
        _ = self.inputs, self.trajectory
        for row in rows:
            if row.checkpoint is None and row.recipe.calibrated:
                self.calibration(row.recipe)
        self.reference(0, min(self.options.batch, len(self.prompts)))
        self.judges.prepare(self.originals())

    @functools.cached_property
    def trajectory(self) -> paired.Trajectory:
        """The 16-bit model's way from noise to images for the first batch of prompts."""
        part = slice(0, self.options.batch)
        return paired.trajectory(self.base, self.prompts[part], self.noise[part], self.sampling)

    @functools.cached_property
    def _sites(self) -> list[Site]:
        return sites(pipelines.loaded_main(self.original))

    @functools.cached_property
    def inputs(self) -> dict[str, Seen]:
        """Inputs of the quantized linears on the first batch of prompts that are evaluated."""
        part = slice(0, self.options.batch)
        paths = {path for row in self.rows for path in row.recipe.assign(self._sites)}
        rows: frozenset[Need] = frozenset({"rows"})
        needs = dict.fromkeys(paths, rows)
        return self._observed("rows", self.prompts[part], self.noise[part], needs)

    def calibration(self, recipe: Recipe) -> dict[str, Seen]:
        """Return statistics for a recipe on the calibration prompts, from other noise."""
        path, wanted = self.beside("calibration.npz"), recipe.needs(self._sites)
        known = load_statistics(path) if path.exists() else {}
        if not _covers(known, wanted):
            path.unlink(missing_ok=True)
            recipes = [recipe, *(row.recipe for row in self.rows if row.checkpoint is None)]
            needs = _union([x.needs(self._sites) for x in recipes])
            prompts = self.calibration_prompts
            noise = self._noise(self.options.seed0 + _OTHER_NOISE, len(prompts))
            known = self._observed("calibration", prompts, noise, needs)
        return known

    def _observed(
        self, name: str, prompts: list[str], noise: jax.Array, needs: dict[str, frozenset[Need]]
    ) -> dict[str, Seen]:
        """Return what linears are given, from the file beside the results if it is there."""
        path = self.beside(f"{name}.npz")
        known = load_statistics(path) if path.exists() else {}
        if not _covers(known, needs):
            samples = paired.calibration_samples(
                self.base, prompts, noise, self.sampling, self.options.batch
            )
            rows = self.options.calibration_rows * len(samples)
            transformer = pipelines.loaded_main(self.rounded)
            call = run_blocks if isinstance(transformer, Blockwise) else None
            known = observe(transformer, samples, needs, rows=rows, call=call)
            save_statistics(path, known)
        return known

    def reference(self, start: int, stop: int) -> np.ndarray:
        """Return the 16-bit model's images start..stop, which are kept beside the results."""
        path = self.beside("reference") / f"{start:06d}-{stop:06d}.npy"
        if not path.exists():
            images = self._sampler(self.base)(start, stop)
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.save(file, images)
        return np.load(path)

    def originals(self) -> Iterator[np.ndarray]:
        """Yield the 16-bit model's images, a batch at a time."""
        count, batch = len(self.prompts), self.options.batch
        return (self.reference(i, min(i + batch, count)) for i in range(0, count, batch))

    def _sampler(self, pipeline: Any) -> results.Sample:
        """Return a function that makes images start..stop; noise i depends on the seed and i."""

        def sample(start: int, stop: int) -> np.ndarray:
            part = slice(start, stop)
            return paired.make_images(pipeline, self.prompts[part], self.noise[part], self.sampling)

        return sample

    def _noise(self, seed: int, count: int) -> jax.Array:
        """Return initial latents [count, tokens, channels]."""
        key, sampling = jax.random.key(seed), self.sampling
        return self.original.initial_noise(key, count, sampling.height, sampling.width)

    def store(self, name: str) -> results.ImageStore:
        """Return where the images of a row are kept."""
        return results.ImageStore(self.beside("images") / results.folder_name(name))

    def beside(self, name: str) -> Path:
        """Return a path beside the results file."""
        return self.options.out.with_suffix(f".{name}")

    def minutes_left(self) -> float | None:
        """Return what is left of the minutes, None if there is no end to them."""
        if not self.options.minutes:
            return None
        return self.options.minutes - (time.monotonic() - self.started) / 60

    def check_time(self) -> None:
        """Raise OutOfTime once the minutes are over."""
        left = self.minutes_left()
        if left is not None and left < 0:
            raise OutOfTime


def shard_path(out: Path, index: int) -> Path:
    """Return where a process of several keeps its results."""
    return out.with_suffix(f".shard{index}.json")


def _covers(seen: dict[str, Seen], needs: dict[str, frozenset[Need]]) -> bool:
    """Whether statistics hold all that is needed."""
    return all(path in seen and need <= seen[path].needs for path, need in needs.items())


def _union(several: list[dict[str, frozenset[Need]]]) -> dict[str, frozenset[Need]]:
    """Return what any of several needs, by path."""
    paths = {path for needs in several for path in needs}
    return {path: frozenset().union(*(x.get(path, ()) for x in several)) for path in paths}


def _hash_model(folder: Path) -> str:
    """Return a hash of all that makes a model's images: weights, configs and tokenizers."""
    parts = [path for path in sorted(folder.iterdir()) if (path / "config.json").exists()]
    parts += [path for path in sorted(folder.glob("tokenizer*")) if path.is_dir()]
    parts += [folder / "scheduler"]
    files = [(f"{path.name}/{kind}", hash_files(path, kind)) for path in parts for kind in _KINDS]
    return join_hashes([*files, ("model_index.json", hash_files(folder, "model_index.json"))])


_KINDS = ("*.safetensors", "*.json")


def _without_patterns(name: str) -> str:
    """Return a file name for `glob` that stands for itself alone."""
    return "".join(f"[{x}]" if x in "*?[" else x for x in name)
