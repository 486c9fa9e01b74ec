"""DiT as a family: what its components are, how they fit, and how it is sampled."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from models.denoiser import Conditions, Inputs
from models.dit.config import DiTConfig
from models.dit.labels import Labels
from models.dit.params import TRANSFORMER
from models.family import Family, Schedule
from models.planar import PlanarDenoiser, default_side, latent_misfits
from models.vae.config import AutoencoderKLConfig
from models.vae.params import AUTOENCODER_KL

if TYPE_CHECKING:
    from models.sampler import Sampler

_CALIBRATION = 64  # classes that recipes are calibrated on
_GOLDEN = 0.6180339887498949  # whose multiples spread evenly, modulo 1


class DiTDenoiser(PlanarDenoiser):
    """Classes in place of prompts, noise predicted, and a learned variance that isn't used."""

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError for images, and for texts that are no class."""
        super().check(inputs)
        self._classes(inputs.texts)

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return classes, int [texts]; empty texts are none."""
        return {"class_labels": jnp.asarray(self._classes(texts))}

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        return {"class_labels": jax.ShapeDtypeStruct((texts,), jnp.int32)}

    def calibration_texts(self) -> Sequence[str]:
        """Return numbers of classes, any first ones of which spread over all."""
        count = self.configs["transformer"].num_embeds_ada_norm
        parts = np.arange(_CALIBRATION) * _GOLDEN % 1
        return [str(int(part * count)) for part in parts]

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of DiT's call."""
        timestep = jnp.broadcast_to(time, latents.shape[0])
        return {"hidden_states": latents, "timestep": timestep, **conditions}

    def _classes(self, texts: Sequence[str]) -> np.ndarray:
        labels = self.configs.get("labels", Labels())
        count = self.configs["transformer"].num_embeds_ada_norm
        return np.array([labels.find(text, count) for text in texts], np.int32)


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components of a DiT don't fit, naming both sizes."""
    yield from latent_misfits(configs, variance=True)


_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}
_VAE = AutoencoderKLConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)  # SD's


def _sizes(sample_size: int) -> dict[str, Any]:
    """Return the configs of a DiT-XL/2."""
    return {"vae": _VAE, "transformer": DiTConfig(out_channels=8, sample_size=sample_size)}


DIT = Family(
    name="DiT",
    pipelines=("DiTPipeline",),
    components={"vae": AUTOENCODER_KL, "transformer": TRANSFORMER},
    tokenizers={},
    denoiser=DiTDenoiser,
    schedules={
        "dit": Schedule(
            name="DiT's",
            scheduler=_SCHEDULER,
            defaults={"num_inference_steps": 50, "true_cfg_scale": 4.0},
        )
    },
    schedule_of=lambda configs, index: ("dit", None),
    schedule_like=lambda scheduler, index: "dit",
    misfits=_misfits,
    defaults_of=default_side,
    index_configs=lambda index: {"labels": Labels.from_index(index)},
    sizes={"dit-xl-2-256": _sizes(32), "dit-xl-2-512": _sizes(64)},
)
