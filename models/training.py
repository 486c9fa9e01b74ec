"""Training of the embedded models: a loop of steps on all local devices, resumable.

A stage is a pure step function scanned over many steps a call, with an exponential moving average
(EMA) of the weights and a resumable Orbax state. Devices train side by side and average their whole
state after every call (local SGD, Stich, arXiv 1805.09767), so that no step waits for another
device's gradients.
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

_FINISHED = "finished"  # an empty file in a stage's folder
State = dict[str, Any]  # params, ema, optimizer, key: all arrays, saved as they are
# (params, frozen params, data, key) to the loss
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
    saved: Callable[[Any], None] = lambda ema: None,
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
      saved: called with the EMA parameters after each state that is saved.

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
        saved(state["ema"])

    run = _make_run(config, optimizer, loss_function)
    begin = last = last_saved = time.monotonic()
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
        if last - last_saved > 60 * config.save_minutes:
            save()
            last_saved = time.monotonic()
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


def plot_losses(folder: Path) -> None:
    """Plot the loss of each stage's log over its steps into loss.png; needs matplotlib."""
    from matplotlib import pyplot

    logs = sorted(folder.glob("*.jsonl"), reverse=True)
    figure, axes = pyplot.subplots(1, len(logs), figsize=(4.5 * len(logs), 3.2), squeeze=False)
    for axis, log in zip(axes[0], logs, strict=True):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
        axis.set(title=log.stem, xlabel="step", ylabel="loss", yscale="log")
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=110)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
