"""Runs of two transformers from the same noise: images, and the velocity at each noise level."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.sampler import FluxPipeline, image_ids
from models.stages import Deferred


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
        pipeline: FluxPipeline,
        size: tuple[int, int] | tuple[None, None] = (None, None),  # width, height
        steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
    ) -> "SamplingOptions":
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
    return np.asarray(
        pipeline(
            prompts, latents=noise, progress=False, output_type="np", **dataclasses.asdict(options)
        )
    )


def trajectory(
    pipeline: FluxPipeline, prompts: list[str], noise: jax.Array, options: SamplingOptions
) -> Trajectory:
    """Sample step by step with the 16-bit model, without true classifier-free guidance."""
    return _walk(pipeline, pipeline.encode_prompts(prompts), noise, options)


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


def calibration_samples(
    pipeline: FluxPipeline,
    prompts: list[str],
    noise: jax.Array,  # [prompts, tokens, channels], as `initial_noise` gives it
    options: SamplingOptions,
    batch: int,
    steps: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Return what the transformer is called with on its way from noise to images.

    These are keyword arguments, on the host, one entry a batch and step, for
    `engine.observe.observe`. Deferred models are loaded once each, the encoders first. True
    classifier-free guidance is left out.

    Args:
      pipeline: of the 16-bit model.
      prompts: an image each.
      noise: to start from.
      options: of sampling.
      batch: images at a time.
      steps: those of which entries are returned, from 0 up; None for all.
    """
    parts = [slice(start, start + batch) for start in range(0, len(prompts), batch)]
    encoders = _kept(pipeline, "text_encoder", "text_encoder_2")
    encoded = [encoders.encode_prompts(prompts[part]) for part in parts]
    del encoders  # before the transformer comes
    sampler, samples = _kept(pipeline, "transformer"), []
    for part, texts in zip(tqdm(parts, "sampling", unit="batch"), encoded, strict=True):
        path = _walk(sampler, texts, noise[part], options)
        entries = _arguments(sampler, path, options)
        samples += entries if steps is None else [entries[step] for step in steps]
    return samples


def _arguments(
    pipeline: FluxPipeline, path: Trajectory, options: SamplingOptions
) -> list[dict[str, Any]]:
    """Return the transformer's keyword arguments at each step, as `denoising_step` gives them."""
    embeds, batch, side = np.asarray(path.embeds), len(path.embeds), pipeline.token_pixels
    guidance = options.guidance_scale
    fixed = {
        "encoder_hidden_states": embeds,
        "pooled_projections": np.asarray(path.pooled),
        "img_ids": image_ids(options.height // side, options.width // side),
        "txt_ids": np.zeros((embeds.shape[1], 3), np.float32),
        "guidance": None if guidance is None else np.full(batch, guidance, np.float32),
    }
    return [
        fixed | {"hidden_states": latents, "timestep": np.full(batch, sigma, np.float32)}
        for latents, sigma in zip(path.latents, path.sigmas[:-1], strict=True)
    ]


def _kept(pipeline: FluxPipeline, *names: str) -> FluxPipeline:
    """Return a copy that keeps some models loaded."""
    found = {name: getattr(pipeline, name) for name in names}
    loaded: dict[str, Any] = {
        name: x.load() for name, x in found.items() if isinstance(x, Deferred)
    }
    return dataclasses.replace(pipeline, **loaded)


def _walk(
    pipeline: FluxPipeline,
    encoded: tuple[jax.Array, jax.Array],  # of `encode_prompts`
    noise: jax.Array,  # [batch, tokens, channels]
    options: SamplingOptions,
) -> Trajectory:
    embeds, pooled = encoded
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


def _step(
    pipeline: FluxPipeline,
    latents: jax.Array | np.ndarray,
    embeds: jax.Array,
    pooled: jax.Array,
    levels: tuple[float, float],
    options: SamplingOptions,
) -> jax.Array:
    """One Euler step between two noise levels."""
    scheduler: Any = _OneStep(levels)  # stands where the model's own would
    return dataclasses.replace(pipeline, scheduler=scheduler).denoise(
        jnp.asarray(latents),
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
