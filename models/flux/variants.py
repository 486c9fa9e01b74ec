"""FLUX.1's models that look at an image beside the text.

Kontext edits it, Fill paints where a mask covers it, Canny and Depth follow a sketch of edges or a
map of distances. The transformer is FLUX.1's; what differs is what it is given beside the latents
(diffusers 0.42.1, `pipelines/flux/`: `pipeline_flux_kontext.py`, `_fill.py`, `_control.py`). Where
those draw from the autoencoder's distribution, its mean is taken here: the image is what it is,
whatever the seed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from models.denoiser import Canvas, Conditions, Inputs
from models.family import Schedule
from models.flux.family import FLUX, FluxDenoiser, dev_scheduler, misfits
from models.flux.latents import image_ids, pack
from models.pictures import to_pixels

if TYPE_CHECKING:
    from models.sampler import Sampler

_LATENTS = "image_latents"  # among conditions: of what is looked at


class FluxKontextDenoiser(FluxDenoiser):
    """The image's tokens stand behind the latents' own, with 1 as their first position."""

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError for several images, or a mask."""
        if len(inputs.references) > 1:
            raise ValueError(f"references holds {len(inputs.references)} images; give one")
        if inputs.mask is not None:
            raise ValueError("mask: this model takes none; leave it out")

    def look(self, sampler: "Sampler", inputs: Inputs, canvas: Canvas) -> Conditions:
        """Return latents [1, tokens, channels] and positions [1, tokens, 3] of the image."""
        if not inputs.references:
            return {}
        (image,) = inputs.references
        height, width = self._size(image, canvas)
        latents = self._latents(sampler, to_pixels(image, height, width))
        ids = image_ids(height // self.token_pixels, width // self.token_pixels, first=1)
        return {_LATENTS: latents, "image_ids": jnp.asarray(ids)[None]}

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return the texts and the image with the positions of all tokens."""
        conditions = super().prepare(model, conditions, canvas)
        ids = conditions.pop("image_ids", None)
        if ids is not None:
            conditions["img_ids"] = np.concatenate([conditions["img_ids"], np.asarray(ids[0])])
        return conditions

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of FluxTransformer's call, the image's tokens last."""
        image = conditions.get(_LATENTS)
        others = {name: x for name, x in conditions.items() if name != _LATENTS}
        seen = latents if image is None else jnp.concatenate([latents, image], axis=1)
        return super().inputs(seen, time, others, guidance)

    def output(self, prediction: Any, latents: jax.Array) -> jax.Array:
        """Return the velocity of the latents' own tokens."""
        return super().output(prediction[:, : latents.shape[1]], latents)

    def _size(self, image: Image.Image, canvas: Canvas) -> tuple[int, int]:
        """Return height and width: as many pixels as the canvas has, in the image's proportions.

        Of a canvas of a megapixel these are, up to rounding, the sizes that Kontext was trained
        with (`PREFERRED_KONTEXT_RESOLUTIONS` of diffusers).
        """
        ratio, multiple = image.width / image.height, self.multiple
        height = (canvas.height * canvas.width / ratio) ** 0.5
        sides = (max(1, round(side / multiple)) * multiple for side in (height, height * ratio))
        height, width = sides
        return height, width


class FluxControlDenoiser(FluxDenoiser):
    """The image's latents stand beside the latents' own, as channels of the same tokens."""

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError without exactly one image, or with a mask."""
        _check_one(inputs, "a sketch of edges or a map of distances, as the model was made for")
        if inputs.mask is not None:
            raise ValueError("mask: this model takes none; leave it out")

    def look(self, sampler: "Sampler", inputs: Inputs, canvas: Canvas) -> Conditions:
        """Return latents [1, tokens, channels] of the image."""
        pixels = to_pixels(inputs.references[0], canvas.height, canvas.width)
        return {_LATENTS: self._latents(sampler, pixels)}

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return texts and image with positions; without an image, as in calibration, a blank."""
        conditions = super().prepare(model, conditions, canvas)
        if _LATENTS not in conditions:
            rows = conditions["encoder_hidden_states"].shape[0]
            blank = self._blank(canvas)
            conditions[_LATENTS] = jnp.broadcast_to(blank, (rows, *blank.shape))
        return conditions

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of FluxTransformer's call, the image's channels last."""
        others = {name: x for name, x in conditions.items() if name != _LATENTS}
        seen = jnp.concatenate([latents, conditions[_LATENTS]], axis=-1)
        return super().inputs(seen, time, others, guidance)

    def _blank(self, canvas: Canvas) -> jax.Array:
        """Return what stands for no image, [tokens, channels]."""
        return jnp.zeros(canvas.shape, jnp.float32)


class FluxFillDenoiser(FluxControlDenoiser):
    """The image without what the mask covers, and the mask itself, as channels."""

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError without exactly one image and a mask."""
        _check_one(inputs, "the picture to paint in")
        if inputs.mask is None:
            raise ValueError("mask is missing: give one, white where the picture is painted anew")

    def look(self, sampler: "Sampler", inputs: Inputs, canvas: Canvas) -> Conditions:
        """Return latents of the uncovered image and the mask, [1, tokens, channels]."""
        size = (canvas.width, canvas.height)
        grey = (inputs.mask or Image.new("L", size)).convert("L")
        mask = np.asarray(grey.resize(size, Image.Resampling.LANCZOS), np.float32) / 255 >= 0.5
        pixels = to_pixels(inputs.references[0], canvas.height, canvas.width)
        latents = self._latents(sampler, pixels * ~mask[..., None])
        covered = self._packed(mask.astype(np.float32))
        return {_LATENTS: jnp.concatenate([latents, covered], axis=-1)}

    def _packed(self, mask: np.ndarray) -> jax.Array:
        """Return a mask's pixels as channels of tokens, [1, tokens, 4 * downsampling**2]."""
        side = self.configs["vae"].downsampling
        rows, columns = (pixels // side for pixels in mask.shape)
        tiles = mask.reshape(rows, side, columns, side).transpose(0, 2, 1, 3)
        return pack(jnp.asarray(tiles.reshape(1, rows, columns, side * side)))

    def _blank(self, canvas: Canvas) -> jax.Array:
        """Return an image that is covered all over, [tokens, channels]."""
        covered = self._packed(np.ones((canvas.height, canvas.width), np.float32))[0]
        return jnp.concatenate([super()._blank(canvas), covered], axis=-1)


def _check_one(inputs: Inputs, what: str) -> None:
    if len(inputs.references) != 1:
        raise ValueError(f"references holds {len(inputs.references)} images; give one, {what}")


def _fill_misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    vae = configs.get("vae")
    side = 8 if vae is None else vae.downsampling  # pixels of the mask a latent pixel
    yield from misfits(configs, tokenizers, lambda channels: 2 * channels + 4 * side**2)


def _control_misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    yield from misfits(configs, tokenizers, lambda channels: 2 * channels)


def _schedule(name: str, steps: int, guidance: float) -> Schedule:
    defaults = {"num_inference_steps": steps, "guidance_scale": guidance}
    return Schedule(name=f"FLUX.1 {name}'s", scheduler=dev_scheduler(), defaults=defaults)


def _wider(channels: int) -> dict[str, Any]:
    """Return FLUX.1-dev's configs with a transformer that is given more channels a token."""
    sizes = FLUX.sizes["flux1-dev"]
    transformer = dataclasses.replace(
        sizes["transformer"], in_channels=channels, out_channels=sizes["transformer"].in_channels
    )
    return {**sizes, "transformer": transformer}


# Steps and guidance: the examples of the models' cards.
FLUX_KONTEXT = dataclasses.replace(
    FLUX,
    name="FLUX.1 Kontext",
    pipelines=("FluxKontextPipeline",),
    denoiser=FluxKontextDenoiser,
    schedules={"kontext": _schedule("Kontext", 28, 2.5)},
    schedule_of=lambda configs, index: ("kontext", None),
    schedule_like=lambda scheduler, index: "kontext",
    sizes={"flux1-kontext-dev": FLUX.sizes["flux1-dev"]},
)
FLUX_FILL = dataclasses.replace(
    FLUX,
    name="FLUX.1 Fill",
    pipelines=("FluxFillPipeline",),
    denoiser=FluxFillDenoiser,
    schedules={"fill": _schedule("Fill", 50, 30.0)},
    schedule_of=lambda configs, index: ("fill", None),
    schedule_like=lambda scheduler, index: "fill",
    misfits=_fill_misfits,
    sizes={"flux1-fill-dev": _wider(384)},
)
FLUX_CONTROL = dataclasses.replace(
    FLUX,
    name="FLUX.1 Canny and Depth",
    pipelines=("FluxControlPipeline",),
    denoiser=FluxControlDenoiser,
    schedules={"canny": _schedule("Canny", 50, 30.0), "depth": _schedule("Depth", 30, 10.0)},
    schedule_of=lambda configs, index: ("canny", None),
    schedule_like=lambda scheduler, index: "canny",
    misfits=_control_misfits,
    sizes={name: _wider(128) for name in ("flux1-canny-dev", "flux1-depth-dev")},
)
