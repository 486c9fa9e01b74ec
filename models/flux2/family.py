"""FLUX.2 klein as a family: what its components are, how they fit, and how it is sampled."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from models.bfl_names import bfl_rules
from models.denoiser import Canvas, Conditions, Denoiser, Inputs
from models.family import AdapterNaming, Family, Schedule, Tokenizer
from models.fit import length_misfits, picture_misfits, tokenizer_misfits
from models.flux2.config import Flux2Config
from models.flux2.params import TRANSFORMER, diffusers_rules
from models.flux2.prompts import (
    LONGEST,
    TEMPLATE,
    TEXT_ENCODER,
    TextConfig,
    encode_tokens,
    text_tokens,
)
from models.flux2.schedule import empirical_mu
from models.pictures import to_pixels
from models.schedulers import Level, Scheduler
from models.stored_files import CheckpointError
from models.text_encoders.chat import QWEN_SPECIALS
from models.vae.config import AutoencoderKLFlux2Config
from models.vae.flux2 import AUTOENCODER_KL_FLUX2
from models.vae.packing import unpack

if TYPE_CHECKING:
    from models.sampler import Sampler

_AXES = 4  # of positions: image, row, column, place in the text
_REFERENCE = 10  # between references on the first axis
_LARGEST_REFERENCE = 1024**2  # pixels


class Flux2Denoiser(Denoiser):
    """Packed latents of [tokens, channels], one text encoder, references, and a velocity."""

    @property
    def multiple(self) -> int:
        """What height and width must be multiples of, in pixels: of a latent token's side."""
        return 2 * self.configs["vae"].downsampling

    @property
    def guided(self) -> bool:
        """Whether the transformer has a guidance embedding."""
        return self.configs["transformer"].guidance_embeds

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError for a mask, which there is no use for, or references too small."""
        if inputs.mask is not None:
            raise ValueError("mask: this model takes none; leave it out")
        for image in inputs.references:
            if min(image.size) < self.multiple:
                raise ValueError(
                    f"references holds an image of {image.width}x{image.height} pixels; its sides "
                    f"must be at least {self.multiple}"
                )

    def canvas(self, height: int, width: int) -> Canvas:
        """Return the size of an image's packed latents."""
        rows, columns = self._grid(height, width)
        shape = (rows * columns, self.configs["transformer"].in_channels)
        return Canvas(height=height, width=width, shape=shape, tokens=rows * columns)

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return text tokens [texts, 512, channels]; a warning says what is cut of a text."""
        tokens = text_tokens(sampler.tokenizers["tokenizer"], texts)
        states = sampler.run("text_encoder", "encode prompts", *tokens, function=encode_tokens)
        return {"encoder_hidden_states": states}

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        size = (texts, tokens, self.configs["transformer"].joint_attention_dim)
        return {"encoder_hidden_states": jax.ShapeDtypeStruct(size, jnp.float32)}

    def look(self, sampler: "Sampler", inputs: Inputs, canvas: Canvas) -> Conditions:
        """Return tokens of references [1, tokens, channels] and their positions [1, tokens, 4]."""
        if not inputs.references:
            return {}
        latents, ids = [], []
        for number, image in enumerate(inputs.references):
            pixels = reference_pixels(image, self.multiple)[None]
            found = sampler.run("vae", "encode images", pixels, function=_mean_latents)
            ids.append(positions(*found.shape[1:3], image=_REFERENCE * (1 + number)))
            latents.append(found.reshape(1, -1, found.shape[-1]))
        return {
            "reference_latents": jnp.concatenate(latents, axis=1),
            "reference_ids": jnp.asarray(np.concatenate(ids)[None]),
        }

    def levels(
        self, scheduler: Scheduler, num_inference_steps: int, canvas: Canvas, strength: float
    ) -> list[Level]:
        """Return each step's scalars, with a shift that depends on tokens and steps."""
        mu = empirical_mu(canvas.tokens, num_inference_steps)
        return scheduler.levels(num_inference_steps, canvas.tokens, strength, mu=mu)

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return the texts with the positions of all tokens."""
        conditions = dict(conditions)
        text_tokens = conditions["encoder_hidden_states"].shape[1]
        ids = [positions(*self._grid(canvas.height, canvas.width))]
        if "reference_ids" in conditions:  # the same for all rows
            ids.append(np.asarray(conditions.pop("reference_ids")[0]))
        txt_ids = np.zeros((text_tokens, _AXES), np.float32)
        txt_ids[:, 3] = np.arange(text_tokens)
        return conditions | {"img_ids": np.concatenate(ids), "txt_ids": txt_ids}

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of Flux2Transformer's call."""
        conditions, rows = dict(conditions), latents.shape[0]
        references = conditions.pop("reference_latents", None)
        seen = latents if references is None else jnp.concatenate([latents, references], axis=1)
        return {
            "hidden_states": seen,
            "timestep": jnp.broadcast_to(time, rows),
            "guidance": None if guidance is None else jnp.broadcast_to(guidance, rows),
            **conditions,
        }

    def output(self, prediction: Any, latents: jax.Array) -> jax.Array:
        """Return the velocity of the image's tokens, which come before the references'."""
        return prediction[:, : latents.shape[1]].astype(jnp.float32)

    def encode_image(
        self, autoencoder: nnx.Module, image: jax.Array, noise: jax.Array, canvas: Canvas
    ) -> jax.Array:
        """Return packed latents, a draw from the distribution that the autoencoder gives."""
        vae: Any = autoencoder
        grid = self._grid(canvas.height, canvas.width)
        mean, logvar = (x.astype(jnp.float32) for x in vae.encode(image))
        latents = mean + jnp.exp(0.5 * logvar) * unpack(noise.reshape(1, *grid, -1))
        return vae.normalize(latents).reshape(1, *canvas.shape)

    def decode(self, autoencoder: nnx.Module, latents: jax.Array, canvas: Canvas) -> jax.Array:
        """Return the image of packed latents."""
        vae: Any = autoencoder
        grid = self._grid(canvas.height, canvas.width)
        return vae.decode(vae.denormalize(latents.reshape(1, *grid, -1)))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of tokens."""
        return height // self.multiple, width // self.multiple


def positions(rows: int, columns: int, image: int = 0) -> np.ndarray:
    """Return the positions of an image's tokens, float32 [rows columns, 4]."""
    ids = np.zeros((rows, columns, _AXES), np.float32)
    ids[..., 0] = image
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)
    return ids.reshape(-1, _AXES)


def reference_pixels(image: Image.Image, multiple: int) -> np.ndarray:
    """Return what the model looks at of an image, float32 [height, width, 3] in -1..1.

    A large one is brought to a megapixel; of any, the middle is taken whose sides are multiples
    (`Flux2ImageProcessor` of diffusers' `pipelines/flux2/image_processor.py`).
    """
    width, height = image.size
    if width * height > _LARGEST_REFERENCE:
        scale = math.sqrt(_LARGEST_REFERENCE / (width * height))
        width, height = int(width * scale), int(height * scale)
    pixels = to_pixels(image, height, width)
    rows, columns = height // multiple * multiple, width // multiple * multiple
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[top : top + rows, left : left + columns]


def _mean_latents(autoencoder: Any, image: jax.Array) -> jax.Array:
    """Return the likeliest latents of an image, packed, float32 [1, rows, columns, channels]."""
    return autoencoder.normalize(autoencoder.encode(image)[0].astype(jnp.float32))


def _schedule_of(configs: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[str, str | None]:
    if "is_distilled" in index:
        return ("distilled" if index["is_distilled"] else "base"), None
    return "distilled", (
        "doesn't say whether it was distilled, so it is sampled as FLUX.2 klein is, in 4 steps by "
        'default; say schedule "base" for a base model, which takes 50 steps and guidance'
    )


def _index_configs(index: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return nothing: a denoiser needs none of it. Raises CheckpointError for what isn't a bool."""
    if not isinstance(distilled := index.get("is_distilled", False), bool):
        raise CheckpointError(f"is_distilled is {distilled!r}; expected a bool")
    return {}


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components of a FLUX.2 model don't fit, naming both sizes."""
    transformer, vae = configs.get("transformer"), configs.get("vae")
    encoder = configs.get("text_encoder")
    if transformer and transformer.in_channels != transformer.token_channels:
        yield (
            f"the transformer takes {transformer.in_channels} channels a token and gives "
            f"{transformer.token_channels}"
        )
    elif transformer and vae and transformer.in_channels != vae.packed_channels:
        yield (
            f"the transformer takes {transformer.in_channels} channels a token, and the "
            f"autoencoder gives {vae.packed_channels}"
        )
    if transformer and encoder and transformer.joint_attention_dim != encoder.channels:
        yield (
            f"the transformer takes text tokens of {transformer.joint_attention_dim} channels, and "
            f"text_encoder gives {encoder.channels}: klein 4B reads Qwen3-4B, klein 9B Qwen3-8B"
        )
    yield from picture_misfits(vae)
    yield from length_misfits(encoder, LONGEST)
    if encoder and "tokenizer" in tokenizers:
        yield from tokenizer_misfits("tokenizer", tokenizers["tokenizer"], encoder)
    if "tokenizer" in tokenizers:
        yield from TEMPLATE.misfits(tokenizers["tokenizer"])


_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def _sizes(heads: int, blocks: tuple[int, int], encoder: TextConfig) -> dict[str, Any]:
    """Return the configs of a klein: heads, double and single blocks, and its text encoder."""
    return {
        "text_encoder": encoder,
        "vae": AutoencoderKLFlux2Config(),
        "transformer": Flux2Config(
            num_attention_heads=heads,
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            joint_attention_dim=encoder.channels,
            guidance_embeds=False,
        ),
    }


def _qwen3(hidden_size: int, intermediate_size: int) -> TextConfig:
    """Return the config of Qwen3-4B or -8B."""
    return TextConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=1e6,
        max_position_embeddings=40960,
    )


FLUX2 = Family(
    name="FLUX.2",
    pipelines=("Flux2KleinPipeline",),
    components={
        "text_encoder": TEXT_ENCODER,
        "vae": AUTOENCODER_KL_FLUX2,
        "transformer": TRANSFORMER,
    },
    tokenizers={
        "tokenizer": Tokenizer(kind="Qwen2TokenizerFast", length=131072, specials=QWEN_SPECIALS)
    },
    denoiser=Flux2Denoiser,
    schedules={
        "distilled": Schedule(
            name="FLUX.2 klein's",
            scheduler=_SCHEDULER,
            defaults={"num_inference_steps": 4},
            index={"is_distilled": True},
        ),
        "base": Schedule(
            name="FLUX.2 klein base's",
            scheduler=_SCHEDULER,
            defaults={"num_inference_steps": 50, "true_cfg_scale": 4.0},
            index={"is_distilled": False},
        ),
    },
    schedule_of=_schedule_of,
    schedule_like=lambda scheduler, index: _schedule_of({}, index)[0],
    misfits=_misfits,
    index_configs=_index_configs,
    adapters=(
        AdapterNaming(
            rules=diffusers_rules,
            # trainers other than diffusers' put the last one before diffusers' names too
            prefixes=("", "transformer.", "base_model.model.", "diffusion_model."),
            flat="lora_transformer_",
        ),
        AdapterNaming(
            rules=lambda config: bfl_rules(),
            prefixes=("", "diffusion_model.", "base_model.model."),
            flat="lora_unet_",
        ),
    ),
    sizes={
        "flux-2-klein-4b": _sizes(24, (5, 20), _qwen3(2560, 9728)),
        "flux-2-klein-9b": _sizes(32, (8, 24), _qwen3(4096, 12288)),
    },
    autoencoder_file="flux2-vae.safetensors",
)
