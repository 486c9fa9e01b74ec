"""FLUX.1 as a family: what its components are, how they fit, and how it is sampled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.denoiser import Canvas, Conditions, Denoiser
from models.family import AdapterNaming, Family, Schedule, Tokenizer
from models.fit import picture_misfits, tokenizer_misfits
from models.flux.config import FluxConfig
from models.flux.latents import image_ids, pack, unpack
from models.flux.params import TRANSFORMER, bfl_rules, diffusers_rules
from models.text_encoders.clip import CLIP_TEXT, CLIPTextConfig
from models.text_encoders.t5 import T5_ENCODER, T5_XXL
from models.tokenizers import padded_tokens
from models.vae.config import AutoencoderKLConfig
from models.vae.params import AUTOENCODER_KL

if TYPE_CHECKING:
    from models.sampler import Sampler

_MAX_T5_TOKENS = 512  # FLUX.1 was trained with up to this many (schnell: 256)
_PIXEL_MULTIPLE = 16  # of width and height


class FluxDenoiser(Denoiser):
    """Packed latents of [tokens, channels], two text encoders, and a velocity."""

    @property
    def token_pixels(self) -> int:
        """Image pixels along one side of a latent token."""
        return 2 * self.configs["vae"].downsampling

    @property
    def multiple(self) -> int:
        """What height and width must be multiples of, in pixels."""
        return max(_PIXEL_MULTIPLE, self.token_pixels)

    @property
    def guided(self) -> bool:
        """Whether the transformer has a guidance embedding."""
        return self.configs["transformer"].guidance_embeds

    def canvas(self, height: int, width: int) -> Canvas:
        """Return the size of an image's packed latents."""
        rows, columns = self._grid(height, width)
        shape = (rows * columns, self.configs["transformer"].token_channels)
        return Canvas(height=height, width=width, shape=shape, tokens=rows * columns)

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return T5's tokens [texts, tokens, channels] and CLIP's pooled [texts, channels].

        Texts are padded and truncated to the tokenizers' lengths, T5's to 512 at most; a warning
        says what is cut.
        """
        clip_length = self.configs["text_encoder"].max_position_embeddings
        clip_ids = padded_tokens(sampler.tokenizers["tokenizer"], texts, clip_length).ids
        t5_ids = padded_tokens(sampler.tokenizers["tokenizer_2"], texts, _MAX_T5_TOKENS).ids
        _, pooled = sampler.run("text_encoder", "encode prompts", clip_ids)
        embeds = sampler.run("text_encoder_2", "encode prompts", t5_ids)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives."""
        config = self.configs["transformer"]
        sizes = {
            "encoder_hidden_states": (texts, tokens, config.joint_attention_dim),
            "pooled_projections": (texts, config.pooled_projection_dim),
        }
        return {x: jax.ShapeDtypeStruct(size, jnp.float32) for x, size in sizes.items()}

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return the texts with the positions of all tokens."""
        text_tokens = conditions["encoder_hidden_states"].shape[1]
        ids = {"img_ids": image_ids(*self._grid(canvas.height, canvas.width))}
        return conditions | ids | {"txt_ids": np.zeros((text_tokens, 3), np.float32)}

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of FluxTransformer's call."""
        rows = latents.shape[0]
        return {
            "hidden_states": latents,
            "timestep": jnp.broadcast_to(time, rows),
            "guidance": None if guidance is None else jnp.broadcast_to(guidance, rows),
            **conditions,
        }

    def encode_image(
        self, autoencoder: nnx.Module, image: jax.Array, noise: jax.Array, canvas: Canvas
    ) -> jax.Array:
        """Return packed latents, a draw from the distribution that the autoencoder gives."""
        vae: Any = autoencoder
        noise = unpack(noise, *self._grid(canvas.height, canvas.width))
        mean, logvar = (x.astype(jnp.float32) for x in vae.encode(image))
        latents = mean + jnp.exp(0.5 * logvar) * noise
        return pack(vae.normalize(latents))

    def decode(self, autoencoder: nnx.Module, latents: jax.Array, canvas: Canvas) -> jax.Array:
        """Return the image of packed latents."""
        vae: Any = autoencoder
        latents = unpack(latents, *self._grid(canvas.height, canvas.width))
        return vae.decode(vae.denormalize(latents))

    def _latents(self, sampler: "Sampler", pixels: np.ndarray) -> jax.Array:
        """Return the mean of an image's packed latents, float32 [1, tokens, channels]."""
        name = sampler.family.autoencoder
        return sampler.run(name, "encode images", pixels[None], function=_mean_latents)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of tokens."""
        return height // self.token_pixels, width // self.token_pixels


def _mean_latents(vae: Any, image: jax.Array) -> jax.Array:
    mean = vae.encode(image)[0].astype(jnp.float32)
    return pack(vae.normalize(mean))


def dev_scheduler(dev: bool = True) -> dict[str, Any]:
    """Return the published scheduler_config.json of FLUX.1-dev or else -schnell."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0 if dev else 1.0,
        "use_dynamic_shifting": dev,
    }


def _schedule_of(configs: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[str, str | None]:
    if configs["transformer"].guidance_embeds:
        return "dev", None
    return "schnell", (
        "has no guidance embedding, so it is sampled as FLUX.1-schnell is, in 4 steps by default; "
        "say so if it was made for another schedule (schedule)"
    )


def misfits(
    configs: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    given: Callable[[int], int] = lambda channels: channels,
) -> Iterator[str]:
    """Yield why components of a FLUX.1 model don't fit, naming both sizes.

    Args:
      configs: by component, as far as they are there.
      tokenizers: by name, as far as they are there.
      given: from the channels of a latent token to those that the transformer takes.
    """
    transformer, vae = configs.get("transformer"), configs.get("vae")
    clip, t5 = configs.get("text_encoder"), configs.get("text_encoder_2")
    if transformer and transformer.in_channels != given(transformer.token_channels):
        yield (
            f"the transformer takes {transformer.in_channels} channels a token and gives "
            f"{transformer.token_channels}, so it isn't for what model_index.json says (those of "
            "FLUX.1 Fill, Canny and Depth take an image beside the text)"
        )
    elif transformer and vae and transformer.token_channels != 4 * vae.latent_channels:
        yield (
            f"the transformer takes {transformer.token_channels} channels a token, and the "
            f"autoencoder gives {4 * vae.latent_channels}"
        )
    if transformer and t5 and transformer.joint_attention_dim != t5.d_model:
        yield (
            f"the transformer takes text tokens of {transformer.joint_attention_dim} channels, and "
            f"text_encoder_2 gives {t5.d_model}"
        )
    if transformer and clip and transformer.pooled_projection_dim != clip.hidden_size:
        yield (
            f"the transformer takes pooled text of {transformer.pooled_projection_dim} channels, "
            f"and text_encoder gives {clip.hidden_size}"
        )
    yield from picture_misfits(vae)
    for name, encoder in {"tokenizer": clip, "tokenizer_2": t5}.items():
        if encoder and name in tokenizers:
            yield from tokenizer_misfits(name, tokenizers[name], encoder)


def _sizes(dev: bool) -> dict[str, Any]:
    """Return what the config.json files of FLUX.1-dev or -schnell give."""
    return {
        # transformers takes eos_token_id 2 for "the highest id"
        "text_encoder": CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2
        ),
        "text_encoder_2": T5_XXL,
        "vae": AutoencoderKLConfig(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "transformer": FluxConfig(guidance_embeds=dev),
    }


FLUX = Family(
    name="FLUX.1",
    pipelines=("FluxPipeline",),
    components={
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": T5_ENCODER,
        "vae": AUTOENCODER_KL,
        "transformer": TRANSFORMER,
    },
    tokenizers={
        "tokenizer": Tokenizer(kind="CLIPTokenizer", length=77),
        "tokenizer_2": Tokenizer(kind="T5TokenizerFast", length=_MAX_T5_TOKENS),
    },
    denoiser=FluxDenoiser,
    schedules={
        "dev": Schedule(
            name="FLUX.1-dev's", scheduler=dev_scheduler(), defaults={"num_inference_steps": 28}
        ),
        "schnell": Schedule(
            name="FLUX.1-schnell's",
            scheduler=dev_scheduler(False),
            defaults={"num_inference_steps": 4},
        ),
    },
    schedule_of=_schedule_of,
    schedule_like=lambda scheduler, index: "dev" if scheduler.use_dynamic_shifting else "schnell",
    misfits=misfits,
    adapters=(
        AdapterNaming(
            rules=diffusers_rules,
            prefixes=("", "transformer.", "base_model.model."),
            flat="lora_transformer_",
        ),
        AdapterNaming(
            rules=lambda config: bfl_rules(),
            prefixes=("", "diffusion_model.", "base_model.model."),
            flat="lora_unet_",
        ),
    ),
    sizes={f"flux1-{name}": _sizes(dev=name == "dev") for name in ("dev", "schnell")},
)
