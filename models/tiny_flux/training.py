"""Losses of the embedded model: the autoencoder's, flow matching, then guidance distillation.

Flow matching: x_t = (1 - t) x_0 + t noise, the network predicts noise - x_0, t is logit-normal
(Esser et al., arXiv 2403.03206, section 3.1). Guidance distillation: the network, told the
guidance scale g, learns v_uncond + g (v_cond - v_uncond) of its own frozen copy (Meng et al.,
arXiv 2210.03142, stage one), so that sampling costs one call a step.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.flux.config import FluxConfig
from models.flux.latents import image_ids
from models.tiny_flux.architecture import TextToImage
from models.training import LossFunction, draw


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
