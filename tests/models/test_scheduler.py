"""The flow-match Euler scheduler against diffusers, and its refusals."""

import numpy as np
import pytest

from models.flux2.schedule import empirical_mu
from models.schedulers import FlowMatchEulerScheduler, euler_step
from models.stored_files import CheckpointError

SCHEDULES = {
    "plain": {},
    "static": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "shift": 3.0},
    "dynamic linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "own range": {"use_dynamic_shifting": True, "base_shift": 0.3, "max_image_seq_len": 1024},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.1},
}


def diffusers_scheduler(options, steps, image_tokens):
    """Return diffusers' scheduler, set up as its FLUX pipeline does."""
    diffusers = pytest.importorskip("diffusers")
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    ours = FlowMatchEulerScheduler.from_json(scheduler.config)
    mu = flux.calculate_shift(
        image_tokens,
        ours.base_image_seq_len,
        ours.max_image_seq_len,
        ours.base_shift,
        ours.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler, ours


@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_sigmas_match_diffusers(options, steps):
    peer, ours = diffusers_scheduler(options, steps, image_tokens=1536)
    np.testing.assert_allclose(ours.sigmas(steps, 1536), peer.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_one_step_goes_from_noise_to_data(options):
    np.testing.assert_array_equal(FlowMatchEulerScheduler(**options).sigmas(1, 64), [1, 0])


def test_step_matches_diffusers():
    torch = pytest.importorskip("torch")
    peer, ours = diffusers_scheduler({"shift": 3.0}, steps=4, image_tokens=16)
    rng = np.random.default_rng(0)
    sample, velocity = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    sigmas = ours.sigmas(4, 16)
    expected = peer.step(torch.from_numpy(velocity), peer.timesteps[0], torch.from_numpy(sample))
    np.testing.assert_allclose(
        euler_step(sample, velocity, sigmas[0], sigmas[1]),
        expected.prev_sample.numpy(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_config_round_trips():
    scheduler = FlowMatchEulerScheduler(shift=2.0, use_dynamic_shifting=True)
    assert FlowMatchEulerScheduler.from_json(scheduler.to_json()) == scheduler


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_karras_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("time_shift_type", "cubic"),
        ("_class_name", "DDIMScheduler"),
    ],
)
def test_unsupported_option_is_refused_by_name(key, value):
    with pytest.raises(CheckpointError, match=key):
        FlowMatchEulerScheduler.from_json({key: value})


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        FlowMatchEulerScheduler().sigmas(0, 16)


def test_a_strength_that_rounding_loses_keeps_the_last_step():
    scheduler = FlowMatchEulerScheduler()
    for steps in (1, 4, 28):
        whole, kept = (scheduler.sigmas(steps, 300, x) for x in (1.0, 1e-17))
        np.testing.assert_array_equal(kept, whole[-2:])


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.5, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_strength_keeps_the_steps_that_diffusers_keeps(steps, strength):
    skipped = int(max(steps - min(steps * strength, steps), 0))  # FluxImg2ImgPipeline.get_timesteps
    scheduler = FlowMatchEulerScheduler(use_dynamic_shifting=True)
    whole, kept = (scheduler.sigmas(steps, 300, x) for x in (1.0, strength))
    np.testing.assert_array_equal(kept, whole[skipped:])
    assert len(kept) >= 2


@pytest.mark.parametrize("tokens", [64, 1024, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 50, 200])
def test_flux2_s_shift_is_diffusers(tokens, steps):
    klein = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")
    mu = empirical_mu(tokens, steps)
    assert mu == pytest.approx(klein.compute_empirical_mu(tokens, steps), rel=1e-6)
    options = {"use_dynamic_shifting": True, "shift": 3.0}
    peer = klein.FlowMatchEulerDiscreteScheduler(**options)
    peer.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = FlowMatchEulerScheduler(**options).sigmas(steps, tokens, mu=mu)
    np.testing.assert_allclose(ours, peer.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("steps", [8, 50])
@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_zimage_s_levels_are_diffusers(steps, shift):
    """A constant shift; what its pipeline works out of the image's size goes unused."""
    zimage = pytest.importorskip("diffusers.pipelines.z_image.pipeline_z_image")
    peer = zimage.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
    sigmas = zimage.get_default_z_image_sigmas(steps)
    zimage.retrieve_timesteps(peer, steps, sigmas=sigmas, mu=0.9)
    ours = FlowMatchEulerScheduler.from_json(peer.config)
    np.testing.assert_allclose(ours.sigmas(steps, 4096), peer.sigmas.numpy(), atol=1e-6)
    told = [1000 * level["time"] for level in ours.levels(steps, 4096)]
    np.testing.assert_allclose(told, peer.timesteps.numpy(), rtol=1e-5)
