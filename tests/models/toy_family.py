"""A family of its own: pictures of a class, by a transformer of two linears over latent pixels."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from models.checkpoint_io import config_from_json
from models.component import Component, Naming
from models.denoiser import Canvas, Denoiser
from models.family import Family, Schedule
from models.linear import Linear
from models.vae import AUTOENCODER_KL, AutoencoderKLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    in_channels: int = 4
    width: int = 32
    num_classes: int = 10  # one more stands for no class

    @classmethod
    def from_json(cls, values):
        return config_from_json(cls, values, {"_class_name": ("ToyTransformer",)})

    def to_json(self):
        return {"_class_name": "ToyTransformer", **dataclasses.asdict(self)}


class ToyTransformer(nnx.Module):
    def __init__(self, config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.labels = nnx.Embed(config.num_classes + 1, config.width, **options)
        self.up = Linear(config.in_channels, config.width, role="mlp_in", **options)
        self.down = Linear(config.width, config.in_channels, role="mlp_out", **options)

    def __call__(self, hidden_states, timestep, class_labels):
        condition = self.labels(class_labels) * timestep[:, None].astype(self.labels.dtype)
        return self.down(nnx.gelu(self.up(hidden_states) + condition[:, None, None]))


class ToyDenoiser(Denoiser):
    multiple = 16

    def canvas(self, height, width):
        shape = (height, width, self.configs["transformer"].in_channels)
        return Canvas(height=height, width=width, shape=shape, tokens=height * width)

    def check(self, inputs):
        super().check(inputs)
        for text in inputs.texts:
            if text and not (text.isdigit() and int(text) < self._no_class):
                raise ValueError(f"class {text!r} is out of range; give 0 to {self._no_class - 1}")

    def encode(self, sampler, texts):
        labels = [int(text) if text else self._no_class for text in texts]
        return {"class_labels": jnp.asarray(labels, jnp.int32)}

    def shapes(self, texts, tokens):
        return {"class_labels": jnp.zeros(texts, jnp.int32)}

    def inputs(self, latents, time, conditions, guidance):
        timestep = jnp.broadcast_to(time, latents.shape[:1])
        return {"hidden_states": latents, "timestep": timestep, **conditions}

    def encode_image(self, autoencoder, image, noise, canvas):
        return autoencoder.encode(image).mean

    def decode(self, autoencoder, latents, canvas):
        return autoencoder.decode(latents)

    @property
    def _no_class(self):
        return self.configs["transformer"].num_classes


def misfits(configs, tokenizers):
    transformer, vae = configs.get("transformer"), configs.get("vae")
    if transformer and vae and transformer.in_channels != vae.latent_channels:
        yield f"the transformer takes {transformer.in_channels} channels, not {vae.latent_channels}"


TRANSFORMER = Component(
    name="toy transformer",
    classes=("ToyTransformer",),
    library="diffusers",
    config=ToyConfig,
    module=ToyTransformer,
    folder=Naming(telling="labels.weight", rules=lambda config, names: ()),
)
TOY = Family(
    name="Toy",
    pipelines=("ToyPipeline",),
    components={"transformer": TRANSFORMER, "vae": AUTOENCODER_KL},
    tokenizers={},
    denoiser=ToyDenoiser,
    schedules={
        "toy": Schedule(
            name="the toy's",
            scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0},
            defaults={"num_inference_steps": 3, "height": 16, "width": 32, "true_cfg_scale": 2.0},
        )
    },
    schedule_of=lambda configs, index: ("toy", None),
    schedule_like=lambda scheduler, index: "toy",
    misfits=misfits,
    sizes={
        "toy": {
            "transformer": ToyConfig(),
            "vae": AutoencoderKLConfig(block_out_channels=(32,), latent_channels=4),
        }
    },
)
