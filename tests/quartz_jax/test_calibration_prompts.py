"""The prompts that ship with the project, which conversions are calibrated on."""

from quartz_jax.evaluation.prompts import read_lines
from quartz_jax.pipelines import CALIBRATION_PROMPTS


def test_there_are_96_different_ones_of_3_to_60_words():
    prompts = read_lines(CALIBRATION_PROMPTS)
    assert len(set(prompts)) == len(prompts) == 96
    words = [len(prompt.split()) for prompt in prompts]
    assert (min(words), max(words)) == (3, 60)
