"""The loss that trains the small DiT, and what is drawn once it is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.dit.config import DiTConfig
from models.dit.family import DIT
from models.dit.modeling import DiT
from models.noise_schedulers import DDIMScheduler
from models.sampler import Sampler
from models.tiny_dit import architecture, training
from models.vae.config import AutoencoderKLConfig

SCHEDULER = DDIMScheduler.from_json(architecture.SCHEDULER_CONFIG)
TABLE = training.noise_table(SCHEDULER)


def posterior(time, sample, clean):
    """Return mean and log variance of q(x_{t-1} | x_t, x_0): arXiv 2006.11239, equation 7."""
    signal = SCHEDULER.alphas()
    now, before = signal[time], signal[time - 1]
    beta = 1 - now / before
    mean = np.sqrt(before) * beta / (1 - now) * clean
    mean = mean + np.sqrt(1 - beta) * (1 - before) / (1 - now) * sample
    return mean, np.log(beta * (1 - before) / (1 - now)), np.log(beta)


@pytest.mark.parametrize("time", [1, 7, 250, 999])
def test_variance_loss_is_the_divergence_of_two_normal_distributions(time):
    draws = np.random.default_rng(time).standard_normal((4, 2, 3, 5, 5))
    clean, noise, error, share = draws * np.array([1, 1, 0.1, 0.5])[:, None, None, None, None]
    signal = SCHEDULER.alphas()[time]
    sample = np.sqrt(signal) * clean + np.sqrt(1 - signal) * noise
    predicted = (sample - np.sqrt(1 - signal) * (noise + error)) / np.sqrt(signal)
    mean, low, high = posterior(time, sample, clean)
    other, _, _ = posterior(time, sample, predicted)
    log = low + (share + 1) / 2 * (high - low)
    kl = 0.5 * (log - low + (np.exp(low) + (mean - other) ** 2) / np.exp(log) - 1)
    times = jnp.full(2, time)
    found = training.variance_bits(TABLE, times, jnp.asarray(error), jnp.asarray(share))
    # float32 of terms around 1 that cancel, and of tables
    np.testing.assert_allclose(found, kl / np.log(2), rtol=2e-3, atol=2e-6)


def test_the_true_posterior_costs_nothing_and_the_first_step_is_left_out():
    times, zero = jnp.array([0, 1, 500]), jnp.zeros((3, 1, 1, 1))
    assert not training.variance_bits(TABLE, times, zero, zero - 1).any()
    cost = training.variance_bits(TABLE, times, zero + 1, zero).ravel()
    assert cost[0] == 0 and (cost[1:] > 0).all()


def test_timesteps_are_drawn_as_their_table_says_and_every_one_can_be():
    chances = np.diff(TABLE.chance, prepend=0)
    assert abs(TABLE.chance[-1] - 1) < 1e-6
    assert chances.min() >= 0.9 * 0.1 / len(chances)
    assert (TABLE.weight * chances).sum() == pytest.approx(1, abs=1e-5)
    # half of what is not uniform lies on each side of equal signal and noise
    equal = np.searchsorted(-TABLE.alpha, -np.sqrt(0.5))
    assert 0.9 * 0.5 < TABLE.chance[equal] < 0.9 * 0.5 + 0.1


def small_model():
    config = DiTConfig(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=3,
    )
    return DiT(config, rngs=nnx.Rngs(0))


def small_data():
    latents = np.random.default_rng(0).standard_normal((6, 2, 4, 4)).astype(np.float32)
    return {"latents": jnp.asarray(latents), "labels": jnp.arange(6) % 3}


def trained(steps):
    """Train on one sample a class; returns model, samples and the loss of each step."""
    graphdef, params = nnx.split(small_model())
    loss = training.hybrid_loss(graphdef, TABLE, 64, 0.1)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    data = jax.tree.map(lambda x: x[:3], small_data())

    @jax.jit
    def run(params, keys):
        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, None, data, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, values

    params, values = run(params, jax.random.split(jax.random.key(0), steps))
    return nnx.merge(graphdef, params), data, np.asarray(values)


def test_what_is_learned_of_each_class_is_drawn():
    model, data, values = trained(600)
    assert values[-50:].mean() < 0.2 * values[:5].mean()
    vae = AutoencoderKLConfig(block_out_channels=(32, 32, 32), latent_channels=2)
    models = {"vae": nnx.Module(), "transformer": model}
    models["vae"].config = vae
    sampler = Sampler(family=DIT, models=models, tokenizers={}, scheduler=SCHEDULER)
    noise = jax.random.normal(jax.random.key(1), data["latents"].shape)
    conditions, negative = (sampler.encode_prompts(x) for x in (["0", "1", "2"], [""] * 3))
    drawn = sampler.denoise(
        noise,
        conditions,
        height=16,
        width=16,
        num_inference_steps=architecture.STEPS,
        negative=negative,
        true_cfg_scale=1.5,
        progress=False,
    )
    error = np.linalg.norm(drawn - data["latents"], axis=(2, 3)).mean()
    assert error < 0.3 * np.linalg.norm(data["latents"], axis=(2, 3)).mean()


def test_the_variance_has_no_part_in_how_noise_is_learned(monkeypatch):
    graphdef, params = nnx.split(small_model())
    loss = training.hybrid_loss(graphdef, TABLE, 8, 0.0)

    def gradients():  # of the noise's and of the variance's outputs
        grads = jax.jit(jax.grad(loss))(params, None, small_data(), jax.random.key(1))
        bias = np.asarray(grads["final_layer"]["linear"]["bias"][...]).reshape(4, 4)
        return bias[:, :2], bias[:, 2:]

    noise, variance = gradients()
    assert np.abs(noise).min() > 0 and np.abs(variance).min() > 0
    monkeypatch.setattr(training, "variance_bits", lambda *_: jnp.zeros(()))
    alone, nothing = gradients()
    np.testing.assert_allclose(alone, noise, rtol=1e-5)
    assert not nothing.any()


def test_labels_are_dropped_as_often_as_was_asked():
    graphdef, params = nnx.split(small_model())
    table = params["layers"][0]["condition"]["label"]["embedding"]
    touched = {}
    for dropout in (0.0, 0.999):
        loss = training.hybrid_loss(graphdef, TABLE, 32, dropout)
        # the last linears are zero at first, through which no gradient passes
        moved = jax.tree.map(lambda x: x + 0.01, params)
        grads = jax.jit(jax.grad(loss))(moved, None, small_data(), jax.random.key(2))
        rows = np.asarray(grads["layers"][0]["condition"]["label"]["embedding"][...])
        touched[dropout] = np.abs(rows).max(axis=1) > 0
    assert table[...].shape[0] == 4
    assert touched[0.0].tolist() == [True, True, True, False]
    assert touched[0.999][3] and touched[0.999][:3].sum() <= 1


def test_classes_go_by_their_names_and_synonyms():
    classes = [{"name": "Pig", "synonyms": ["hog", "Pig"]}, {"name": "teapot"}]
    index = architecture.model_index(classes, 64, guidance=2.5)
    assert index["id2label"] == {"0": "Pig, hog", "1": "teapot"}
    assert index["_class_name"] == "DiTPipeline"
    defaults = index["_generation_defaults"]
    assert (defaults["width"], defaults["true_cfg_scale"]) == (64, 2.5)
