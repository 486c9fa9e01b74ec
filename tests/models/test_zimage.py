"""What is Z-Image's alone: text that is refined once a prompt, and arguments that can't be used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module
from transformer_cases import CASES

from models.stored_files import CheckpointError
from models.zimage.config import ZImageConfig

CASE = CASES["Z-Image"]
SIZE = (3, 5)


@pytest.fixture(scope="module")
def model():
    config = CASE.component.config.from_json(CASE.config | CASE.shallow)
    return random_module(lambda: CASE.component.build(config, jnp.float32))


@nnx.jit
def call(model, arguments):
    return model(**arguments)


@nnx.jit
def in_two_parts(model, arguments):
    """Refine the text apart from the call, as sampling does once a prompt."""
    arguments = dict(arguments)
    text, lengths = arguments.pop("cap_feats"), arguments.pop("cap_lengths")
    context = model.prepare(text, lengths)
    return model(**arguments, context=context, context_lengths=lengths)


def padded(arguments, to):
    """Return arguments with texts as one array, and their lengths."""
    texts = arguments["cap_feats"]
    lengths = np.array([len(text) for text in texts])
    rows = [np.pad(text, [(0, to - len(text)), (0, 0)], constant_values=9) for text in texts]
    return arguments | {"cap_feats": np.stack(rows), "cap_lengths": lengths}


@pytest.mark.parametrize("to", [64, 96])
def test_text_refined_apart_and_padded_anyhow_gives_the_same(model, to):
    """What stands in an array behind a text's own padding counts for nothing."""
    plain = CASE.arguments(SIZE)
    expected = call(model, plain)
    found = in_two_parts(model, padded(plain, to))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_others_in_the_batch(model):
    both = CASE.arguments(SIZE)
    expected = call(model, both)
    for i, to in enumerate((64, 32)):
        one = {name: x[i : i + 1] for name, x in both.items()}
        found = in_two_parts(model, padded(one, to))
        np.testing.assert_allclose(found[0], expected[i], rtol=1e-4, atol=1e-4)


def test_the_plain_text_of_both_forms_goes_through_the_blocks(model):
    """So that its blocks are calibrated from the arguments that sampling makes."""
    arguments = padded(CASE.arguments(SIZE), 64)
    context = jnp.zeros((2, 64, 48))
    with_both = jax.eval_shape(lambda: model.start(**arguments, context=context))
    assert not with_both.refined
    alone = {name: arguments[name] for name in "xt"}
    assert jax.eval_shape(lambda: model.start(**alone, context=context)).refined


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cap_feats": None}, "there is no text: give cap_feats, or context"),
        ({"x": np.zeros((2, 4, 6, 10))}, r"x has shape \[2, 4, 6, 10\]; it must be \[b, 4, 1, hei"),
        ({"x": np.zeros((2, 4, 1, 6, 9))}, "both multiples of 2"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**CASE.arguments(SIZE) | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes_dims": (4, 6, 8)}, "axes_dims"),
        ({"n_kv_heads": 1}, "n_kv_heads 1 must be the same"),
        ({"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)}, "all_patch_size .* not supported"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name"),
    ],
)
def test_an_unusable_config_is_refused_by_name(options, message):
    with pytest.raises(CheckpointError, match=message):
        ZImageConfig.from_json({**CASE.config, **options})
