"""What a family of models does between prompts and pixels; the rest is the `models.sampler`'s.

A `Denoiser` knows configs and no weights: models come as arguments, so that they may be deferred,
quantized or wrapped. It is frozen and compared by its configs, so that compiled programs are shared
by all samplers of the same sizes.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from PIL import Image

from models.schedulers import Level, Scheduler

if TYPE_CHECKING:
    from models.sampler import Sampler

# What doesn't depend on time, by name: arrays with a row for each text, or None.
Conditions = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canvas:
    """An image's size, and what its latents look like between two steps."""

    height: int  # pixels
    width: int  # pixels
    shape: tuple[int, ...]  # of one image's latents
    tokens: int  # that the image has in the model, for shifts of noise levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a call is given besides its numbers."""

    texts: Sequence[str]  # prompts, and the negative one last
    # that the model looks at, for all prompts: what an editing model edits, a sketch, a depth map
    references: Sequence[Image.Image] = ()
    mask: Image.Image | None = None  # of the reference; white is painted anew
    scales: Sequence[float] = ()  # how much each reference counts; () for 1


@dataclasses.dataclass(frozen=True)
class Denoiser(abc.ABC):
    """One family's way from prompts to pixels.

    The sampler calls, in this order: `check`, `canvas`; `encode` (texts to conditions), once for
    prompts and negative prompts together; `look` (reference images to conditions); `prepare`, with
    the main model loaded, for what its own weights make of the conditions once a call; `inputs` and
    `output` around the model in each step, under jit; `decode`, under jit, an image at a time.
    """

    scales_references: ClassVar[bool] = False  # whether references may count more or less

    configs: "Configs"  # of the components, by name, and what the family's index_configs gave

    @property
    @abc.abstractmethod
    def multiple(self) -> int:
        """What height and width must be multiples of, in pixels."""

    @property
    def guided(self) -> bool:
        """Whether the model takes a distilled guidance scale."""
        return False

    def check(self, inputs: Inputs) -> None:
        """Raise ValueError, before any work, for inputs that the family can't use."""
        if inputs.references:
            raise ValueError("references: this model looks at no image; leave them out")
        if inputs.mask is not None:
            raise ValueError("mask: this model takes none; leave it out")

    @abc.abstractmethod
    def canvas(self, height: int, width: int) -> Canvas:
        """Return what the latents of an image look like; sides are multiples of `multiple`."""

    @abc.abstractmethod
    def encode(self, sampler: "Sampler", texts: Sequence[str]) -> Conditions:
        """Return the conditions of texts, a row each.

        `sampler.run(component, stage, *args)` runs an encoder, and `sampler.tokenizers` are there.
        Texts are prompts, with guidance followed by the negative one; a family without text reads
        class labels from them.
        """

    @abc.abstractmethod
    def shapes(self, texts: int, tokens: int) -> Conditions:
        """Return shapes in place of what `encode` gives, for benchmarks and compiling ahead.

        Args:
          texts: rows.
          tokens: of each text; a family without text takes no notice.
        """

    def calibration_texts(self) -> Sequence[str]:
        """Return texts to calibrate on where none are given; () for those of any model of text."""
        return ()

    def look(
        self,
        sampler: "Sampler",
        inputs: Inputs,
        canvas: Canvas,
    ) -> Conditions:
        """Return conditions of reference images and a mask, one row; {} for none.

        They are repeated for every text, and put beside the texts' own. `sampler.run` runs the
        autoencoder, once an image.
        """
        return {}

    def levels(
        self, scheduler: Scheduler, num_inference_steps: int, canvas: Canvas, strength: float
    ) -> list[Level]:
        """Return each step's scalars, where the family tells a dynamic shift with it."""
        return scheduler.levels(num_inference_steps, canvas.tokens, strength)

    def prepare(self, model: nnx.Module, conditions: Conditions, canvas: Canvas) -> Conditions:
        """Return what `inputs` gets as conditions, made once a call: positions, refined text.

        Args:
          model: the main component, loaded.
          conditions: of all rows that one call of the model holds.
          canvas: of the images.
        """
        return conditions

    @abc.abstractmethod
    def inputs(
        self,
        latents: jax.Array,  # [rows, *canvas.shape], float32, as the scheduler scales them
        time: jax.Array,  # [], the scheduler's: a noise level from 1 to 0, or a timestep
        conditions: Conditions,  # of `prepare`
        guidance: jax.Array | None,  # [], distilled
    ) -> dict[str, Any]:
        """Return the keyword arguments of the model's call, diffusers' names; runs under jit."""

    def output(
        self,
        prediction: Any,  # what the model's call gives
        latents: jax.Array,  # as `inputs` got them
    ) -> jax.Array:
        """Return what the scheduler steps along, float32, of the latents' shape; runs under jit."""
        return prediction.astype(jnp.float32)

    def guide(
        self,
        positive: jax.Array,  # [batch, *canvas.shape], float32, for the prompts
        negative: jax.Array,  # the same, for the negative prompts
        scale: jax.Array,  # []
    ) -> jax.Array:
        """Return the prediction under classifier-free guidance (arXiv 2207.12598)."""
        return negative + scale * (positive - negative)

    @abc.abstractmethod
    def encode_image(
        self,
        autoencoder: nnx.Module,
        image: jax.Array,  # [1, height, width, 3], float32 in -1..1
        noise: jax.Array,  # [1, *canvas.shape], standard normal, for the autoencoder's draw
        canvas: Canvas,
    ) -> jax.Array:
        """Return latents to start from, float32 [1, *canvas.shape]; runs under jit."""

    @abc.abstractmethod
    def decode(
        self,
        autoencoder: nnx.Module,
        latents: jax.Array,  # [1, *canvas.shape], float32
        canvas: Canvas,
    ) -> jax.Array:
        """Return the image, [1, height, width, 3] around -1..1; runs under jit."""


class Configs(Mapping[str, Any]):
    """Configs of components by name: a mapping that can be hashed, as `jax.jit`'s keys must."""

    def __init__(self, configs: Mapping[str, Any]):
        self._items = tuple(sorted(configs.items()))

    def __getitem__(self, name: str) -> Any:
        """Return a component's config."""
        return dict(self._items)[name]

    def __iter__(self):
        """Yield the components' names."""
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        """Return how many components there are."""
        return len(self._items)

    def __hash__(self) -> int:
        """Return the same for equal configs."""
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        """Return whether all names and configs are the same."""
        return isinstance(other, Configs) and self._items == other._items
