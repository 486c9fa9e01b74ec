import numpy as np
import pytest

from quartz_jax.evaluation.analysis import (
    GROUP_SIZES,
    analyse_layer,
    bit_entropies,
    entropy,
    findings,
)
from quartz_jax.evaluation.pages.html import page


def rows_of(seed=0, k=128, samples=64, outlier=1.0):
    x = np.random.default_rng(seed).normal(size=(samples, k)).astype(np.float32)
    x[:, 0] *= outlier
    return x


def test_entropy_of_a_uniform_and_of_a_certain_symbol():
    assert entropy(np.full(16, 3)) == 4
    assert entropy(np.array([0, 7, 0])) == 0


def test_bits_of_evenly_used_codes_are_worth_one_bit_each():
    codes = np.array([s * m for s in (-1, 1) for m in range(8)])
    sign, *magnitude = bit_entropies(codes)
    assert magnitude == [1, 1, 1]
    assert sign == pytest.approx(entropy(np.array([7, 9])))  # minus zero has no sign


def test_small_values_alone_in_their_groups_are_exact():
    x = np.zeros((4, 64), np.float32)
    x[:, 0] = 127  # one outlier, in the first group
    x[:, 16:] = np.random.default_rng(0).integers(-7, 8, (4, 48))
    found = analyse_layer("x", x)
    assert found.near_zero["quartz"] < 1e-4
    assert found.near_zero["int4"] > 1
    assert found.shift_shares == (0.75, 0, 0, 0, 0.25)
    assert (found.shared, found.erased) == (0, 0)
    assert found.large == 1 / 64


def test_the_blind_spot_is_small_values_beside_a_large_one():
    x = np.tile(np.array([127.0] + [3.0] * 15, np.float32), (2, 2))
    found = analyse_layer("x", x)
    assert (found.shared, found.erased) == (1, 1)
    # the bound takes the fifteen for exact; they lose everything, 45 steps a group of 16
    assert found.mean_error["quartz-truncate"] > found.bound > 0


def test_more_outlying_inputs_have_larger_shifts_fewer_large_values_and_grow_with_the_group():
    plain, outlying = (analyse_layer("x", rows_of(outlier=o)) for o in (1, 30))
    assert outlying.large < 0.5 < plain.large
    assert list(outlying.by_group_size) == sorted(outlying.by_group_size)
    assert len(outlying.by_group_size) == len(GROUP_SIZES)


def test_findings_say_what_held_and_what_did_not():
    claims = findings([analyse_layer("a", rows_of(outlier=30)), analyse_layer("b", rows_of(1))])
    verdicts = {claim: held for claim, held, _ in claims}
    assert not verdicts["Most 8-bit values are small: P(|m| >= 8) < 0.5"]
    assert not verdicts["Values below 8 are kept exactly (what the bound counts on)"]
    assert "in 1 of 2 layers" in claims[0][2]


def test_the_analysis_page_shows_every_plot_and_its_command():
    pytest.importorskip("matplotlib")
    from quartz_jax.evaluation.pages.analysis import analysis_page

    layers = [analyse_layer(name, rows_of(i)) for i, name in enumerate("ab")]
    html = analysis_page(layers, "title", "a CPU.", "python x.py --count 1")
    assert html.count("<svg") == 5
    assert html.count("python x.py --count 1") == 6
    assert "<script" not in html


def test_titles_are_escaped():
    assert "&lt;b&gt;" in page("<b>")
