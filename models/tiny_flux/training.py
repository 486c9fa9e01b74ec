"""Training of the embedded model: the autoencoder, then flow matching, then guidance distillation.

Each stage is a pure step function scanned over many steps a call, with an exponential moving
average (EMA) of the weights and a resumable Orbax state. Devices train side by side and average
their whole state after every call (local SGD, Stich, arXiv 1805.09767), so that no step waits for
another device's gradients.

Flow matching: x_t = (1 - t) x_0 + t noise, the network predicts noise - x_0, t is logit-normal
(Esser et al., arXiv 2403.03206, section 3.1). Guidance distillation: the network, told the
guidance scale g, learns v_uncond + g (v_cond - v_uncond) of its own frozen copy (Meng et al.,
arXiv 2210.03142, stage one), so that sampling costs one call a step.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from models.flux.config import FluxConfig
from models.flux.latents import image_ids
from models.tiny_flux.architecture import TextToImage

_FINISHED = "finished"  # an empty file in a stage's folder
State = dict[str, Any]  # params, ema, optimizer, key: all arrays, saved as they are
# (params, frozen params, data, key) to (loss, metrics)
LossFunction = Callable[[Any, Any, Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one stage trains."""

    steps: int  # optimiser steps over which the learning rate decays to zero
    minutes: float  # or this much wall-clock training time, whichever comes first
    batch_size: int  # examples a step on each device
    learning_rate: float  # peak
    warmup: int = 500  # steps of linear warm-up
    ema_decay: float = 0.9995  # a step
    scan: int = 20  # steps a call, after which the devices average
    save_minutes: float = 4.0  # between saved states
    seed: int = 0


def learning_rate(config: TrainingConfig, step: int, progress: float) -> float:
    """Linear warm-up, then a half cosine down to zero as progress goes from 0 to 1."""
    warm = min(1.0, (step + 1) / config.warmup)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer() -> optax.GradientTransformation:
    """Adam with global-norm clipping; the learning rate is set from outside at every call."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.0, b1=0.9, b2=0.99),
    )


def train(
    name: str,
    config: TrainingConfig,
    loss_function: LossFunction,
    params: Any,
    data: Any,
    folder: Path,
    *,
    frozen: Any = None,
    stop_after: float = math.inf,
) -> tuple[Any, bool]:
    """Run one stage, resuming from `folder` if a state is there.

    Args:
      name: shown on the progress bar.
      config: schedule and batch size.
      loss_function: called as loss(params, frozen, data, key); draws its own batch.
      params: float32 pytree to start from.
      data: arrays the loss draws from, kept whole on every device.
      folder: state and `log.jsonl` go here, and a mark once the schedule is finished.
      frozen: arrays that the loss may use and training leaves alone.
      stop_after: minutes after which to save the state and return unfinished.

    Returns:
      EMA parameters, and whether the schedule is finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FINISHED).unlink(missing_ok=True)
    everywhere = NamedSharding(_mesh(), PartitionSpec())
    optimizer = make_optimizer()
    state: State = {
        "params": params,
        "ema": params,
        "optimizer": optimizer.init(params),
        "key": jax.random.key_data(jax.random.key(config.seed)),
    }
    # Copies: the state is donated, and params, ema and frozen must not share buffers.
    state, data, frozen = jax.device_put(jax.tree.map(np.array, (state, data, frozen)), everywhere)
    manager = ocp.CheckpointManager(folder.resolve() / "state", options=_keep_latest())
    step, elapsed = 0, 0.0
    if manager.latest_step() is not None:
        step = manager.latest_step()
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), progress=ocp.args.JsonRestore()
            ),
        )
        state, elapsed = restored["state"], restored["progress"]["elapsed"]

    def save() -> None:
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave({"elapsed": elapsed}),
            ),
        )

    run = _make_run(config, optimizer, loss_function)
    begin = last = saved = time.monotonic()
    compiling = True  # the first call's time isn't training time
    bar = tqdm(total=config.steps, initial=step, desc=name, mininterval=10)
    log = (folder / "log.jsonl").open("a")
    while step < config.steps and elapsed < 60 * config.minutes:
        progress = max(step / config.steps, elapsed / (60 * config.minutes))
        rate = learning_rate(config, step, progress)
        state, loss = run(state, frozen, data, np.float32(rate), np.float32(step))
        loss = float(loss)  # waits for the device, so that elapsed time is real
        now = time.monotonic()
        elapsed += 0.0 if compiling else now - last
        compiling, last, step = False, now, step + config.scan
        record = {"step": step, "seconds": round(elapsed, 2), "loss": loss, "learning_rate": rate}
        print(json.dumps(record), file=log, flush=True)
        bar.update(config.scan)
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        if not math.isfinite(loss):
            raise FloatingPointError(f"{name}: loss is {loss} at step {step}")
        if last - begin > 60 * stop_after:
            break
        if last - saved > 60 * config.save_minutes:
            save()
            saved = time.monotonic()
    finished = step >= config.steps or elapsed >= 60 * config.minutes
    if manager.latest_step() != step:
        save()
    manager.wait_until_finished()
    if finished:
        (folder / _FINISHED).touch()
    bar.close()
    log.close()
    return state["ema"], finished


def has_state(folder: Path) -> bool:
    """Whether a stage saved a state in this folder."""
    state = folder.resolve() / "state"
    return state.exists() and ocp.CheckpointManager(state).latest_step() is not None


def check_finished(folder: Path) -> None:
    """Raise ValueError unless a stage is trained to the end of its schedule.

    One that was stopped, or killed, is half trained: its EMA is no model to go on with.
    """
    if not has_state(folder):
        raise ValueError(f"{folder} holds no saved state; train that stage first")
    if not (folder / _FINISHED).exists():
        raise ValueError(f"{folder} holds a stage that isn't finished; go on with its own command")


def restore_ema(folder: Path, like: Any) -> Any:
    """Return the EMA parameters of a finished stage; `like` is a pytree of the same structure.

    Raises:
      ValueError: the stage saved nothing there, or isn't finished.
    """
    check_finished(folder)
    manager = ocp.CheckpointManager(folder.resolve() / "state")
    state = {"params": like, "ema": like, "optimizer": make_optimizer().init(like)}
    state["key"] = jax.random.key_data(jax.random.key(0))
    restore = ocp.args.Composite(state=ocp.args.StandardRestore(state))
    return manager.restore(manager.latest_step(), args=restore)["state"]["ema"]


def _mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()), ("data",))


def _keep_latest() -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(max_to_keep=1)


def _make_run(
    config: TrainingConfig, optimizer: optax.GradientTransformation, loss_function: LossFunction
) -> Callable:
    def one_step(carry, _, frozen, data):
        params, optimizer_state, key = carry
        key, use = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_function)(params, frozen, data, use)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state, key), loss

    def run(state: State, frozen: Any, data: Any, rate: jax.Array, step: jax.Array):
        optimizer_state = state["optimizer"]
        optimizer_state[1].hyperparams["learning_rate"] = rate
        key, use = jax.random.split(jax.random.wrap_key_data(state["key"]))
        use = jax.random.fold_in(use, jax.lax.axis_index("data"))
        carry = (state["params"], optimizer_state, use)
        (params, optimizer_state, _), losses = jax.lax.scan(
            lambda c, x: one_step(c, x, frozen, data), carry, length=config.scan
        )
        params, optimizer_state, loss = jax.tree.map(
            lambda x: jax.lax.pmean(x, "data") if x.dtype == jnp.float32 else x,
            (params, optimizer_state, losses.mean()),
        )
        decay = jnp.minimum(config.ema_decay**config.scan, (step + 1) / (step + 10 * config.scan))
        ema = optax.incremental_update(params, state["ema"], 1 - decay)
        new = {"params": params, "ema": ema, "optimizer": optimizer_state}
        return {**new, "key": jax.random.key_data(key)}, loss

    everywhere = PartitionSpec()
    run = jax.shard_map(
        run, mesh=_mesh(), in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    return jax.jit(run, donate_argnums=0)


def draw(key: jax.Array, data: Any, batch_size: int) -> Any:
    """Draw a batch with replacement from the leading axis of every array."""
    count = jax.tree.leaves(data)[0].shape[0]
    index = jax.random.randint(key, (batch_size,), 0, count)
    return jax.tree.map(lambda array: array[index], data)


def vae_loss(
    graphdef: nnx.GraphDef, batch_size: int, kl_weight: float = 5e-5, edge_weight: float = 1.0
) -> LossFunction:
    """Reconstruction loss on uint8 images [n, height, width, 3]: L1 of pixels and of edges, and KL.

    The term on neighbour differences at two scales stands in for an adversarial loss: it keeps
    strokes sharp, and needs no second network.
    """

    def loss(params, frozen, data, key):
        draw_key, sample_key = jax.random.split(key)
        images = draw(draw_key, data, batch_size).astype(jnp.float32) / 127.5 - 1
        vae = nnx.merge(graphdef, params)
        mean, logvar = (part.astype(jnp.float32) for part in vae.encode(images))
        noise = jax.random.normal(sample_key, mean.shape)
        decoded = vae.decode(mean + jnp.exp(0.5 * logvar) * noise).astype(jnp.float32)
        error = decoded - images
        edges = sum(jnp.abs(error - jnp.roll(error, s, a)).mean() for a in (1, 2) for s in (1, 2))
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        return jnp.abs(error).mean() + edge_weight * edges / 4 + kl_weight * kl

    return loss


def _noised(data: Any, key: jax.Array, batch_size: int, caption_dropout: float):
    """Draw tokens, captions and a noise level; some captions become the empty one."""
    keys = jax.random.split(key, 5)
    batch = draw(keys[0], data["rows"], batch_size)
    form = jax.random.randint(keys[1], (batch_size,), 0, batch["t5"].shape[1])
    take = jax.vmap(lambda ids, which: ids[which])
    t5_ids, clip_ids = take(batch["t5"], form), take(batch["clip"], form)
    keep = jax.random.uniform(keys[2], (batch_size, 1)) >= caption_dropout
    t5_ids = jnp.where(keep, t5_ids, data["empty_t5"])
    clip_ids = jnp.where(keep, clip_ids, data["empty_clip"])
    clean = batch["latents"].astype(jnp.float32)
    noise = jax.random.normal(keys[3], clean.shape)
    time_ = jax.nn.sigmoid(jax.random.normal(keys[4], (batch_size,)))
    noised = (1 - time_)[:, None, None] * clean + time_[:, None, None] * noise
    return noised, time_, noise - clean, t5_ids, clip_ids


def _predict(transformer, noised, embeds, pooled, time_, guidance) -> jax.Array:
    side = math.isqrt(noised.shape[1])  # the images are square
    return transformer(
        hidden_states=noised,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=time_,
        img_ids=image_ids(side, side),
        txt_ids=jnp.zeros((embeds.shape[1], 3)),
        guidance=guidance,
    ).astype(jnp.float32)


def flow_loss(graphdef: nnx.GraphDef, batch_size: int, caption_dropout: float) -> LossFunction:
    """Flow-matching loss of transformer and text encoders together, at guidance 1."""

    def loss(params, frozen, data, key):
        model: TextToImage = nnx.merge(graphdef, params)
        noised, time_, target, *ids = _noised(data, key, batch_size, caption_dropout)
        embeds, pooled = model.encode(*ids)
        guidance = jnp.ones(batch_size)
        predicted = _predict(model.transformer, noised, embeds, pooled, time_, guidance)
        return ((predicted - target) ** 2).mean()

    return loss


def guidance_loss(
    graphdef: nnx.GraphDef, batch_size: int, largest: float = 5.0, caption_dropout: float = 0.05
) -> LossFunction:
    """Distillation of classifier-free guidance into the guidance embedding.

    `frozen` is the flow-matching model; only the student's transformer differs from it. Scales are
    uniform in 1..largest.
    """

    def loss(params, frozen, data, key):
        use, scale_key = jax.random.split(key)
        teacher: TextToImage = nnx.merge(graphdef, frozen)
        student: TextToImage = nnx.merge(graphdef, params)
        noised, time_, _, *ids = _noised(data, use, batch_size, caption_dropout)
        names = ("empty_t5", "empty_clip")
        empty = [jnp.broadcast_to(data[x], y.shape) for x, y in zip(names, ids, strict=True)]
        scale = jax.random.uniform(scale_key, (batch_size,), minval=1.0, maxval=largest)
        ones = jnp.ones(batch_size)
        embeds, pooled = teacher.encode(*ids)
        conditional = _predict(teacher.transformer, noised, embeds, pooled, time_, ones)
        unconditional = _predict(teacher.transformer, noised, *teacher.encode(*empty), time_, ones)
        target = unconditional + scale[:, None, None] * (conditional - unconditional)
        target, embeds, pooled = jax.lax.stop_gradient((target, embeds, pooled))
        predicted = _predict(student.transformer, noised, embeds, pooled, time_, scale)
        return ((predicted - target) ** 2).mean()

    return loss


def initialise(
    config: FluxConfig, seed: int, dtype: jnp.dtype = jnp.bfloat16
) -> tuple[nnx.GraphDef, Any]:
    """Return graph definition (computing in `dtype`) and float32 parameters of what is trained."""
    model = TextToImage(config, dtype=dtype, rngs=nnx.Rngs(seed))
    return nnx.split(model)


def encode_dataset(
    graphdef: nnx.GraphDef,
    params: Any,
    images: np.ndarray,  # uint8 [n, height, width, 3]
    batch_size: int = 256,
) -> np.ndarray:
    """Return the posterior means of all images, float32 [n, height/4, width/4, channels]."""

    @jax.jit
    def encode(params, batch):
        scaled = batch.astype(jnp.float32) / 127.5 - 1
        return nnx.merge(graphdef, params).encode(scaled)[0].astype(jnp.float32)

    starts = tqdm(range(0, len(images), batch_size), "encode images")
    parts = [encode(params, images[s : s + batch_size]) for s in starts]  # none waits for another
    return np.concatenate([np.asarray(part) for part in parts])


def reconstruction_psnr(
    vae: nnx.Module,
    images: np.ndarray,  # uint8 [n, height, width, 3]
    batch_size: int = 16,
) -> np.ndarray:
    """Return the PSNR in dB of each image after encoding to the mean and decoding, float64 [n]."""
    graphdef, params = nnx.split(vae)

    @jax.jit
    def reconstruct(params, batch):
        vae = nnx.merge(graphdef, params)
        decoded = vae.decode(vae.encode(batch.astype(jnp.float32) / 127.5 - 1)[0])
        return jnp.round((jnp.clip(decoded, -1, 1) + 1) * 127.5)

    starts = tqdm(range(0, len(images), batch_size), "reconstruct")
    decoded = [np.asarray(reconstruct(params, images[s : s + batch_size])) for s in starts]
    error = np.concatenate(decoded).astype(np.float64) - images
    return 10 * np.log10(255**2 / np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-3))
