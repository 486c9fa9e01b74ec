"""Runs of two transformers from the same noise: images, and the velocity at each noise level."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from models.pipeline import FluxPipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What shapes an image besides prompt and noise; all resolved."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None  # None for models without guidance embedding
    true_cfg_scale: float | None  # None for the model's own

    @classmethod
    def of(cls, pipeline: FluxPipeline, size, steps, guidance, true_cfg) -> "SamplingOptions":
        """Fill what is None from the model's own defaults."""
        own = pipeline.defaults
        if guidance is None and pipeline.transformer.config.guidance_embeds:
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
    """Latents of the 16-bit model on its way from noise to images, and its velocities there."""

    embeds: jax.Array  # [batch, text tokens, channels]
    pooled: jax.Array  # [batch, channels]
    sigmas: np.ndarray  # float32 [steps + 1]
    latents: np.ndarray  # float32 [steps, batch, tokens, channels]
    velocities: np.ndarray  # the same shape


@dataclasses.dataclass(frozen=True)
class _OneStep:
    """A scheduler of one given step, so that the pipeline's own compiled step is used."""

    levels: tuple[float, float]

    def sigmas(
        self, num_inference_steps: int, image_tokens: int, strength: float = 1.0
    ) -> np.ndarray:
        return np.asarray(self.levels, np.float32)


def make_images(
    pipeline: FluxPipeline, prompts: list[str], noise: jax.Array, options: SamplingOptions
) -> np.ndarray:
    """Return images, float32 [prompts, height, width, 3] in 0..1."""
    return pipeline(
        prompts, latents=noise, progress=False, output_type="np", **dataclasses.asdict(options)
    )


def trajectory(
    pipeline: FluxPipeline, prompts: list[str], noise: jax.Array, options: SamplingOptions
) -> Trajectory:
    """Sample step by step with the 16-bit model, without true classifier-free guidance."""
    embeds, pooled = pipeline.encode_prompts(prompts)
    sigmas = pipeline.scheduler.sigmas(options.num_inference_steps, noise.shape[1])
    latents, visited, velocities = noise, [], []
    for levels in itertools.pairwise(sigmas.tolist()):
        after = _step(pipeline, latents, embeds, pooled, levels, options)
        visited.append(np.asarray(latents))
        velocities.append(_velocity(latents, after, levels))
        latents = after
    return Trajectory(
        embeds=embeds,
        pooled=pooled,
        sigmas=sigmas,
        latents=np.stack(visited),
        velocities=np.stack(velocities),
    )


def velocity_errors(
    pipeline: FluxPipeline, path: Trajectory, options: SamplingOptions
) -> list[list[float]]:
    """Return |v - v16| / |v16| at the 16-bit model's own latents, a list of prompts a step."""
    errors = []
    levels = list(itertools.pairwise(path.sigmas.tolist()))
    for pair, latents, exact in zip(levels, path.latents, path.velocities, strict=True):
        after = _step(pipeline, latents, path.embeds, path.pooled, pair, options)
        difference = _velocity(latents, after, pair) - exact
        norms = (np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (difference, exact))
        wrong, right = norms
        errors.append((wrong / right).tolist())
    return errors


def run_for_recording(
    pipeline: FluxPipeline,
    prompts: list[str],
    noise: jax.Array,
    options: SamplingOptions,
    batch: int,
):
    """Return a function that samples all prompts with a transformer put in the pipeline's place."""

    def run(transformer: Any) -> None:
        replaced = dataclasses.replace(pipeline, transformer=transformer)
        for start in tqdm(range(0, len(prompts), batch), desc="recording", unit="batch"):
            part = slice(start, start + batch)
            arguments = dataclasses.asdict(options) | {"progress": False, "output_type": "latent"}
            replaced(prompts[part], latents=noise[part], **arguments)

    return run


def _step(pipeline, latents, embeds, pooled, levels, options: SamplingOptions) -> jax.Array:
    """One Euler step between two noise levels."""
    return dataclasses.replace(pipeline, scheduler=_OneStep(levels)).denoise(
        latents,
        embeds,
        pooled,
        height=options.height,
        width=options.width,
        num_inference_steps=1,
        guidance_scale=options.guidance_scale,
        progress=False,
    )


def _velocity(before, after, levels) -> np.ndarray:
    return (np.asarray(after) - np.asarray(before)) / np.float32(levels[1] - levels[0])
