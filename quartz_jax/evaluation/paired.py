"""Runs of two transformers from the same noise: images, and the velocity at each noise level."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.sampler import Sampler, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What shapes an image besides prompt and noise; all resolved."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None  # None for models without guidance embedding
    true_cfg_scale: float | None  # None for the model's own

    @classmethod
    def of(
        cls,
        pipeline: Sampler,
        size: tuple[int, int] | tuple[None, None] = (None, None),  # width, height
        steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
    ) -> "SamplingOptions":
        """Fill what is None from the model's own defaults."""
        own = pipeline.defaults
        if guidance is None and pipeline.denoiser.guided:
            guidance = own.guidance_scale
        return cls(
            width=size[0] or own.width,
            height=size[1] or own.height,
            num_inference_steps=steps or own.num_inference_steps,
            guidance_scale=guidance,
            true_cfg_scale=true_cfg,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Latents of the 16-bit model on its way from noise to images, and its predictions there."""

    conditions: dict[str, Any]  # of the prompts, as `Sampler.encode_prompts` gives them
    levels: list[dict[str, Any]]  # of the scheduler, one a step
    latents: np.ndarray  # float32 [steps, batch, ...]
    velocities: np.ndarray  # the same shape


def make_images(
    pipeline: Sampler, prompts: list[str], noise: jax.Array, options: SamplingOptions
) -> np.ndarray:
    """Return images, float32 [prompts, height, width, 3] in 0..1."""
    return np.asarray(
        pipeline(
            prompts, latents=noise, progress=False, output_type="np", **dataclasses.asdict(options)
        )
    )


def trajectory(
    pipeline: Sampler, prompts: list[str], noise: jax.Array, options: SamplingOptions
) -> Trajectory:
    """Sample step by step with the 16-bit model, without true classifier-free guidance."""
    conditions = pipeline.encode_prompts(prompts)
    levels, visited, velocities = [], [], []
    with _steps(pipeline, conditions, options) as steps:
        for level, latents in _walk(steps, noise, _levels(pipeline, options)):
            levels.append(level)
            visited.append(np.asarray(latents))
            velocities.append(np.asarray(steps.predict(latents, level)))
    return Trajectory(
        conditions=conditions,
        levels=levels,
        latents=np.stack(visited),
        velocities=np.stack(velocities),
    )


def velocity_errors(
    pipeline: Sampler, path: Trajectory, options: SamplingOptions
) -> list[list[float]]:
    """Return |v - v16| / |v16| at the 16-bit model's own latents, a list of prompts a step."""
    errors = []
    with _steps(pipeline, path.conditions, options) as steps:
        for level, latents, exact in zip(path.levels, path.latents, path.velocities, strict=True):
            difference = np.asarray(steps.predict(jnp.asarray(latents), level)) - exact
            norms = (np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (difference, exact))
            wrong, right = norms
            errors.append((wrong / right).tolist())
    return errors


def calibration_samples(
    pipeline: Sampler,
    prompts: list[str],
    noise: jax.Array,  # [prompts, ...], as `initial_noise` gives it
    options: SamplingOptions,
    batch: int,
    taken: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Return what the main model is called with on its way from noise to images.

    These are keyword arguments, on the host, one entry a batch and step, for
    `engine.observe.observe`. Deferred models are loaded once each, the encoders first. True
    classifier-free guidance is left out.

    Args:
      pipeline: of the 16-bit model.
      prompts: an image each.
      noise: to start from.
      options: of sampling.
      batch: images at a time.
      taken: the steps of which entries are returned, from 0 up; None for all.
    """
    parts = [slice(start, start + batch) for start in range(0, len(prompts), batch)]
    encoders = pipeline.keep(*pipeline.family.encoders)
    encoded = [encoders.encode_prompts(prompts[part]) for part in parts]
    del encoders  # before the main model comes
    sampler, samples = pipeline.keep(pipeline.family.main), []
    for part, conditions in zip(tqdm(parts, "sampling", unit="batch"), encoded, strict=True):
        with _steps(sampler, conditions, options) as steps:
            walk = enumerate(_walk(steps, noise[part], _levels(sampler, options)))
            for number, (level, latents) in walk:
                if taken is None or number in taken:
                    samples.append(_on_host(steps.arguments(latents, level)))
    return samples


def _on_host(arguments: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(np.asarray, arguments)


def _steps(
    pipeline: Sampler, conditions: dict[str, Any], options: SamplingOptions
) -> contextlib.AbstractContextManager[Steps]:
    """Load the main model for single steps, without true classifier-free guidance."""
    canvas = pipeline.canvas(options.height, options.width)
    return pipeline.steps(conditions, canvas, options.guidance_scale)


def _levels(pipeline: Sampler, options: SamplingOptions) -> list[dict[str, Any]]:
    canvas = pipeline.canvas(options.height, options.width)
    return pipeline.denoiser.levels(pipeline.scheduler, options.num_inference_steps, canvas, 1.0)


def _walk(
    steps: Steps, noise: jax.Array, levels: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], jax.Array]]:
    """Yield each step's level, and the latents before it."""
    latents, memory = steps.begin(steps.scheduler.start(jnp.asarray(noise), levels[0]))
    for level in levels:
        yield level, latents
        latents, memory = steps(latents, memory, level)
