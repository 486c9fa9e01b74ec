import numpy as np
import pytest

from quartz_jax.evaluation.metrics import PSNR_OF_EQUAL, bootstrap_interval, psnr, ssim

IMAGES = np.random.default_rng(0).random((2, 16, 16, 3))


def test_psnr_is_the_logarithm_of_the_mean_squared_error():
    np.testing.assert_allclose(psnr(IMAGES, IMAGES + 0.1), 20)


def test_psnr_is_one_figure_an_image():
    noisy = IMAGES + np.array([0.1, 0.01]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(psnr(noisy, IMAGES), [20, 40])


def test_equal_images_have_finite_psnr_and_ssim_of_one():
    np.testing.assert_allclose(psnr(IMAGES, IMAGES), PSNR_OF_EQUAL)
    np.testing.assert_allclose(ssim(IMAGES, IMAGES), 1)


def test_ssim_falls_with_noise():
    noise = np.random.default_rng(1).normal(size=IMAGES.shape)
    assert np.all(ssim(IMAGES + 0.3 * noise, IMAGES) < ssim(IMAGES + 0.1 * noise, IMAGES))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_images_of_different_shape_are_refused(metric):
    with pytest.raises(ValueError, match="must have one shape"):
        metric(IMAGES, IMAGES[:1])


def test_the_bootstrap_interval_is_about_two_standard_errors():
    values = np.random.default_rng(0).normal(5, 2, 400)
    interval = bootstrap_interval(values)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_the_bootstrap_interval_is_the_same_every_time():
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
