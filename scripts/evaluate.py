r"""Compare recipes and methods with bf16 over many prompts, from the same noise, resumable.

    python scripts/evaluate.py --recipes bf16,w4a4,nvfp4,svdquant+int4-g64
    python scripts/evaluate.py --recipes bf16,w4a4,w4a4x,bench --count 512 --batch 64 \
        --calibration 128 --calibration-rows 256 --jobs 10

Recipes are built-in names, .json files, or methods by their parts (quartz_jax/methods/names.py);
"bench" is the whole comparison. Run the same command again to go on where it stopped. Most of the
time goes into compiling a program a recipe: --jobs spreads the recipes over processes, which share
the device (or several) and the compiled programs on disk.

FID, CLIP score and LPIPS as they are published for such models, with their real networks:

    pip install -e '.[published]'
    python scripts/evaluate.py --model FLUX.1-dev --recipes bf16,w4a4 --count 5000 \
        --prompts MJHQ-30K/meta_data.json --real MJHQ-30K --inception weights-inception.pth \
        --clip clip-vit-large-patch14 --lpips alexnet.pth

Images are kept beside the results: 5000 of 1024x1024 take 16 GB a recipe, and 63 GB for the 16-bit
model's in float32, which all recipes and processes are compared with.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from models import load_pipeline
from models.pipeline import FluxPipeline
from quartz_jax import get_recipe
from quartz_jax import pipelines as common
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import cache as compilation_cache
from quartz_jax.evaluation import metrics_torch as published
from quartz_jax.evaluation import paired
from quartz_jax.evaluation import results as evaluation
from quartz_jax.evaluation.metrics import bootstrap_interval, kernel_distance, psnr, ssim
from quartz_jax.evaluation.metrics_jax import FILES, ImageNetworks
from quartz_jax.evaluation.photos import find_photos, read_photos
from quartz_jax.evaluation.prompts import read_prompts
from quartz_jax.io import provenance
from quartz_jax.io.files import atomic_file, check_output, hash_files
from quartz_jax.io.images import read_image, to_bytes
from quartz_jax.methods import (
    LayerStatistics,
    Method,
    load_statistics,
    record,
    save_statistics,
    simulate_model,
    split_names,
)

_RECIPES = "w8a8,w4a16,w4a8x,w4a8,w4a4x,w4a4,w4a4-paper,int4"
_SETTINGS = ("steps", "guidance", "true_cfg", "size", "seed0")  # arguments that shape the images
_SETTINGS += ("calibration", "calibration_rows")
_BESIDE = ("calibration.npz", "rows.npz", "real.npy", "bf16.npy")  # inputs; Inception's features


class OutOfTime(Exception):
    """The time given by --minutes is over."""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, keep the results in a file and print a table."""
    args = parse(argv)
    common.compile_quickly()
    recipes = [evaluation.resolve(name) for name in split_names(args.recipes)]
    if args.jobs > 1:  # before the device is asked for its memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    compilation_cache.enable()
    bench = Bench(args)
    try:
        if args.jobs > 1:
            spread(bench, recipes, sys.argv[1:] if argv is None else argv)
        for recipe in recipes if args.shard is None else recipes[args.shard[0] :: args.shard[1]]:
            bench.evaluate(recipe)
    except OutOfTime:
        print(f"{args.minutes} minutes are over; the same command goes on from here")
    rows = [bench.results["recipes"].get(x.name, {}).get("summary") for x in recipes]
    print(evaluation.markdown_table([row for row in rows if row]))


def spread(bench: "Bench", recipes: list, argv: Sequence[str]) -> None:
    """Evaluate recipes in --jobs processes, each its share, and take in what they found.

    What all need is made first: bf16's images and program, and what the linears are given.

    Raises:
      ValueError: a process failed; its log is named.
    """
    bench.take_in()
    for recipe in filter(recipe_is_16bit, recipes):
        bench.evaluate(recipe)
    provenance.write_results(bench.args.out, bench.results)
    if missing := [x for x in recipes if not bench.finished(x)]:
        run_shards(bench, recipes, missing, argv)
    for path in bench.shards():
        path.unlink()


def run_shards(bench: "Bench", recipes: list, missing: list, argv: Sequence[str]) -> None:
    """Run the processes to their end; what isn't finished then raises, and stays in their files."""
    bench.prepare(calibrated=any(getattr(x, "calibrated", False) for x in missing))
    jobs = range(min(bench.args.jobs, len(recipes)))
    logs = [shard_path(bench.args.out, i).with_suffix(".log") for i in jobs]
    processes = [start_shard(bench, i, log, argv) for i, log in enumerate(logs)]
    try:
        with tqdm(total=len(recipes), desc=bench.args.model.name, unit="recipe") as bar:
            while any(process.poll() is None for process in processes):
                time.sleep(1)
                bench.take_in()
                bar.update(sum(map(bench.finished, recipes)) - bar.n)
    finally:  # whatever ends this ends them
        for process in processes:
            process.terminate()
            process.wait()
    bench.take_in()
    provenance.write_results(bench.args.out, bench.results)
    for process, log in zip(processes, logs, strict=True):
        if process.returncode:
            raise ValueError(f"a process of {len(processes)} failed; {log} says why")
    if not all(map(bench.finished, recipes)):
        raise OutOfTime
    for log in logs:
        log.unlink()


def start_shard(bench: "Bench", index: int, log: Path, argv: Sequence[str]) -> subprocess.Popen:
    """Start a process that evaluates every --jobs-th recipe into a file of its own."""
    more = ["--jobs", "1", "--shard", f"{index}/{bench.args.jobs}"]
    if bench.args.minutes:
        more += ["--minutes", str(max(bench.minutes_left(), 1e-9))]
    env = dict(os.environ)
    if jax.default_backend() == "gpu":  # in turn on every GPU
        every = ",".join(str(device.id) for device in jax.local_devices())
        names = env.get("CUDA_VISIBLE_DEVICES", every).split(",")
        env["CUDA_VISIBLE_DEVICES"] = names[index % len(names)]
    command = [sys.executable, __file__, *argv, *more]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=env)


def shard_path(out: Path, index: int) -> Path:
    """Return where a process of several keeps its results."""
    return out.with_suffix(f".shard{index}.json")


class Bench:
    """What all recipes share: the 16-bit model, prompts, noise, metrics and the results file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.started = time.monotonic()
        prompts = read_prompts(args.prompts, args.count)
        self.prompts = prompts.texts
        size = cli.parse_size(args.size)  # refuse it before any work
        check_output(args.out)
        self.published = published.open_networks(args.inception, args.clip, args.lpips)
        in_files = args.real is not None and args.real.is_dir()
        self.real_files = find_photos(args.real, prompts.images) if in_files else []
        self.networks = open_networks(args.networks)
        self.real = read_photos(args.real, args.real_count) if args.real and not in_files else None
        self.labels = read_labels(args.classes, self.prompts)
        self.original = load_pipeline(args.model, dtype=common.compute_dtype())
        self.options = paired.SamplingOptions.of(
            self.original, size, args.steps, args.guidance, args.true_cfg
        )
        self.results = evaluation.open_results(args.out, self.settings)
        self.out, self.known = args.out, {}
        if args.shard is not None:
            self.out, self.known = shard_path(args.out, args.shard[0]), self.results["recipes"]
            self.results = evaluation.open_results(self.out, self.settings)
        elif not args.out.exists():  # files beside it are of other results
            for path in self.shards():
                path.unlink()
            for name in _BESIDE:
                self.beside(name).unlink(missing_ok=True)
            shutil.rmtree(self.beside("reference"), ignore_errors=True)
        self.base, _ = common.apply_recipe(self.original, get_recipe("bf16"))
        self.noise = self.noise_for(args.seed0, len(self.prompts))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What must be the same for results to go into one file."""
        args = self.args
        weights = hash_files(args.model / "transformer", "*.safetensors")
        settings = {name: getattr(args, name) for name in _SETTINGS}
        settings |= {"networks": self.networks is not None, "real": args.real and args.real.name}
        settings |= {"model": args.model.resolve().name, "sha256": weights}
        settings |= self.published.hashes
        return settings | {"prompts": self.prompts}

    def evaluate(self, recipe) -> None:
        """Measure one recipe, or what is still missing of it."""
        if self.finished(recipe):
            return
        entry = evaluation.open_scores(self.results, recipe)
        self.check_time()
        began = time.monotonic()
        pipeline, report = self.quantized(recipe)
        store = self.store(recipe.name)
        self.score(recipe, pipeline, entry, store)
        more = {}
        if not recipe_is_16bit(recipe):
            path = self.trajectory
            entry["velocity"] = paired.velocity_errors(pipeline, path, self.options)
            entry["sigmas"] = path.sigmas[:-1].tolist()
            more["velocity"] = vars(bootstrap_interval(np.mean(entry["velocity"], axis=0)))
            entry["sqnr"] = evaluation.layer_sqnr(
                self.base.transformer, pipeline.transformer, self.rows
            )
            more["sqnr"] = float(np.mean(list(entry["sqnr"].values())))
        more |= self.against_photos(store) | self.frechet_distances(recipe, store)
        entry["report"] = report.to_json()
        entry["seconds"] = entry.get("seconds", 0) + time.monotonic() - began
        bits = evaluation.mean_activation_bits(self.original.transformer, recipe)
        entry["summary"] = evaluation.summarize(recipe, report, entry["scores"], bits, **more)
        provenance.write_results(self.out, self.results)

    def finished(self, recipe) -> bool:
        """Whether all images of a recipe are measured."""
        found = (x.get(recipe.name) for x in (self.results["recipes"], self.known))
        return any(
            entry["recipe"] == recipe.to_json() and self.complete(entry) for entry in found if entry
        )

    def complete(self, entry: dict[str, Any]) -> bool:
        """Whether an entry of the results holds all images and the summary."""
        return bool(entry.get("summary")) and len(entry["scores"]["psnr"]) == len(self.prompts)

    def shards(self) -> list[Path]:
        """Return the results of processes that are there."""
        return sorted(self.args.out.parent.glob(f"{self.args.out.stem}.shard*.json"))

    def take_in(self) -> None:
        """Add the recipes that processes finished."""
        for path in self.shards():
            found = evaluation.open_results(path, self.settings)["recipes"]
            whole = {name: entry for name, entry in found.items() if self.complete(entry)}
            self.results["recipes"] |= whole

    def prepare(self, calibrated: bool) -> None:
        """Make what other processes find: inputs beside the results, programs in the cache."""
        _ = self.rows, self.trajectory, self.calibration if calibrated else None
        self.reference(0, min(self.args.batch, len(self.prompts)))
        if self.published.inception:
            _ = self.bf16_inception, self.real_inception if self.real_files else None

    def quantized(self, recipe) -> tuple[FluxPipeline, Any]:
        """Return the pipeline with a transformer that follows a recipe, and the report."""
        if not isinstance(recipe, Method):
            return common.apply_recipe(self.original, recipe)
        seen = self.calibration if recipe.calibrated else None
        model, report = simulate_model(self.original.transformer, recipe, seen, progress=True)
        return dataclasses.replace(self.original, transformer=model), report

    def score(self, recipe, pipeline, entry: dict[str, Any], store: evaluation.ImageStore) -> None:
        """Make the images that are missing and compare them with the 16-bit ones."""
        samples, scores = (self.sampler(pipeline), self.reference), entry["scores"]
        measure = functools.partial(self.measure, store)
        batches = evaluation.score(*samples, len(self.prompts), self.args.batch, scores, measure)
        done = len(scores["psnr"])
        with tqdm(total=len(self.prompts), initial=done, desc=recipe.name, unit="image") as bar:
            for images in batches:
                provenance.write_results(self.out, self.results)
                bar.update(images)
                self.check_time()

    def measure(
        self,
        store: evaluation.ImageStore,
        start: int,
        images: np.ndarray,  # [batch, h, w, 3], floats in 0..1
        originals: np.ndarray,  # the same shape
    ) -> dict[str, np.ndarray]:
        """Keep a batch of images and return what is measured image by image, [batch] each."""
        store.put(start, images)
        figures = {"psnr": psnr(images, originals), "ssim": ssim(images, originals)}
        if self.networks is not None:
            figures["stlpips"] = self.networks.distance(images, originals)
        if self.published.lpips:
            figures["lpips"] = self.published.lpips.distance(images, originals)
        if self.published.clip:
            prompts = self.prompts[start : start + len(images)]
            figures["clip"] = self.published.clip.score(images, prompts)
        return figures

    def frechet_distances(self, recipe, store: evaluation.ImageStore) -> dict[str, float]:
        """Return FID against the real images, if given, and against the 16-bit model's."""
        if self.published.inception is None:
            return {}
        count, more = len(self.prompts), {}
        images = tqdm(store.images(count), recipe.name, count, unit="feature")
        features = self.published.inception.features(images)
        if self.real_files:
            more["fid"] = published.frechet_distance(features, self.real_inception)
        if not recipe_is_16bit(recipe):
            more["fid_to_bf16"] = published.frechet_distance(features, self.bf16_inception)
        return more

    @functools.cached_property
    def real_inception(self) -> np.ndarray:
        """Inception's features of the real images, [n, 2048]."""
        images = (np.asarray(read_image(path)) for path in self.real_files)
        return self.inception_features("real", images, len(self.real_files))

    @functools.cached_property
    def bf16_inception(self) -> np.ndarray:
        """Inception's features of the 16-bit model's images, [n, 2048]."""
        count, batch = len(self.prompts), self.args.batch
        batches = (self.reference(i, min(i + batch, count)) for i in range(0, count, batch))
        images = (image for images in batches for image in to_bytes(images))
        return self.inception_features("bf16", images, count)

    def inception_features(self, name: str, images: Iterable, count: int) -> np.ndarray:
        """Return Inception's features, from the file beside the results if it is there."""
        path = self.beside(f"{name}.npy")
        if not path.exists():
            images = tqdm(images, f"{name} images", count, unit="feature")
            features = self.published.inception.features(images)
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.save(file, features)
        return np.load(path)

    def against_photos(self, store: evaluation.ImageStore) -> dict[str, Any]:
        """Return KID against real images and agreement with the prompts' classes, where given."""
        if self.networks is None or (self.real is None and self.labels is None):
            return {}
        features, logits = self.networks.features(store.load(len(self.prompts)))
        more = {}
        if self.real is not None:
            more["kid"] = vars(kernel_distance(features, self.real_features))
        if self.labels is not None:
            classes, wanted = self.labels
            hits = classes[np.argmax(logits[:, classes], axis=1)] == wanted
            more["agreement"] = vars(bootstrap_interval(hits.astype(float)))
        return more

    @functools.cached_property
    def real_features(self) -> np.ndarray:
        """Features of the real images, [n, 1280]."""
        return self.networks.features(self.real)[0]

    @functools.cached_property
    def trajectory(self) -> paired.Trajectory:
        """The 16-bit model's way from noise to images for the first batch of prompts."""
        part = slice(0, self.args.batch)
        return paired.trajectory(self.base, self.prompts[part], self.noise[part], self.options)

    @functools.cached_property
    def rows(self) -> dict[str, LayerStatistics]:
        """Inputs of the linears on the first batch of prompts that are evaluated."""
        part = slice(0, self.args.batch)
        return self.recorded("rows", self.prompts[part], self.noise[part])

    @functools.cached_property
    def calibration(self) -> dict[str, LayerStatistics]:
        """Inputs of the linears on the calibration prompts, from other noise."""
        lines = self.args.calibration_prompts.read_text().splitlines()
        prompts = cli.check_prompts([x for x in lines if x.strip()])[: self.args.calibration]
        noise = self.noise_for(self.args.seed0 + 1_000_003, len(prompts))
        return self.recorded("calibration", prompts, noise)

    def recorded(self, name: str, prompts: list[str], noise: jax.Array):
        """Return what the linears are given, from the file beside the results if it is there."""
        path = self.beside(f"{name}.npz")
        if not path.exists():
            run = paired.run_for_recording(self.base, prompts, noise, self.options, self.args.batch)
            rows = self.args.calibration_rows
            save_statistics(path, record(self.base.transformer, run, rows_per_call=rows))
        return load_statistics(path)

    def reference(self, start: int, stop: int) -> np.ndarray:
        """Return the 16-bit model's images start..stop, which are kept beside the results."""
        path = self.beside("reference") / f"{start:06d}-{stop:06d}.npy"
        if not path.exists():
            images = self.sampler(self.base)(start, stop)
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.save(file, images)
        return np.load(path)

    def sampler(self, pipeline: FluxPipeline) -> evaluation.Sample:
        """Return a function that makes images start..stop; noise i depends on the seed and i."""

        def sample(start: int, stop: int) -> np.ndarray:
            part = slice(start, stop)
            noise = self.noise[part]
            return paired.make_images(pipeline, self.prompts[part], noise, self.options)

        return sample

    def noise_for(self, seed: int, count: int) -> jax.Array:
        """Return initial latents [count, tokens, channels]."""
        key = jax.random.key(seed)
        return self.original.initial_noise(key, count, self.options.height, self.options.width)

    def store(self, name: str) -> evaluation.ImageStore:
        """Return where the images of a recipe are kept."""
        return evaluation.ImageStore(self.beside("images") / re.sub(r"[^\w.+-]", "_", name))

    def beside(self, name: str) -> Path:
        """Return a path beside the results file."""
        return self.args.out.with_suffix(f".{name}")

    def minutes_left(self) -> float | None:
        """Return what is left of --minutes, None without them."""
        if not self.args.minutes:
            return None
        return self.args.minutes - (time.monotonic() - self.started) / 60

    def check_time(self) -> None:
        """Raise OutOfTime once --minutes are over."""
        if self.args.minutes and self.minutes_left() < 0:
            raise OutOfTime


def recipe_is_16bit(recipe) -> bool:
    """Whether nothing is quantized."""
    return not recipe.rules


def open_networks(folder: Path) -> ImageNetworks | None:
    """Return the metric networks; None, with a word about it, if they were never converted."""
    if any((folder / name).exists() for name in FILES.values()):
        return ImageNetworks(folder)
    print(
        f"{folder} holds no metric networks: no ST-LPIPS, KID and class agreement "
        "(scripts/convert_metric_networks.py makes them)",
        file=sys.stderr,
    )
    return None


def read_labels(path: Path | None, prompts: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return all classes, and the one of each prompt, as ImageNet-1k indices."""
    if path is None:
        return None
    classes = json.loads(path.read_text())
    indices = np.array([entry["in1k"] for entry in classes])
    return indices, indices[evaluation.class_of_prompts(prompts, classes)]


def parse_shard(text: str) -> tuple[int, int]:
    """Return (index, count) from text such as "2/8", for argparse."""
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise ValueError
    return index, count


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=common.EMBEDDED_MODEL, help="16-bit model folder")
    add("--recipes", default=_RECIPES, help='names or .json files, with commas; or "bench"')
    add("--prompts", type=Path, help="one a line, or MJHQ-30K's .json; default: the model's own")
    add("--count", type=cli.positive, default=128, help="images a recipe")
    add("--batch", type=cli.positive, default=16, help="images at a time")
    cli.add_sampling(parser)
    add("--seed0", type=cli.seed, default=0, help="of the noise of all images")
    add("--calibration-prompts", type=Path, help="default: the model's calibration_prompts.txt")
    add("--calibration", type=cli.positive, default=32, help="prompts to calibrate on")
    add("--calibration-rows", type=cli.positive, default=128, help="tokens kept a call of a layer")
    add("--networks", type=Path, default=Path("outputs/metric_networks"), help="converted ones")
    add("--real", type=Path, help=".npz of real images, for KID; or a folder, for FID")
    add("--real-count", type=cli.positive, default=2048, help="of the .npz, drawn at random")
    add("--inception", type=Path, help="torch-fidelity's weights-inception-*.pth, for FID")
    add("--clip", type=Path, help="folder of a CLIP model in transformers' layout, for CLIP score")
    add("--lpips", type=Path, help="torchvision's alexnet-*.pth, for LPIPS")
    add("--classes", type=Path, help="JSON list of classes (name, in1k), for class agreement")
    add("--minutes", type=float, help="stop after so long; the same command goes on")
    add("--jobs", type=cli.positive, default=1, help="processes that share the recipes")
    add("--shard", type=parse_shard, metavar="I/N", help="only every N-th recipe, from number I on")
    add("--out", type=Path, default=Path("outputs/evaluation.json"), help="results, resumed from")
    args = parser.parse_args(argv)
    if args.shard is not None and (args.jobs > 1 or not args.out.exists()):
        raise ValueError("--shard is what --jobs starts; give --jobs and no --shard")
    if args.real is not None and args.real.is_dir() and args.inception is None:
        raise ValueError(f"--real {args.real} is a folder, which is for FID; give --inception too")
    args.prompts = args.prompts or args.model / "prompts.txt"
    args.calibration_prompts = args.calibration_prompts or args.model / "calibration_prompts.txt"
    return args


if __name__ == "__main__":
    sys.exit(cli.run(main))
