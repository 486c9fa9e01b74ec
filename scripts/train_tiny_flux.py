r"""Train the embedded model from captioned images, stage by stage, into a diffusers folder.

    python scripts/train_tiny_flux.py vae     --data emoji128.npz --work train/
    python scripts/train_tiny_flux.py flow    --data emoji128.npz --work train/
    python scripts/train_tiny_flux.py distill --data emoji128.npz --work train/
    python scripts/train_tiny_flux.py export  --data emoji128.npz --work train/ --out OUT
    python scripts/train_tiny_flux.py measure --data emoji128.npz --out OUT

With --data FOLDER of photos (train_*.npz, classes.json) it trains tiny-flux-photo, in one go:

    python scripts/train_tiny_flux.py vae flow distill export \
        --data tiny-imagenet --work photo/ --out OUT

Every training stage resumes from the state it saved under --work and uses all local devices; what
is left of a stage that --stop-after ended is done by the same command; until then nothing is built
on it, and it isn't exported.
"measure" prints the autoencoder's PSNR and plots the losses in OUT/training (needs matplotlib).
"""

import argparse
import dataclasses
import functools
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import training as loop
from models.flux.latents import pack
from models.flux.params import TRANSFORMER
from models.text_encoders.clip import CLIP_TEXT
from models.text_encoders.t5 import T5_ENCODER
from models.tiny_flux import architecture, dataset, training
from models.vae.params import AUTOENCODER_KL
from quartz_jax import pipelines
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import cache as compilation_cache
from quartz_jax.io.files import check_output

# Enough on H200 GPUs: one for the autoencoder, four for the rest.
STAGES = {
    "vae": loop.TrainingConfig(
        steps=40_000, minutes=3.3, batch_size=64, learning_rate=6e-4, ema_decay=0.999
    ),
    "flow": loop.TrainingConfig(
        steps=40_000, minutes=9.6, batch_size=256, learning_rate=1e-3, warmup=1000
    ),
    "distill": loop.TrainingConfig(
        steps=8_000, minutes=2.0, batch_size=256, learning_rate=3e-4, ema_decay=0.998
    ),
}
# Photos: 64 pixels a side, 64 image tokens; enough on three H100s.
PHOTO_STAGES = {
    "vae": dataclasses.replace(STAGES["vae"], minutes=1.6, batch_size=128, save_minutes=2.0),
    "flow": dataclasses.replace(STAGES["flow"], minutes=5.2, batch_size=512, save_minutes=2.0),
    "distill": dataclasses.replace(STAGES["distill"], minutes=0.75, batch_size=512),
}
LATENT_CHANNELS = 4
PHOTO_LATENT_CHANNELS = 8  # texture needs more than smooth drawings do
PHOTO_T5_TOKENS = 16  # "a photo of a Yorkshire terrier" is short: the longest caption takes 10
STATISTICS_IMAGES = 4096  # whose latents give the mean and the deviation
PHOTO_GUIDANCE = {"guidance_scale": 5.0}  # where classes show best: the largest that is distilled
# Without distillation the guidance embedding knows only 1, and guidance takes two calls a step.
FLOW_GUIDANCE = {"guidance_scale": 1.0, "true_cfg_scale": 3.0}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and refuse what can't be done."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("stages", nargs="+", choices=[*STAGES, "export", "measure"], help="run one after another")
    add("--data", type=Path, required=True, help=".npz of captioned images, or folder of photos")
    add("--work", type=Path, help="states and the growing model")
    add("--out", type=Path, help="export and measure: the model folder")
    add("--minutes", type=cli.amount, nargs="+", help="training time, one for each such stage")
    add("--steps", type=cli.positive, help="at most, in each stage")
    add("--batch-size", type=cli.positive, help="on each device")
    add("--stop-after", type=cli.amount, default=math.inf, help="minutes of a stage; resumable")
    add("--latent-channels", type=cli.positive, help="default: 4, for photos 8")
    add("--caption-dropout", type=cli.share, default=0.1, help="captions left out, below 1")
    args = parser.parse_args(argv)
    cli.check_order(args.stages, (*STAGES, "export", "measure"))
    if args.latent_channels is None:
        args.latent_channels = PHOTO_LATENT_CHANNELS if args.data.is_dir() else LATENT_CHANNELS
    trained = [stage for stage in args.stages if stage in STAGES]
    if args.minutes and len(args.minutes) != len(trained):
        raise ValueError(
            f"--minutes holds {len(args.minutes)}; give one for each of {', '.join(trained)}"
        )
    args.minutes = dict(zip(trained, args.minutes or [], strict=False))
    if args.work is None and args.stages != ["measure"]:
        raise ValueError("--work is missing; name a folder for states and the growing model")
    if args.out is None and {"export", "measure"} & set(args.stages):
        raise ValueError("--out is missing; name the model folder")
    dataset.check_images(args.data)
    check_output((args.work or args.out) / "x")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages; one that isn't finished ends the run."""
    args = parse(argv)
    pipelines.compile_quickly()
    compilation_cache.enable()
    others = {"export": export, "measure": measure}
    for stage in args.stages:
        if stage in others:
            others[stage](args)
            continue
        train = train_vae if stage == "vae" else train_transformer
        if not train(args, stage):
            print(f"{stage} isn't finished; the same command goes on from here")
            return


def stage_config(args: argparse.Namespace, stage: str) -> loop.TrainingConfig:
    """Return the stage's defaults with the command line's changes."""
    minutes = args.minutes.get(stage)
    changes = {"minutes": minutes, "batch_size": args.batch_size, "steps": args.steps}
    given = {name: value for name, value in changes.items() if value is not None}
    stages = PHOTO_STAGES if args.data.is_dir() else STAGES
    config = dataclasses.replace(stages[stage], **given)
    return dataclasses.replace(config, scan=min(config.scan, config.steps))


@functools.cache
def read_data(path: Path) -> dataset.CaptionedImages:
    """Return the images and captions, decoded once for all stages."""
    return dataset.read_captioned_images(path)


def train_vae(args: argparse.Namespace, stage: str) -> bool:
    """Train the autoencoder and export it with its latents' mean and deviation, if it finished."""
    images = read_data(args.data).images
    vae = architecture.build_vae(args.latent_channels, dtype=compute_dtype(), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(vae)
    config = stage_config(args, stage)
    loss = training.vae_loss(graphdef, config.batch_size)
    ema, finished = loop.train(
        stage, config, loss, params, images, args.work / stage, stop_after=args.stop_after
    )
    if not finished:
        return False
    some = images[:: max(1, len(images) // STATISTICS_IMAGES)]
    latents = loop.encode_dataset(graphdef, ema, some)
    vae = nnx.merge(graphdef, ema)
    vae.config = dataclasses.replace(
        vae.config,
        scaling_factor=float(1 / latents.std()),
        shift_factor=float(latents.mean()),
    )
    AUTOENCODER_KL.export(vae, args.work / "model" / "vae")
    print(f"latents: mean {latents.mean():.4f}, deviation {latents.std():.4f}")
    return True


def compute_dtype() -> jnp.dtype:
    """Return bfloat16, but float32 on CPUs, whose convolutions in bfloat16 take minutes a step."""
    return pipelines.compute_dtype()


@functools.cache
def conditioned_latents(path: Path, work: Path) -> tuple[dict, int]:
    """Return the training arrays, packed latents and both forms of every caption, and channels."""
    data = read_data(path)
    vae = AUTOENCODER_KL.load(work / "model" / "vae", dtype=compute_dtype())
    tokenizers = make_tokenizers(path, data)
    if path.is_dir():
        data = with_mirrored(data)
    latents = loop.encode_dataset(*nnx.split(vae), data.images)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    t5, clip = tokenizers
    forms = (data.prompts, data.prompts_bare)
    rows = {
        "latents": np.asarray(pack(jnp.asarray(latents)).astype(jnp.bfloat16)),
        "t5": np.stack([dataset.token_ids(t5, form) for form in forms], axis=1),
        "clip": np.stack([dataset.token_ids(clip, form) for form in forms], axis=1),
    }
    empty = {
        "empty_t5": dataset.token_ids(t5, [""]),
        "empty_clip": dataset.token_ids(clip, [""]),
    }
    return {"rows": rows, **empty}, vae.config.latent_channels


def with_mirrored(data: dataset.CaptionedImages) -> dataset.CaptionedImages:
    """Return the images and their mirror images, which photos of things may be."""
    return dataset.CaptionedImages(
        images=np.concatenate([data.images, data.images[:, :, ::-1]]),
        prompts=data.prompts * 2,
        prompts_bare=data.prompts_bare * 2,
    )


def make_tokenizers(path: Path, data: dataset.CaptionedImages):
    """Return T5's and CLIP's tokenizer, both made from the captions."""
    length = architecture.TEXT_TOKENS
    t5_length = PHOTO_T5_TOKENS if path.is_dir() else length
    t5 = dataset.train_t5_tokenizer(data.prompts, architecture.T5_CONFIG.vocab_size, t5_length)
    clip = dataset.train_clip_tokenizer(data.prompts, architecture.CLIP_CONFIG.vocab_size, length)
    return t5, clip


def train_transformer(args: argparse.Namespace, stage: str) -> bool:
    """Train transformer and text encoders, or distill guidance into the transformer."""
    check_finished(args.work, list(STAGES)[: list(STAGES).index(stage)])
    data, channels = conditioned_latents(args.data, args.work)
    config = stage_config(args, stage)
    graphdef, params = initialise(channels)
    frozen = None
    if stage == "flow":
        loss = training.flow_loss(graphdef, config.batch_size, args.caption_dropout)
    else:
        params = frozen = loop.restore_ema(args.work / "flow", params)
        loss = training.guidance_loss(graphdef, config.batch_size)
    _, finished = loop.train(
        stage,
        config,
        loss,
        params,
        data,
        args.work / stage,
        frozen=frozen,
        stop_after=args.stop_after,
    )
    return finished


def check_finished(work: Path, stages: Sequence[str]) -> None:
    """Raise ValueError unless stages are trained, each to its end."""
    for stage in stages:
        loop.check_finished(work / stage)


def initialise(channels: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Return transformer and text encoders for so many latent channels."""
    config = architecture.transformer_config(channels)
    return training.initialise(config, seed=0, dtype=compute_dtype())


def export(args: argparse.Namespace) -> None:
    """Write the whole model folder: the last stage that saved a state, and the autoencoder.

    Raises:
      ValueError: a stage that goes into it isn't trained, or not to its end.
    """
    last = "distill" if loop.has_state(args.work / "distill") else "flow"
    check_finished(args.work, list(STAGES)[: list(STAGES).index(last) + 1])
    vae = AUTOENCODER_KL.load(args.work / "model" / "vae", dtype=compute_dtype())
    graphdef, params = initialise(vae.config.latent_channels)
    model = nnx.merge(graphdef, loop.restore_ema(args.work / last, params))
    TRANSFORMER.export(model.transformer, args.out / "transformer")
    CLIP_TEXT.export(model.clip, args.out / "text_encoder")
    T5_ENCODER.export(model.t5, args.out / "text_encoder_2")
    AUTOENCODER_KL.export(vae, args.out / "vae")
    data = read_data(args.data)
    t5, clip = make_tokenizers(args.data, data)
    clip.save_pretrained(args.out / "tokenizer")
    t5.save_pretrained(args.out / "tokenizer_2")
    for source in sorted(args.work.glob("*/log.jsonl")):
        if source.parent.name != "vae":
            log = args.out / "training" / f"{source.parent.name}.jsonl"
            log.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, log)
    loop.write_json(args.out / "scheduler" / "scheduler_config.json", architecture.SCHEDULER_CONFIG)
    guidance = PHOTO_GUIDANCE if args.data.is_dir() else {}
    guidance = FLOW_GUIDANCE if last == "flow" else guidance
    loop.write_json(args.out / "model_index.json", model_index(data.images.shape[1], guidance))
    if args.data.is_dir():
        write_prompts(args.out, data)
    print(f"{last} weights from {jax.device_count()} device(s) written to {args.out}")


def model_index(side: int, guidance: dict[str, float]) -> dict:
    """Return model_index.json for square images of so many pixels a side."""
    own = architecture.MODEL_INDEX
    defaults = own["_generation_defaults"] | {"height": side, "width": side} | guidance
    return own | {"_generation_defaults": defaults}


def write_prompts(out: Path, data: dataset.CaptionedImages) -> None:
    """Write one prompt a class to evaluate on, and as many in the bare form to calibrate on."""
    prompts, bare = (list(dict.fromkeys(x)) for x in (data.prompts, data.prompts_bare))
    generator = np.random.default_rng(0)
    for name, lines in {"prompts.txt": prompts, "calibration_prompts.txt": bare}.items():
        order = generator.permutation(len(lines))
        (out / name).write_text("".join(f"{lines[i]}\n" for i in order))


def measure(args: argparse.Namespace, images: int = 128) -> None:
    """Print the autoencoder's reconstruction PSNR and plot the losses of the other stages."""
    data = read_data(args.data)
    chosen = np.random.default_rng(0).choice(len(data.images), images, replace=False)
    vae = AUTOENCODER_KL.load(args.out / "vae", dtype=jnp.float32)
    psnr = loop.reconstruction_psnr(vae, data.images[np.sort(chosen)])
    print(f"reconstruction of {images} images: PSNR {psnr.mean():.1f} dB, worst {psnr.min():.1f}")
    loop.plot_losses(args.out / "training")


if __name__ == "__main__":
    sys.exit(cli.run(main))
