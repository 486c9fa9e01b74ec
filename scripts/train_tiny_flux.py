"""Train the embedded model from captioned images, stage by stage, into a diffusers folder.

    python scripts/train_tiny_flux.py vae     --data emoji128.npz --work train/
    python scripts/train_tiny_flux.py flow    --data emoji128.npz --work train/
    python scripts/train_tiny_flux.py distill --data emoji128.npz --work train/
    python scripts/train_tiny_flux.py export  --data emoji128.npz --work train/ --out OUT
    python scripts/train_tiny_flux.py measure --data emoji128.npz --out OUT

With --data FOLDER of photos (train_*.npz, classes.json) it trains tiny-flux-photo, in one go:

    for stage in vae flow distill export; do
        python scripts/train_tiny_flux.py $stage --data tiny-imagenet --work photo/ --out OUT
    done

Every training stage resumes from the state it saved under --work and uses all local devices.
"measure" prints the autoencoder's PSNR and plots the losses in OUT/training (needs matplotlib).
"""

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.flux.params import export_flux_transformer
from models.pipeline import pack
from models.text_encoders.clip import export_clip_text_encoder
from models.text_encoders.t5 import export_t5_encoder
from models.tiny_flux import architecture, dataset, training
from models.vae.params import export_autoencoder_kl, load_autoencoder_kl

# Enough on H200 GPUs: one for the autoencoder, four for the rest.
STAGES = {
    "vae": training.TrainingConfig(
        steps=40_000, minutes=3.3, batch_size=64, learning_rate=6e-4, ema_decay=0.999
    ),
    "flow": training.TrainingConfig(
        steps=40_000, minutes=9.6, batch_size=256, learning_rate=1e-3, warmup=1000
    ),
    "distill": training.TrainingConfig(
        steps=8_000, minutes=2.0, batch_size=256, learning_rate=3e-4, ema_decay=0.998
    ),
}
# Photos: 64 pixels a side, 64 image tokens; for one H100.
PHOTO_STAGES = {
    "vae": dataclasses.replace(STAGES["vae"], minutes=2.5, batch_size=128),
    "flow": dataclasses.replace(STAGES["flow"], minutes=7.0, batch_size=512),
    "distill": dataclasses.replace(STAGES["distill"], minutes=1.5, batch_size=512),
}
LATENT_CHANNELS = 4
PHOTO_LATENT_CHANNELS = 8  # texture needs more than smooth drawings do


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "export", "measure"])
    parser.add_argument("--data", type=Path, required=True, help="the .npz of captioned images")
    parser.add_argument("--work", type=Path, help="states and the growing model")
    parser.add_argument("--out", type=Path, help="export and measure: the model folder")
    parser.add_argument("--minutes", type=float, help="training time of the stage")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, help="on each device")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="minutes; resumable")
    parser.add_argument("--latent-channels", type=int, help="default: 4, for photos 8")
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    args = parser.parse_args()
    if args.latent_channels is None:
        args.latent_channels = PHOTO_LATENT_CHANNELS if args.data.is_dir() else LATENT_CHANNELS
    if args.work is None and args.stage != "measure":
        parser.error(f"{args.stage} needs --work FOLDER")
    if args.out is None and args.stage in ("export", "measure"):
        parser.error(f"{args.stage} needs --out FOLDER")
    return args


def main() -> None:
    """Run one stage."""
    args = parse()
    if args.stage == "vae":
        train_vae(args)
    elif args.stage == "export":
        export(args)
    elif args.stage == "measure":
        measure(args)
    else:
        train_transformer(args)


def stage_config(args: argparse.Namespace, stage: str) -> training.TrainingConfig:
    """Return the stage's defaults with the command line's changes."""
    changes = {"minutes": args.minutes, "batch_size": args.batch_size, "steps": args.steps}
    given = {name: value for name, value in changes.items() if value is not None}
    stages = PHOTO_STAGES if args.data.is_dir() else STAGES
    return dataclasses.replace(stages[stage], **given)


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder and export it with its latents' mean and deviation."""
    data = dataset.read_captioned_images(args.data)
    vae = architecture.build_vae(args.latent_channels, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(vae)
    config = stage_config(args, "vae")
    loss = training.vae_loss(graphdef, config.batch_size)
    ema, finished = training.train(
        "vae", config, loss, params, data.images, args.work / "vae", stop_after=args.stop_after
    )
    if not finished:
        return
    latents = training.encode_dataset(graphdef, ema, data.images)
    vae = nnx.merge(graphdef, ema)
    vae.config = dataclasses.replace(
        vae.config,
        scaling_factor=float(1 / latents.std()),
        shift_factor=float(latents.mean()),
    )
    export_autoencoder_kl(vae, args.work / "model" / "vae")
    print(f"latents: mean {latents.mean():.4f}, deviation {latents.std():.4f}")


def conditioned_latents(args: argparse.Namespace):
    """Return the training arrays: packed latents and both forms of every caption."""
    data = dataset.read_captioned_images(args.data)
    vae = load_autoencoder_kl(args.work / "model" / "vae", dtype=jnp.bfloat16)
    if args.data.is_dir():
        data = with_mirrored(data)
    latents = training.encode_dataset(*nnx.split(vae), data.images)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    t5, clip = make_tokenizers(data)
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


def make_tokenizers(data: dataset.CaptionedImages):
    """Return T5's and CLIP's tokenizer, both made from the captions."""
    length = architecture.TEXT_TOKENS
    t5 = dataset.train_t5_tokenizer(data.prompts, architecture.T5_CONFIG.vocab_size, length)
    clip = dataset.train_clip_tokenizer(data.prompts, architecture.CLIP_CONFIG.vocab_size, length)
    return t5, clip


def train_transformer(args: argparse.Namespace) -> None:
    """Train transformer and text encoders, or distill guidance into the transformer."""
    data, channels = conditioned_latents(args)
    graphdef, params = training.initialise(architecture.transformer_config(channels), seed=0)
    config = stage_config(args, args.stage)
    frozen = None
    if args.stage == "flow":
        loss = training.flow_loss(graphdef, config.batch_size, args.caption_dropout)
    else:
        params = frozen = training.restore_ema(args.work / "flow", params)
        loss = training.guidance_loss(graphdef, config.batch_size)
    training.train(
        args.stage,
        config,
        loss,
        params,
        data,
        args.work / args.stage,
        frozen=frozen,
        stop_after=args.stop_after,
    )


def export(args: argparse.Namespace) -> None:
    """Write the whole model folder: the last stage that ran, and the autoencoder."""
    vae = load_autoencoder_kl(args.work / "model" / "vae", dtype=jnp.bfloat16)
    config = architecture.transformer_config(vae.config.latent_channels)
    graphdef, params = training.initialise(config, seed=0)
    last = "distill" if (args.work / "distill").exists() else "flow"
    model = nnx.merge(graphdef, training.restore_ema(args.work / last, params))
    export_flux_transformer(model.transformer, args.out / "transformer")
    export_clip_text_encoder(model.clip, args.out / "text_encoder")
    export_t5_encoder(model.t5, args.out / "text_encoder_2")
    export_autoencoder_kl(vae, args.out / "vae")
    data = dataset.read_captioned_images(args.data)
    t5, clip = make_tokenizers(data)
    clip.save_pretrained(args.out / "tokenizer")
    t5.save_pretrained(args.out / "tokenizer_2")
    for stage in ("flow", "distill"):
        log = args.out / "training" / f"{stage}.jsonl"
        log.parent.mkdir(exist_ok=True)
        shutil.copyfile(args.work / stage / "log.jsonl", log)
    write_json(args.out / "scheduler" / "scheduler_config.json", architecture.SCHEDULER_CONFIG)
    write_json(args.out / "model_index.json", model_index(data.images.shape[1]))
    if args.data.is_dir():
        write_prompts(args.out, data)
    print(f"{last} weights from {jax.device_count()} device(s) written to {args.out}")


def model_index(side: int) -> dict:
    """Return model_index.json for square images of so many pixels a side."""
    own = architecture.MODEL_INDEX
    defaults = own["_generation_defaults"] | {"height": side, "width": side}
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
    data = dataset.read_captioned_images(args.data)
    chosen = np.random.default_rng(0).choice(len(data.images), images, replace=False)
    vae = load_autoencoder_kl(args.out / "vae", dtype=jnp.float32)
    psnr = training.reconstruction_psnr(vae, data.images[np.sort(chosen)])
    print(f"reconstruction of {images} images: PSNR {psnr.mean():.1f} dB, worst {psnr.min():.1f}")
    plot_losses(args.out / "training")


def plot_losses(folder: Path) -> None:
    """Plot the loss of each stage's log over its steps into loss.png."""
    from matplotlib import pyplot

    logs = sorted(folder.glob("*.jsonl"), reverse=True)
    figure, axes = pyplot.subplots(1, len(logs), figsize=(4.5 * len(logs), 3.2))
    for axis, log in zip(axes, logs, strict=True):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
        axis.set(title=log.stem, xlabel="step", ylabel="loss", yscale="log")
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=110)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
