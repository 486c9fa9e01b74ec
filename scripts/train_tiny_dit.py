r"""Train tiny-dit from photos by class, in the latents of an autoencoder that is there.

    python scripts/train_tiny_dit.py train export --data tiny-imagenet --work dit/ --out OUT
    python scripts/train_tiny_dit.py judge plot --data tiny-imagenet --out OUT

Training resumes from the state it saved under --work and uses all local devices; what --stop-after
ended is done by the same command, and until then isn't exported. "judge" draws images of all
classes, and prints how many a classifier takes for theirs (--networks, of
scripts/convert_metric_networks.py) and, where the photos' folder has val.npz, their KID.
"plot" draws the losses into OUT/training (needs matplotlib).
"""

import argparse
import dataclasses
import functools
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from models import load_pipeline
from models import training as loop
from models.dit.params import TRANSFORMER
from models.noise_schedulers import DDIMScheduler
from models.photos import Photos, check_photos, read_classes, read_photos
from models.tiny_dit import architecture, training
from models.vae.params import AUTOENCODER_KL
from quartz_jax import pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import cache as compilation_cache
from quartz_jax.evaluation import metrics_jax
from quartz_jax.evaluation.metrics import bootstrap_interval, kernel_distance
from quartz_jax.io.files import check_output

STAGES = ("train", "export", "judge", "plot")
# Enough on an H100.
TRAINING = loop.TrainingConfig(
    steps=60_000,
    minutes=6.0,
    batch_size=512,
    learning_rate=6e-4,
    warmup=1000,
    save_minutes=2.0,
)
VAE = Path(__file__).parents[1] / "models" / "tiny_flux_photo" / "vae"
_BATCH = 128  # images drawn at a time
_REAL = 2048  # photos that images are compared with


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and refuse what can't be done."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("stages", nargs="+", choices=STAGES, help="run one after another")
    add("--data", type=Path, required=True, help="folder of photos by class")
    add("--classes", type=cli.positive, default=100, help="spread over all; default: 100")
    add("--vae", type=Path, default=VAE, help="whose latents are learned; default: photos' own")
    add("--work", type=Path, help="states and logs")
    add("--start", type=Path, help="weights to begin with, as export or --keep wrote them")
    add("--keep", type=Path, help="folder for the weights of each state that is saved")
    add("--out", type=Path, help="all but train: the model folder")
    add("--minutes", type=cli.amount, help="training time")
    add("--steps", type=cli.positive, help="of training, at most")
    add("--batch-size", type=cli.positive, help="on each device")
    add("--stop-after", type=cli.amount, default=math.inf, help="minutes; resumable")
    add("--class-dropout", type=cli.share, default=0.1, help="labels left out, below 1")
    add("--count", type=cli.positive, default=512, help="images to judge")
    add("--guidance", type=cli.finite, nargs="+", default=[architecture.GUIDANCE])
    add("--sampling-steps", type=cli.positive, default=architecture.STEPS)
    add("--networks", type=Path, default=Path("outputs/metric_networks"), help="converted ones")
    args = parser.parse_args(argv)
    cli.check_order(args.stages, STAGES)
    if args.work is None and {"train", "export"} & set(args.stages):
        raise ValueError("--work is missing; name a folder for states and logs")
    if args.out is None and args.stages != ["train"]:
        raise ValueError("--out is missing; name the model folder")
    check_photos(args.data)
    if args.classes > (there := len(read_classes(args.data))):
        raise ValueError(f"--classes is {args.classes}; {args.data} has {there}")
    if args.start is not None and not args.start.is_dir():
        raise ValueError(f"--start {args.start} is no folder of weights")
    if "judge" in args.stages:
        _check_judge(args)
    for folder in filter(None, (args.work, args.keep, args.out)):
        check_output(folder / "x")
    return args


def _check_judge(args: argparse.Namespace) -> None:
    """Raise ValueError without the classifier, or without its numbers of the classes."""
    metrics_jax.load_network(args.networks, "efficientnet_lite0")
    if not all("in1k" in entry for entry in read_classes(args.data, args.classes)):
        raise ValueError(f"{args.data / 'classes.json'} has classes without in1k; judge needs it")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages; training that isn't finished ends the run."""
    args = parse(argv)
    pipelines.compile_quickly()
    compilation_cache.enable()
    if "train" in args.stages and not train(args):
        print("training isn't finished; the same command goes on from here")
        return
    for stage in args.stages:
        if stage != "train":
            {"export": export, "judge": judge, "plot": plot}[stage](args)


@functools.cache
def read_data(folder: Path, classes: int) -> Photos:
    """Return the photos, decoded once for all stages."""
    return read_photos(folder, classes)


def load_vae(folder: Path) -> Any:
    """Return the autoencoder without a shift of its latents, which DiT's pipeline knows nothing of.

    Their deviation becomes 1, and their mean stays.
    """
    vae = AUTOENCODER_KL.load(folder, dtype=pipelines.compute_dtype())
    vae.config = dataclasses.replace(vae.config, shift_factor=0.0)
    return vae


def train(args: argparse.Namespace) -> bool:
    """Train the transformer; returns whether its schedule is finished."""
    given = {"minutes": args.minutes, "batch_size": args.batch_size, "steps": args.steps}
    config = dataclasses.replace(TRAINING, **{name: x for name, x in given.items() if x})
    config = dataclasses.replace(config, scan=min(config.scan, config.steps))
    data = training_data(args)
    graphdef, params = initialise(data["latents"].shape, args.classes)
    if args.start is not None:
        params = given_params(args.start, params)
    table = training.noise_table(DDIMScheduler.from_json(architecture.SCHEDULER_CONFIG))
    loss = training.hybrid_loss(graphdef, table, config.batch_size, args.class_dropout)

    def keep(ema: Any) -> None:
        if args.keep is not None:
            TRANSFORMER.export(nnx.merge(graphdef, ema), args.keep)

    _, finished = loop.train(
        "train",
        config,
        loss,
        params,
        data,
        args.work / "train",
        stop_after=args.stop_after,
        saved=keep,
    )
    return finished


def training_data(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return latents [n, c, h, w] in bfloat16, of photos and their mirror images, and classes."""
    photos, vae = read_data(args.data, args.classes), load_vae(args.vae)
    images = np.concatenate([photos.images, photos.images[:, :, ::-1]])
    latents = loop.encode_dataset(*nnx.split(vae), images) * vae.config.scaling_factor
    print(f"latents: mean {latents.mean():.4f}, deviation {latents.std():.4f}")
    return {
        "latents": latents.transpose(0, 3, 1, 2).astype(jnp.bfloat16),
        "labels": np.tile(photos.labels, 2),
    }


def initialise(shape: Sequence[int], classes: int) -> tuple[nnx.GraphDef, Any]:
    """Return graph definition and float32 parameters of a transformer for latents [n, c, h, w]."""
    config = architecture.transformer_config(shape[1], classes, shape[2])
    options = {"dtype": pipelines.compute_dtype(), "param_dtype": jnp.float32}
    return nnx.split(TRANSFORMER.module(config, rngs=nnx.Rngs(0), **options))


def given_params(folder: Path, like: Any) -> Any:
    """Return the weights of a folder; ValueError if they are of another model than `like`."""
    params = nnx.state(TRANSFORMER.load(folder, dtype=jnp.float32))
    sizes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(x)) for x in (params, like)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"--start {folder} holds a transformer of other sizes than this one")
    return params


def export(args: argparse.Namespace) -> None:
    """Write the whole model folder.

    Raises:
      ValueError: training isn't finished.
    """
    loop.check_finished(args.work / "train")
    vae, photos = load_vae(args.vae), read_data(args.data, args.classes)
    side = photos.images.shape[1]
    latent_side = side // vae.config.downsampling
    shape = (0, vae.config.latent_channels, latent_side, latent_side)
    graphdef, params = initialise(shape, args.classes)
    ema = loop.restore_ema(args.work / "train", params)
    TRANSFORMER.export(nnx.merge(graphdef, ema), args.out / "transformer")
    AUTOENCODER_KL.export(vae, args.out / "vae")
    loop.write_json(args.out / "scheduler" / "scheduler_config.json", architecture.SCHEDULER_CONFIG)
    loop.write_json(args.out / "model_index.json", architecture.model_index(photos.classes, side))
    names = [photos.classes[i]["name"] for i in np.random.default_rng(0).permutation(args.classes)]
    (args.out / "prompts.txt").write_text("".join(f"{name}\n" for name in names))
    (args.out / "training").mkdir(exist_ok=True)
    shutil.copyfile(args.work / "train" / "log.jsonl", args.out / "training" / "train.jsonl")
    print(f"weights from {jax.device_count()} device(s) written to {args.out}")


def judge(args: argparse.Namespace) -> None:
    """Print class agreement and KID of images at each guidance, and keep them in OUT/training."""
    indices = np.array([entry["in1k"] for entry in read_classes(args.data, args.classes)])
    network = metrics_jax.load_network(args.networks, "efficientnet_lite0")
    wanted = real_features(args, network)
    pipeline = load_pipeline(args.out, dtype=pipelines.compute_dtype())
    rows = []
    for guidance in args.guidance:
        labels = np.arange(args.count) % args.classes
        images = draw(pipeline, labels, guidance, args.sampling_steps)
        features, logits = metrics_jax.features(network, images)
        hits = indices[np.argmax(logits[:, indices], axis=1)] == indices[labels]
        row = {"guidance": guidance, "steps": args.sampling_steps, "images": args.count}
        row["agreement"] = vars(bootstrap_interval(hits.astype(float)))
        if wanted is not None:
            row["kid"] = vars(kernel_distance(features, wanted))
        rows.append(row)
        print(json.dumps(row), flush=True)
    loop.write_json(args.out / "training" / "judged.json", {"rows": rows})


def real_features(args: argparse.Namespace, network: metrics_jax.Weights) -> np.ndarray | None:
    """Return features [n, 1280] of photos that weren't trained on; None where there are none."""
    if not (args.data / "val.npz").exists():
        return None
    images = read_photos(args.data, args.classes, "val.npz").images
    picks = np.random.default_rng(0).permutation(len(images))[:_REAL]
    return metrics_jax.features(network, images[np.sort(picks)])[0]


def draw(pipeline: Any, labels: np.ndarray, guidance: float, steps: int) -> np.ndarray:
    """Return images of classes, float32 [n, height, width, 3] in 0..1."""
    parts = [
        pipeline(
            [str(label) for label in labels[start : start + _BATCH]],
            true_cfg_scale=guidance,
            num_inference_steps=steps,
            seed=start,
            output_type="np",
            progress=False,
        )
        for start in tqdm(range(0, len(labels), _BATCH), f"guidance {guidance}")
    ]
    return np.concatenate(parts)


def plot(args: argparse.Namespace) -> None:
    """Plot the loss."""
    loop.plot_losses(args.out / "training")


if __name__ == "__main__":
    sys.exit(cli.run(main))
