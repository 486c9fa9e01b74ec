"""FLUX.2's shift of noise levels, which depends on the size of the image and on the steps."""


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the dynamic shift of an image of so many latent tokens in so many steps.

    Two lines over the tokens were fitted, at 10 and at 200 steps; between them it goes straight,
    and above 4300 tokens the second holds for any number (`compute_empirical_mu` in
    `src/flux2/sampling.py` of github.com/black-forest-labs/flux2).
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)
