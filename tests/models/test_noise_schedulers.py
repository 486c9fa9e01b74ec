"""DDIM, PNDM, DPM-Solver++ and both Eulers against diffusers step by step, and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import noise_schedulers
from models.schedulers import scheduler_from_json
from models.stored_files import CheckpointError

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
V = {"prediction_type": "v_prediction"}
UNCLIPPED = {"clip_sample": False}
# Class in diffusers, its options; among them those of published models.
KINDS = {
    "DiT": ("DDIMScheduler", UNCLIPPED),
    "SD's DDIM": (
        "DDIMScheduler",
        {**SCALED, **UNCLIPPED, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "DDIM trailing": ("DDIMScheduler", {**SCALED, **UNCLIPPED, "timestep_spacing": "trailing"}),
    "DDIM linspace v": ("DDIMScheduler", {**UNCLIPPED, **V, "timestep_spacing": "linspace"}),
    "SD 1.4": ("PNDMScheduler", {**SCALED, "skip_prk_steps": True, "steps_offset": 1}),
    "PNDM v": ("PNDMScheduler", {**V, "skip_prk_steps": True, "set_alpha_to_one": True}),
    "PixArt": ("DPMSolverMultistepScheduler", {}),
    "DPM order 1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "DPM heun": ("DPMSolverMultistepScheduler", {**SCALED, "solver_type": "heun"}),
    "DPM sigma_min": ("DPMSolverMultistepScheduler", {**SCALED, "final_sigmas_type": "sigma_min"}),
    "DPM no lower order": (
        "DPMSolverMultistepScheduler",
        {**SCALED, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    "DPM leading": (
        "DPMSolverMultistepScheduler",
        {**SCALED, "timestep_spacing": "leading", "steps_offset": 1},
    ),
    "DPM trailing v": (
        "DPMSolverMultistepScheduler",
        {**V, "timestep_spacing": "trailing", "euler_at_final": True},
    ),
    "DPM cosine": ("DPMSolverMultistepScheduler", {**COSINE, "timestep_spacing": "trailing"}),
    "SDXL": (
        "EulerDiscreteScheduler",
        {**SCALED, "timestep_spacing": "leading", "steps_offset": 1},
    ),
    "Euler linspace v": ("EulerDiscreteScheduler", {**SCALED, **V}),
    "SDXL-Turbo": ("EulerAncestralDiscreteScheduler", {**SCALED, "timestep_spacing": "trailing"}),
    "ancestral leading v": (
        "EulerAncestralDiscreteScheduler",
        {**SCALED, **V, "timestep_spacing": "leading"},
    ),
}
SHAPE = (2, 3, 4, 5)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def pair(request):
    """diffusers' scheduler and ours."""
    diffusers = pytest.importorskip("diffusers")
    name, options = request.param
    peer = getattr(diffusers, name)(**options)
    ours = scheduler_from_json({**peer.config, "_class_name": name})
    assert type(ours) is getattr(noise_schedulers, name)
    return peer, ours


def arrays(seed, count):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *SHAPE)).astype(np.float32)


def assert_close(ours, theirs):
    # diffusers' betas and their products are float32: 1000 roundings of 2**-24 in the last product.
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 14, 20, 50])
def test_every_step_is_diffusers(pair, steps, monkeypatch):
    """Both go from the same noise along the same predictions, with the same fresh noise."""
    import torch

    peer, ours = pair
    peer.set_timesteps(steps)
    levels = ours.levels(steps, tokens=0)
    np.testing.assert_array_equal([x["time"] for x in levels], peer.timesteps.numpy())
    fresh = arrays(2, len(levels))
    module = __import__(type(peer).__module__, fromlist=["randn_tensor"])
    taken = iter(torch.from_numpy(fresh))
    draws = hasattr(module, "randn_tensor") or ours.stochastic
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(taken), raising=draws)

    (noise,) = arrays(0, 1)
    sample, theirs = ours.start(noise, levels[0]), torch.from_numpy(noise) * peer.init_noise_sigma
    assert_close(sample, theirs)
    memory = ours.memory(sample)
    step = jax.jit(ours.step)
    for i, (level, time) in enumerate(zip(levels, peer.timesteps, strict=True)):
        scaled = peer.scale_model_input(theirs, time)
        assert_close(ours.scale(sample, level), scaled)
        # Of the sample's size: what a model predicts tells much of the noise in it.
        prediction = np.asarray(scaled) + 0.3 * arrays(10 + i, 1)[0]
        sample, memory = step(sample, prediction, level, memory, fresh[i])
        theirs = peer.step(torch.from_numpy(prediction), time, theirs).prev_sample
        assert_close(sample, theirs)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_an_image_gets_the_noise_that_diffusers_adds(pair, strength):
    import torch

    peer, ours = pair
    steps = 10
    peer.set_timesteps(steps)
    levels = ours.levels(steps, 0, strength)
    first = steps - int(steps * strength)  # StableDiffusionImg2ImgPipeline.get_timesteps
    again = int(type(ours) is noise_schedulers.PNDMScheduler)  # the second timestep comes twice
    assert len(levels) == steps - first + again
    first += again if first else 0
    assert levels[0]["time"] == peer.timesteps[first]
    noise, data = arrays(0, 2)
    theirs = peer.add_noise(
        torch.from_numpy(data), torch.from_numpy(noise), peer.timesteps[first : first + 1]
    )
    assert_close(ours.start(noise, levels[0], data), theirs)


def test_a_weak_strength_keeps_one_step():
    ours = noise_schedulers.DDIMScheduler()
    assert ours.levels(10, 0, 0.01)[0]["time"] == ours.levels(10, 0)[-1]["time"]


def test_the_peer_reads_what_is_written(pair):
    peer, ours = pair
    values = json.loads(json.dumps(ours.to_json()))
    assert type(ours).from_json(values) == ours
    again = type(peer).from_config(values)
    for key in set(values) - {"_class_name"}:
        assert again.config[key] == peer.config[key], key


def test_samples_of_a_batch_do_not_see_each_other(pair):
    _, ours = pair
    noise, prediction, memory, fresh = map(jnp.asarray, arrays(1, 4))
    level = ours.levels(4, 0)[2]
    if type(ours) is noise_schedulers.PNDMScheduler:
        memory = jnp.stack([memory, fresh, noise, prediction], axis=1)
    whole = ours.step(noise, prediction, level, memory, fresh)[0]
    alone = ours.step(noise[:1], prediction[:1], level, memory[:1], fresh[:1])[0]
    np.testing.assert_array_equal(whole[:1], alone)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range_are_refused(pair, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}; it must be 1 to 1000"):
        pair[1].levels(steps, 0)


@pytest.mark.parametrize("kind", [noise_schedulers.DDIMScheduler, noise_schedulers.PNDMScheduler])
def test_steps_that_begin_behind_the_last_trained_timestep_are_refused(kind):
    scheduler = kind(steps_offset=1)  # SD's own
    with pytest.raises(ValueError, match="1000 steps would begin at timestep 1000 of 1000; take"):
        scheduler.levels(1000, 0)
    assert scheduler.levels(500, 0)[0]["time"] == 999


@pytest.mark.parametrize(
    "name,key,value",
    [
        ("DDIMScheduler", "clip_sample", True),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "prediction_type", "sample"),
        ("DDIMScheduler", "_class_name", "UniPCMultistepScheduler"),
        ("PNDMScheduler", "skip_prk_steps", False),
        ("PNDMScheduler", "timestep_spacing", "trailing"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver++"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "use_karras_sigmas", True),
        ("DPMSolverMultistepScheduler", "variance_type", "learned_range"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "timestep_spacing", "random"),
        ("EulerAncestralDiscreteScheduler", "beta_schedule", "sigmoid"),
        ("EulerAncestralDiscreteScheduler", "beta_end", 2.0),
    ],
)
def test_an_unsupported_option_is_refused_by_name(name, key, value):
    with pytest.raises(CheckpointError, match=key):
        given = {"clip_sample": False, "skip_prk_steps": True}
        getattr(noise_schedulers, name).from_json({**given, key: value})


def test_ddim_without_a_word_on_clipping_is_refused_as_it_would_clip():
    with pytest.raises(CheckpointError, match="clip_sample = True"):
        noise_schedulers.DDIMScheduler.from_json({"_class_name": "DDIMScheduler"})
