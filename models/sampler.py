"""Text and image to image with FLUX.1: encode prompts, denoise packed latents, decode images.

Latents are packed: a token holds a 2x2 patch of latent pixels. They stay float32 between steps,
whatever dtype the models compute in. Models may be deferred, so that one is loaded at a time.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

from models.flux.modeling import FluxTransformer
from models.schedulers import FlowMatchEulerScheduler, add_noise, euler_step
from models.stages import Deferred, StageTimes
from models.text_encoders.clip import CLIPTextEncoder
from models.text_encoders.t5 import T5Encoder
from models.vae.modeling import AutoencoderKL

_MAX_T5_TOKENS = 512  # FLUX.1 was trained with up to this many (schnell: 256)
_PIXEL_MULTIPLE = 16  # of width and height
LONGEST_SIDE = 8192  # pixels; positions and memory end long before
_LARGEST_SCALE = float(np.finfo(np.float32).max)
_SHOWN = 1000  # characters of what is cut from a prompt, at its start and its end, in a warning
# Pillow's modes that its conversion to RGB keeps whole: others are deeper, and clipped.
_SHALLOW = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
_OUTPUT_TYPES = ("pil", "np", "latent")
_ENCODER_STREAM = np.uint32(
    2**31
)  # of the key: the autoencoder's noise, apart from that of any image


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a pipeline call uses for arguments that are left out."""

    num_inference_steps: int = 28
    guidance_scale: float = 3.5  # only for models with guidance embedding
    true_cfg_scale: float = 1.0  # 1 is off
    strength: float = 0.6  # only with an initial image
    height: int = 1024  # pixels
    width: int = 1024  # pixels


@dataclasses.dataclass(kw_only=True)
class FluxPipeline:
    """A FLUX.1 model's components; any of them may be replaced by one with the same call.

    A model that is `Deferred` is loaded for each stage that needs it and released at its end.
    """

    transformer: FluxTransformer | Deferred
    text_encoder: CLIPTextEncoder | Deferred  # gives the pooled vector
    text_encoder_2: T5Encoder | Deferred  # gives the text tokens
    tokenizer: Any  # transformers' tokenizer for text_encoder
    tokenizer_2: Any  # transformers' tokenizer for text_encoder_2
    vae: AutoencoderKL | Deferred
    scheduler: FlowMatchEulerScheduler
    defaults: GenerationDefaults = GenerationDefaults()
    # of the stages "load <component>", "encode prompts", "encode images", "step" and "decode"
    times: StageTimes = dataclasses.field(default_factory=StageTimes)

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
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
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
          image: where to start, one for all prompts or one for each; resized to height and width.
          strength: how far the image is replaced, above 0 up to 1: the share of the steps, the last
            ones, that run. Only with an image.
          progress: show a bar over the steps.
          output_type: "pil" for PIL images, "np" for float32 [batch, height, width, 3] in 0..1,
            "latent" for packed latents, float32 [batch, tokens, channels].

        Raises:
          ValueError: an argument can't be used, and nothing has been computed then; or what a stage
            gives holds NaN or infinity, and the message names the stage.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        if num_inference_steps is None:
            num_inference_steps = self.defaults.num_inference_steps
        if true_cfg_scale is None:
            true_cfg_scale = self.defaults.true_cfg_scale
        if strength is None:
            strength = self.defaults.strength if image is not None else 1.0
        images = [image] * len(prompts) if isinstance(image, Image.Image) else image
        self._check([*prompts, negative_prompt], height, width, num_inference_steps)
        self._check_call(prompts, height, width, latents, output_type)
        _check_scales(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        self._check_image(images, strength, len(prompts))
        guidance_scale = self._guidance_scale(guidance_scale)

        key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
        if latents is None:
            latents = self.initial_noise(key, len(prompts), height, width)
        negative = None
        if true_cfg_scale != 1.0:
            encoded = self.encode_prompts([*prompts, negative_prompt])
            embeds, pooled = (x[:-1] for x in encoded)
            negative = tuple(x[-1:].repeat(len(prompts), axis=0) for x in encoded)
        else:
            embeds, pooled = self.encode_prompts(prompts)
        image_latents = None
        if images is not None:
            noise = self._noise(jax.random.fold_in(key, _ENCODER_STREAM), latents.shape)
            pixels = np.stack([to_pixels(image, height, width) for image in images])
            image_latents = self.encode_images(pixels, noise)
        latents = self.denoise(
            latents,
            embeds,
            pooled,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            negative=negative,
            image_latents=image_latents,
            strength=strength,
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

        Texts are padded and truncated to the tokenizers' lengths, T5's to 512 at most; a warning
        says what is cut.

        Raises:
          ValueError: an encoder gives NaN or infinity.
        """
        clip_length = self.text_encoder.config.max_position_embeddings
        clip_ids = _token_ids(self.tokenizer, prompts, clip_length)
        t5_ids = _token_ids(self.tokenizer_2, prompts, _MAX_T5_TOKENS)
        with self._loaded("text_encoder") as text_encoder, self.times.measure("encode prompts"):
            _, pooled = compiled(_apply, text_encoder)(clip_ids)
            pooled.block_until_ready()
        _check_finite("encode prompts", "the pooled text of text_encoder", pooled)
        del text_encoder  # before the larger one comes
        with self._loaded("text_encoder_2") as text_encoder_2, self.times.measure("encode prompts"):
            embeds = compiled(_apply, text_encoder_2)(t5_ids).block_until_ready()
        _check_finite("encode prompts", "the text tokens of text_encoder_2", embeds)
        return embeds, pooled

    def initial_noise(self, key: jax.Array, batch: int, height: int, width: int) -> jax.Array:
        """Return standard normal packed latents, float32 [batch, tokens, channels]."""
        channels = self.transformer.config.in_channels
        return self._noise(key, (batch, self._image_tokens(height, width), channels))

    def encode_images(
        self,
        images: np.ndarray,  # float32 [batch, height, width, 3] in -1..1
        noise: jax.Array,  # float32 [batch, tokens, channels], standard normal
    ) -> jax.Array:
        """Return packed latents of images, float32 [batch, tokens, channels].

        The autoencoder gives a distribution of latents; the noise picks the sample.
        """
        rows, columns = (pixels // self.token_pixels for pixels in images.shape[1:3])
        with self._loaded("vae") as vae, self.times.measure("encode images"):
            encode = compiled(_encode, vae)
            pairs = zip(images, unpack(noise, rows, columns), strict=True)
            latents = [encode(image[None], sample[None]) for image, sample in pairs]
            latents = pack(jnp.concatenate(latents)).block_until_ready()
        _check_finite("encode images", "the latents", latents)
        return latents

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
        image_latents: jax.Array | None = None,
        strength: float = 1.0,
        progress: bool = True,
    ) -> jax.Array:
        """Return the latents after all steps, float32 [batch, tokens, channels].

        Args:
          latents: noise, as `initial_noise` gives it.
          embeds: from `encode_prompts`, like `pooled`.
          pooled: from `encode_prompts`.
          height: of the image in pixels.
          width: of the image in pixels.
          num_inference_steps: evaluations of the transformer at a strength of 1.
          guidance_scale: None for models without guidance embedding.
          true_cfg_scale: used where `negative` is given.
          negative: embeds and pooled of the negative prompts, of the same shapes.
          image_latents: start from these with noise added, as `encode_images` gives them.
          strength: the share of the steps, the last ones, that run; 1 starts from noise alone.
          progress: show a bar over the steps.

        Raises:
          ValueError: a step gives NaN or infinity; no further one runs.
        """
        latents = jnp.asarray(latents, jnp.float32)
        if negative is not None:
            embeds = jnp.concatenate([embeds, negative[0]])
            pooled = jnp.concatenate([pooled, negative[1]])
        sigmas = self.scheduler.sigmas(num_inference_steps, latents.shape[1], strength)
        if image_latents is not None:
            latents = add_noise(image_latents, latents, sigmas[0])
        img_ids = image_ids(height // self.token_pixels, width // self.token_pixels)
        txt_ids = np.zeros((embeds.shape[1], 3), np.float32)
        fixed = (embeds, pooled, img_ids, txt_ids)
        guidance = None if guidance_scale is None else np.float32(guidance_scale)
        scale = None if negative is None else np.float32(true_cfg_scale)

        with (
            self._loaded("transformer") as transformer,
            tqdm(total=len(sigmas) - 1, disable=not progress, unit="step") as bar,
        ):
            step, start = compiled(denoising_step, transformer), time.perf_counter()
            # A step's result is committed to the weights' device if they are. Latents that aren't
            # would be another program's.
            latents, *fixed = jax.device_put((latents, *fixed), _device(transformer))
            for done, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
                last, latents = latents, step(latents, *fixed, sigma, next_sigma, guidance, scale)
                if done:  # the next step is queued before the last one is waited for
                    start = self._finish_step(done, last, start, bar)
            self._finish_step(len(sigmas) - 1, latents, start, bar)
        return latents

    def _finish_step(self, number: int, latents: jax.Array, start: float, bar: tqdm) -> float:
        """Wait for a step, show, record and check it; returns the time."""
        latents.block_until_ready()
        now = time.perf_counter()
        self.times.add("step", now - start)
        bar.update()
        _check_finite("denoise", f"the latents after step {number}", latents)
        return now

    def decode(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        """Return images, float32 [batch, height, width, 3] in 0..1, from packed latents.

        One image at a time: at 1024 pixels the decoder's activations take gigabytes.

        Raises:
          ValueError: pixels are NaN or infinity.
        """
        rows, columns = height // self.token_pixels, width // self.token_pixels
        with self._loaded("vae") as vae, self.times.measure("decode"):
            decode = compiled(_decode, vae)
            images = [decode(unpack(row[None], rows, columns)) for row in latents]
            images = jnp.concatenate(images).block_until_ready()
        _check_finite("decode", "the pixels", images)
        return images

    def load(self) -> "FluxPipeline":
        """Return a copy that keeps all its models loaded."""
        loaded = {}
        for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
            with self._loaded(name) as loaded[name]:
                pass
        return dataclasses.replace(self, **loaded)

    @contextlib.contextmanager
    def _loaded(self, name: str) -> Iterator[nnx.Module]:
        """Give a model, loaded for the time being if it is deferred."""
        module = getattr(self, name)
        if isinstance(module, Deferred):
            with self.times.measure(f"load {name}"):
                # Modules hold themselves in cycles: the model of the last stage, and what loading
                # this one left behind, leave the device only when they are collected.
                gc.collect()
                module = module.load()
                gc.collect()
                jax.block_until_ready(jax.tree.leaves(nnx.state(module)))
        yield module

    def _noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return standard normal float32; what an image gets depends on its place in the batch."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
        return jax.vmap(lambda key: jax.random.normal(key, shape[1:], jnp.float32))(keys)

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

    def _check(self, texts, height, width, num_inference_steps) -> None:
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"prompts holds {text!r}; every prompt must be a string")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(
                    f"prompts holds {text!r}, which isn't valid Unicode; write it in UTF-8"
                )
        multiple = max(_PIXEL_MULTIPLE, self.token_pixels)
        for name, pixels in {"height": height, "width": width}.items():
            if pixels < 1 or pixels % multiple:
                raise ValueError(
                    f"{name} is {pixels}; it must be a positive multiple of {multiple}"
                )
            if pixels > LONGEST_SIDE:
                raise ValueError(f"{name} is {pixels}; it must be at most {LONGEST_SIDE}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 or more")

    def _check_call(self, prompts, height, width, latents, output_type) -> None:
        if not prompts:
            raise ValueError("prompts is empty; give at least one text")
        channels = self.transformer.config.in_channels
        wanted = (len(prompts), self._image_tokens(height, width), channels)
        if latents is not None and latents.shape != wanted:
            raise ValueError(f"latents has shape {latents.shape}; it must be {wanted}")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {_OUTPUT_TYPES}")

    def _check_image(
        self, images: Sequence[Image.Image] | None, strength: float, prompts: int
    ) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
        if images is None and strength != 1:
            raise ValueError(f"strength is {strength}, but there is no image to start from")
        if images is not None and len(images) != prompts:
            raise ValueError(f"image holds {len(images)}; give one, or one for each prompt")
        for image in images or ():
            _check_mode(image)


def _check_scales(**scales: float | None) -> None:
    """Raise ValueError for a scale that float32 can't hold; None is left alone."""
    for name, scale in scales.items():
        if scale is not None and not abs(scale) <= _LARGEST_SCALE:
            raise ValueError(f"{name} is {scale}; it must be a finite number, also in float32")


def _check_mode(image: Image.Image) -> None:
    """Raise ValueError for an image that a plain conversion to RGB would change unseen."""
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        # What lies under transparent pixels is never seen, and would become the picture.
        if image.convert("RGBA").getextrema()[3][0] < 255:
            raise ValueError("image has transparent pixels; put it on a colour first")
    elif image.mode not in _SHALLOW:
        raise ValueError(
            f"image has mode {image.mode!r}, deeper than 8 bits; scale it to 8 bits a channel first"
        )


def _check_finite(stage: str, what: str, values: jax.Array) -> None:
    """Raise ValueError, naming the stage, if values hold NaN or infinity."""
    if not np.isfinite(np.asarray(values)).all():
        raise ValueError(
            f"{stage}: {what} hold NaN or infinity; a weight or a setting such as a guidance scale "
            "is out of range, and no picture can come of it"
        )


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


def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Return an image resized as diffusers does it, float32 [height, width, 3] in -1..1."""
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return 2 * (np.asarray(resized, np.float32) / 255) - 1


def to_pil(image: np.ndarray) -> Image.Image:  # float32 [height, width, 3] in 0..1
    """Return an 8-bit image, rounded to nearest."""
    return Image.fromarray(np.round(255 * image).astype(np.uint8))


def _token_ids(tokenizer: Any, prompts: Sequence[str], longest: int) -> np.ndarray:
    length = int(min(tokenizer.model_max_length, longest))
    _warn_of_cuts(tokenizer, prompts, length)
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32)


def _warn_of_cuts(tokenizer: Any, prompts: Sequence[str], length: int) -> None:
    """Warn of each prompt that has more tokens than are taken, with the words that are dropped."""
    whole = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    kept = length - tokenizer.num_special_tokens_to_add()
    for prompt, ids in zip(prompts, whole, strict=True):
        if len(ids) > kept:
            cut = tokenizer.decode(ids[kept:])
            cut = cut if len(cut) <= 2 * _SHOWN else f"{cut[:_SHOWN]} ... {cut[-_SHOWN:]}"
            warnings.warn(
                f"prompt {prompt[:40]!r} is too long: {type(tokenizer).__name__} takes {kept} "
                f"tokens of its {len(ids)}, and this was cut: {cut!r}",
                stacklevel=4,
            )


def compiled(function: Callable, module: nnx.Module) -> Callable:
    """Return `function(module, ...)` under jit, the weights an argument rather than constants.

    They go in as a flat list: walking the module's state at every call would cost milliseconds.
    """
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    return functools.partial(_jitted(function, graphdef, treedef), leaves)


@functools.lru_cache(maxsize=16)
def _jitted(function: Callable, graphdef: nnx.GraphDef, treedef: Any) -> Callable:
    def call(leaves, *args):
        return function(nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)), *args)

    return jax.jit(call)


def _device(module: nnx.Module) -> jax.sharding.Sharding | None:
    """Return where the weights are, or None if they are on several devices."""
    shardings = {leaf.sharding for leaf in jax.tree.leaves(nnx.state(module))}
    one = len(shardings) == 1 and len(next(iter(shardings)).device_set) == 1
    return shardings.pop() if one else None


def _apply(module, *args):
    return module(*args)


def denoising_step(
    transformer: FluxTransformer,
    latents: jax.Array,  # [batch, image tokens, channels], float32
    embeds: jax.Array,  # [batch, text tokens, channels]; with a scale twice the batch
    pooled: jax.Array,  # [batch, channels]; with a scale twice the batch
    img_ids: jax.Array,  # [image tokens, axes]
    txt_ids: jax.Array,  # [text tokens, axes]
    sigma: jax.Array,  # [], noise level, 1 (noise) to 0 (data)
    next_sigma: jax.Array,  # [], that of the result
    guidance: jax.Array | None,  # [], distilled guidance
    scale: jax.Array | None,  # [], of true classifier-free guidance
) -> jax.Array:
    """Return the latents after one Euler step, float32.

    With a scale the text inputs hold the prompts, then the negative ones.
    """
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


def _encode(vae, image, noise):
    mean, logvar = (x.astype(jnp.float32) for x in vae.encode(image))
    latents = mean + jnp.exp(0.5 * logvar) * noise
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def _decode(vae, latents):
    images = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0))
    images = images.astype(jnp.float32)
    # An infinite pixel is a fault like NaN: clipped, it would look like a bright one.
    return jnp.where(jnp.isfinite(images), jnp.clip(images / 2 + 0.5, 0, 1), jnp.nan)
