"""Z-Image as a family: what its components are, how they fit, and how it is sampled."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.compiled import compiled
from models.denoiser import Canvas, Conditions
from models.family import AdapterNaming, Family, Schedule, Tokenizer
from models.fit import length_misfits, tokenizer_misfits
from models.planar import PlanarDenoiser, latent_misfits
from models.text_encoders.chat import QWEN_SPECIALS
from models.vae.config import AutoencoderKLConfig
from models.vae.params import AUTOENCODER_KL
from models.zimage.config import ZImageConfig
from models.zimage.modeling import padded
from models.zimage.params import TRANSFORMER, diffusers_rules, file_rules
from models.zimage.prompts import (
    LONGEST,
    TEMPLATE,
    TEXT_ENCODER,
    TextConfig,
    encode_tokens,
    text_tokens,
)

if TYPE_CHECKING:
    from models.sampler import Sampler


class ZImageDenoiser(PlanarDenoiser):
    """Latents of [channels, height, width], one text encoder, and a velocity's opposite."""

    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return text tokens [texts, tokens, channels], and how many of each count, int [texts]."""
        ids, mask = text_tokens(sampler.tokenizers["tokenizer"], texts)
        states = sampler.run("text_encoder", "encode prompts", ids, function=encode_tokens)
        return {"cap_feats": states, "cap_lengths": jnp.asarray(mask.sum(axis=1))}

    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives: texts of which all tokens count."""
        size = (texts, tokens, self.configs["transformer"].cap_feat_dim)
        return {"cap_feats": jax.ShapeDtypeStruct(size, jnp.float32)}

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return the texts, cut to what counts, and what the model's first blocks make of them."""
        texts = conditions["cap_feats"]
        rows, tokens = texts.shape[:2]
        lengths = conditions.get("cap_lengths", np.full(rows, tokens, np.int32))
        needed = padded(np.asarray(lengths))
        texts = texts[:, : needed.max()]
        context = compiled(_refine, model)(texts, lengths)
        # Where all texts are padded to the same, nothing need be masked.
        told = None if (needed == needed.max()).all() else lengths
        given = {"cap_feats": texts, "cap_lengths": lengths}  # not read beside the context
        return given | {"context": context, "context_lengths": told}

    def inputs(
        self,
        latents: jax.Array,
        time: jax.Array,
        conditions: Conditions,
        guidance: jax.Array | None,
    ) -> dict[str, Any]:
        """Return the arguments of ZImageTransformer's call."""
        return {
            "x": latents[:, :, None],
            "t": jnp.broadcast_to(1 - time, latents.shape[0]),
            **conditions,
        }

    def output(self, prediction: Any, latents: jax.Array) -> jax.Array:
        """Return the velocity."""
        return -prediction[:, :, 0].astype(jnp.float32)


def _refine(model: Any, cap_feats: jax.Array, cap_lengths: jax.Array) -> jax.Array:
    return model.prepare(cap_feats, cap_lengths)


def _schedule_of(configs: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[str, str | None]:
    if "scheduler" in configs:
        return _schedule_like(configs["scheduler"], index), None
    return "turbo", (
        "doesn't say whether it is distilled, so it is sampled as Z-Image-Turbo is, in 9 steps by "
        'default; say schedule "base" for Z-Image, which takes 50 steps and guidance'
    )


def _misfits(configs: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield why components of a Z-Image model don't fit, naming both sizes."""
    transformer, encoder = configs.get("transformer"), configs.get("text_encoder")
    yield from latent_misfits(configs)
    if transformer and encoder and transformer.cap_feat_dim != encoder.channels:
        yield (
            f"the transformer takes text tokens of {transformer.cap_feat_dim} channels, and "
            f"text_encoder gives {encoder.channels}"
        )
    yield from length_misfits(encoder, LONGEST)
    if encoder and "tokenizer" in tokenizers:
        yield from tokenizer_misfits("tokenizer", tokenizers["tokenizer"], encoder)
    if "tokenizer" in tokenizers:
        yield from TEMPLATE.misfits(tokenizers["tokenizer"])


def _scheduler(shift: float) -> dict[str, Any]:
    """Return the published scheduler_config.json."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
        "use_dynamic_shifting": False,
    }


_SHIFTS = {"turbo": 3.0, "base": 6.0}


def _schedule_like(scheduler: Any, index: Mapping[str, Any]) -> str:
    return "base" if scheduler.shift == _SHIFTS["base"] else "turbo"


_SIZES = {
    "text_encoder": TextConfig(  # Qwen3-4B
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=1e6,
        max_position_embeddings=40960,
    ),
    "vae": AutoencoderKLConfig(  # FLUX.1's
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "transformer": ZImageConfig(),
}
ZIMAGE = Family(
    name="Z-Image",
    pipelines=("ZImagePipeline",),
    components={"text_encoder": TEXT_ENCODER, "vae": AUTOENCODER_KL, "transformer": TRANSFORMER},
    tokenizers={
        "tokenizer": Tokenizer(kind="Qwen2TokenizerFast", length=131072, specials=QWEN_SPECIALS)
    },
    denoiser=ZImageDenoiser,
    schedules={
        "turbo": Schedule(
            name="Z-Image-Turbo's",
            scheduler=_scheduler(_SHIFTS["turbo"]),
            defaults={"num_inference_steps": 9},
        ),
        "base": Schedule(
            name="Z-Image's",
            scheduler=_scheduler(_SHIFTS["base"]),
            defaults={"num_inference_steps": 50, "true_cfg_scale": 5.0},
        ),
    },
    schedule_of=_schedule_of,
    schedule_like=_schedule_like,
    misfits=_misfits,
    adapters=(
        AdapterNaming(
            rules=diffusers_rules,
            prefixes=("", "transformer.", "base_model.model."),
            flat="lora_transformer_",
        ),
        # Trainers mix the names of diffusers and of single files.
        *(
            AdapterNaming(
                rules=rules,
                prefixes=("", "diffusion_model.", "base_model.model."),
                flat="lora_unet_",
            )
            for rules in (diffusers_rules, file_rules)
        ),
    ),
    sizes={"z_image": _SIZES, "z_image_turbo": _SIZES},
)
