"""Text to image with FLUX.1: encode prompts, denoise packed latents, decode images.

Latents are packed: a token holds a 2x2 patch of latent pixels. They stay float32 between steps,
whatever dtype the models compute in.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

from models.flux.modeling import FluxTransformer
from models.schedulers import FlowMatchEulerScheduler, euler_step
from models.text_encoders.clip import CLIPTextEncoder
from models.text_encoders.t5 import T5Encoder
from models.vae.modeling import AutoencoderKL

_MAX_T5_TOKENS = 512  # FLUX.1 was trained with up to this many (schnell: 256)
_PIXEL_MULTIPLE = 16  # of width and height
_OUTPUT_TYPES = ("pil", "np", "latent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a pipeline call uses for arguments that are left out."""

    num_inference_steps: int = 28
    guidance_scale: float = 3.5  # only for models with guidance embedding
    true_cfg_scale: float = 1.0  # 1 is off
    height: int = 1024  # pixels
    width: int = 1024  # pixels


@dataclasses.dataclass(kw_only=True)
class FluxPipeline:
    """A FLUX.1 model's components; any of them may be replaced by one with the same call."""

    transformer: FluxTransformer
    text_encoder: CLIPTextEncoder  # gives the pooled vector
    text_encoder_2: T5Encoder  # gives the text tokens
    tokenizer: Any  # transformers' tokenizer for text_encoder
    tokenizer_2: Any  # transformers' tokenizer for text_encoder_2
    vae: AutoencoderKL
    scheduler: FlowMatchEulerScheduler
    defaults: GenerationDefaults = GenerationDefaults()

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str = "",
        seed: int | jax.Array = 0,
        latents: jax.Array | None = None,
        progress: bool = True,
        output_type: str = "pil",
    ) -> list[Image.Image] | np.ndarray | jax.Array:
        """Return one image a prompt; the same arguments give the same bytes.

        Args:
          prompts: one or several texts.
          height: pixels, a multiple of 16. This and whatever else is None comes from `defaults`.
          width: pixels, a multiple of 16.
          num_inference_steps: evaluations of the transformer.
          guidance_scale: the distilled guidance; only for models with guidance embedding.
          true_cfg_scale: classifier-free guidance, at twice the work a step; 1 is off.
          negative_prompt: what true classifier-free guidance steers away from.
          seed: an integer or a JAX key. Image i depends on it and on i, not on the batch size.
          latents: start from this noise instead, float32 as `initial_noise` returns it.
          progress: show a bar over the steps.
          output_type: "pil" for PIL images, "np" for float32 [batch, height, width, 3] in 0..1,
            "latent" for packed latents, float32 [batch, tokens, channels].

        Raises:
          ValueError: an argument can't be used; nothing has been computed then.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        if num_inference_steps is None:
            num_inference_steps = self.defaults.num_inference_steps
        if true_cfg_scale is None:
            true_cfg_scale = self.defaults.true_cfg_scale
        self._check(prompts, height, width, num_inference_steps, latents, output_type)
        guidance_scale = self._guidance_scale(guidance_scale)

        if latents is None:
            key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
            latents = self.initial_noise(key, len(prompts), height, width)
        negative = None
        if true_cfg_scale != 1.0:
            negative = self.encode_prompts([negative_prompt] * len(prompts))
        latents = self.denoise(
            latents,
            *self.encode_prompts(prompts),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            negative=negative,
            progress=progress,
        )
        if output_type == "latent":
            return latents
        images = np.asarray(self.decode(latents, height, width))
        return images if output_type == "np" else [to_pil(image) for image in images]

    @property
    def token_pixels(self) -> int:
        """Image pixels along one side of a latent token."""
        return 2 * self.vae.config.downsampling

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        """Return T5's tokens [batch, text tokens, channels] and CLIP's pooled [batch, channels].

        Texts are padded and truncated to the tokenizers' lengths, T5's to 512 at most.
        """
        clip_length = self.text_encoder.config.max_position_embeddings
        clip_ids = _token_ids(self.tokenizer, prompts, clip_length)
        t5_ids = _token_ids(self.tokenizer_2, prompts, _MAX_T5_TOKENS)
        _, pooled = _compiled(_apply, self.text_encoder)(clip_ids)
        return _compiled(_apply, self.text_encoder_2)(t5_ids), pooled

    def initial_noise(self, key: jax.Array, batch: int, height: int, width: int) -> jax.Array:
        """Return standard normal packed latents, float32 [batch, tokens, channels]."""
        shape = (self._image_tokens(height, width), self.transformer.config.in_channels)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
        return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)

    def denoise(
        self,
        latents: jax.Array,  # [batch, tokens, channels]: noise
        embeds: jax.Array,  # [batch, text tokens, channels]
        pooled: jax.Array,  # [batch, channels]
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        true_cfg_scale: float = 1.0,
        negative: tuple[jax.Array, jax.Array] | None = None,
        progress: bool = True,
    ) -> jax.Array:
        """Return the latents after all steps, float32 [batch, tokens, channels].

        Args:
          latents: noise, as `initial_noise` gives it.
          embeds: from `encode_prompts`, like `pooled`.
          pooled: from `encode_prompts`.
          height: of the image in pixels.
          width: of the image in pixels.
          num_inference_steps: evaluations of the transformer.
          guidance_scale: None for models without guidance embedding.
          true_cfg_scale: used where `negative` is given.
          negative: embeds and pooled of the negative prompts, of the same shapes.
          progress: show a bar over the steps.
        """
        latents = jnp.asarray(latents, jnp.float32)
        if negative is not None:
            embeds = jnp.concatenate([embeds, negative[0]])
            pooled = jnp.concatenate([pooled, negative[1]])
        img_ids = image_ids(height // self.token_pixels, width // self.token_pixels)
        txt_ids = np.zeros((embeds.shape[1], 3), np.float32)
        guidance = None if guidance_scale is None else np.float32(guidance_scale)
        scale = None if negative is None else np.float32(true_cfg_scale)

        sigmas = self.scheduler.sigmas(num_inference_steps, latents.shape[1])
        step = _compiled(_denoising_step, self.transformer)
        levels = itertools.pairwise(sigmas)
        for sigma, next_sigma in tqdm(
            levels, total=num_inference_steps, disable=not progress, unit="step"
        ):
            latents = step(
                latents, embeds, pooled, img_ids, txt_ids, sigma, next_sigma, guidance, scale
            )
            latents.block_until_ready()  # the bar shows finished steps
        return latents

    def decode(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        """Return images, float32 [batch, height, width, 3] in 0..1, from packed latents.

        One image at a time: at 1024 pixels the decoder's activations take gigabytes.
        """
        rows, columns = height // self.token_pixels, width // self.token_pixels
        decode = _compiled(_decode, self.vae)
        return jnp.concatenate([decode(unpack(row[None], rows, columns)) for row in latents])

    def _image_tokens(self, height: int, width: int) -> int:
        return (height // self.token_pixels) * (width // self.token_pixels)

    def _guidance_scale(self, given: float | None) -> float | None:
        if self.transformer.config.guidance_embeds:
            return self.defaults.guidance_scale if given is None else given
        if given:
            raise ValueError(
                f"guidance_scale is {given}, but this model has no guidance embedding; "
                "leave it out, or use true_cfg_scale"
            )
        return None

    def _check(self, prompts, height, width, num_inference_steps, latents, output_type) -> None:
        if not prompts:
            raise ValueError("prompts is empty; give at least one text")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"prompts holds {prompt!r}; every prompt must be a string")
        multiple = max(_PIXEL_MULTIPLE, self.token_pixels)
        for name, pixels in {"height": height, "width": width}.items():
            if pixels < 1 or pixels % multiple:
                raise ValueError(
                    f"{name} is {pixels}; it must be a positive multiple of {multiple}"
                )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 or more")
        channels = self.transformer.config.in_channels
        wanted = (len(prompts), self._image_tokens(height, width), channels)
        if latents is not None and latents.shape != wanted:
            raise ValueError(f"latents has shape {latents.shape}; it must be {wanted}")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {_OUTPUT_TYPES}")


def image_ids(rows: int, columns: int) -> np.ndarray:
    """Return the position (0, row, column) of each latent token, float32 [rows * columns, 3]."""
    return np.stack(np.indices((1, rows, columns), np.float32), axis=-1).reshape(-1, 3)


def pack(
    latents: jax.Array,  # [batch, height, width, channels], height and width even
) -> jax.Array:
    """Return [batch, tokens, 4 channels]; a token's channels are ordered channel, row, column."""
    batch, height, width, channels = latents.shape
    x = latents.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, 4 * channels)


def unpack(
    latents: jax.Array,  # [batch, rows * columns, 4 channels]
    rows: int,
    columns: int,
) -> jax.Array:
    """Return [batch, 2 rows, 2 columns, channels]: the inverse of `pack`."""
    x = latents.reshape(latents.shape[0], rows, columns, -1, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(x.shape[0], 2 * rows, 2 * columns, -1)


def to_pil(image: np.ndarray) -> Image.Image:  # float32 [height, width, 3] in 0..1
    """Return an 8-bit image, rounded to nearest."""
    return Image.fromarray(np.round(255 * image).astype(np.uint8))


def _token_ids(tokenizer: Any, prompts: Sequence[str], longest: int) -> np.ndarray:
    length = min(tokenizer.model_max_length, longest)
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32)


def _compiled(function: Callable, module: nnx.Module) -> Callable:
    """Return `function(module, ...)` under jit, the weights an argument rather than constants."""
    graphdef, state = nnx.split(module)
    return functools.partial(_jitted(function, graphdef), state)


@functools.lru_cache(maxsize=16)
def _jitted(function: Callable, graphdef: nnx.GraphDef) -> Callable:
    return jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))


def _apply(module, *args):
    return module(*args)


def _denoising_step(
    transformer, latents, embeds, pooled, img_ids, txt_ids, sigma, next_sigma, guidance, scale
):
    """One Euler step; with a scale the text inputs hold the prompts, then the negative ones."""
    batch = embeds.shape[0]
    velocity = transformer(
        hidden_states=latents if scale is None else jnp.concatenate([latents, latents]),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=jnp.broadcast_to(sigma, batch),
        img_ids=img_ids,
        txt_ids=txt_ids,
        guidance=None if guidance is None else jnp.broadcast_to(guidance, batch),
    ).astype(jnp.float32)
    if scale is not None:
        positive, negative = jnp.split(velocity, 2)
        velocity = negative + scale * (positive - negative)
    return euler_step(latents, velocity, sigma, next_sigma)


def _decode(vae, latents):
    images = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0))
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
