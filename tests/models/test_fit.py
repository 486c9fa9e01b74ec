"""Whether components fit each other, told from the configs of every family's published models."""

import dataclasses

import pytest

from models import families
from models.dit.family import DIT
from models.fit import check_fit
from models.flux.family import FLUX
from models.flux2.config import Flux2Config
from models.flux2.family import FLUX2
from models.ldm.family import LDM
from models.pixart.family import PIXART
from models.schedulers import scheduler_from_json
from models.sd3.family import SD3
from models.stored_files import CheckpointError
from models.unet.family import SD, SDXL
from models.zimage.config import ZImageConfig
from models.zimage.family import ZIMAGE

MODELS = [(family, name) for family in families.FAMILIES for name in family.sizes]


def named(values):
    return [f"{family.name}, {name}" for family, name in values]


@pytest.mark.parametrize(("family", "name"), MODELS, ids=named(MODELS))
def test_components_of_a_published_model_fit(family, name):
    assert check_fit(family, family.sizes[name]) is None


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_a_folder_s_scheduler_tells_a_schedule_of_the_family(family):
    for schedule in family.schedules.values():
        scheduler = scheduler_from_json(schedule.scheduler)
        name = family.schedule_like(scheduler, {**family.index, **schedule.index})
        assert name in family.schedules


def change(family, component, **fields):
    """Return the configs of a family's first model with fields of one of them changed."""
    sizes = next(iter(family.sizes.values()))
    return {**sizes, component: dataclasses.replace(sizes[component], **fields)}


@pytest.mark.parametrize("family", [FLUX, FLUX2, ZIMAGE, DIT, PIXART, SD3], ids=lambda x: x.name)
@pytest.mark.parametrize("field", ["in_channels", "out_channels"])
def test_an_autoencoder_of_other_than_pictures_is_refused(family, field):
    configs = change(family, "vae", **{field: 4})
    with pytest.raises(CheckpointError, match=r"the autoencoder takes images of . channels"):
        check_fit(family, configs)


@pytest.mark.parametrize(
    ("name", "given"), [("DiT", 6), ("DiT", 1), ("PixArt-Sigma", 3), ("SD3", 1), ("SD3", 32)]
)
def test_a_transformer_that_predicts_other_channels_than_the_latents_is_refused(name, given):
    family = next(x for x in families.FAMILIES if x.name == name)
    taken = 16 if name == "SD3" else 4
    words = rf"takes latents of {taken} channels and gives {given}$"
    with pytest.raises(CheckpointError, match=words):
        check_fit(family, change(family, "transformer", out_channels=given))


@pytest.mark.parametrize("family", [SD, SDXL, LDM], ids=lambda family: family.name)
def test_a_unet_and_its_autoencoder_are_held_to_the_same(family):
    taken = 3 if family is LDM else 4
    with pytest.raises(CheckpointError, match=rf"the unet takes latents of {taken} .* gives 8$"):
        check_fit(family, change(family, "unet", out_channels=8))
    for field in ("in_channels", "out_channels"):
        with pytest.raises(CheckpointError, match=r"the autoencoder takes images of . channels"):
            check_fit(family, change(family, family.autoencoder, **{field: 4}))
    with pytest.raises(CheckpointError, match="takes latents of 5 channels, and the autoencoder"):
        check_fit(family, change(family, "unet", in_channels=5, out_channels=5))


@pytest.mark.parametrize("family", [FLUX2, ZIMAGE], ids=lambda family: family.name)
def test_a_text_encoder_for_short_texts_is_refused(family):
    configs = change(family, "text_encoder", max_position_embeddings=500)
    with pytest.raises(CheckpointError, match="text_encoder reads 500 tokens at most"):
        check_fit(family, configs)


@pytest.mark.parametrize("axes", [(64, 64), (32, 32, 64), (32, 32, 32, 16, 16)], ids=str)
def test_flux2_turns_four_axes(axes):
    with pytest.raises(CheckpointError, match="must be four even numbers"):
        Flux2Config(axes_dims_rope=axes)


def test_a_scale_of_time_that_would_stop_it_is_refused():
    with pytest.raises(CheckpointError, match="t_scale = 0"):
        ZImageConfig(t_scale=0)


@pytest.mark.parametrize("value", ["false", None, 0])
def test_whether_a_klein_was_distilled_is_true_or_false(value):
    with pytest.raises(CheckpointError, match=r"is_distilled is .*; expected a bool"):
        FLUX2.index_configs({"is_distilled": value})


def test_sizes_beyond_the_positions_of_sd3_are_refused_before_any_work():
    denoiser = SD3.denoiser(next(iter(SD3.sizes.values())))
    assert denoiser.canvas(3072, 16).shape == (16, 384, 2)
    with pytest.raises(ValueError, match="16x3088 is too large: sides of 3072 pixels at most"):
        denoiser.canvas(3088, 16)
