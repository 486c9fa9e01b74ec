"""Noise levels at which models are evaluated, and steps along what they predict."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from models import noise_schedulers
from models.checkpoint_io import CheckpointError, check_bounds, config_from_json

_NO = (False, None)
_TRAINED = 1000  # timesteps
_SUPPORTED = {
    "_class_name": ("FlowMatchEulerDiscreteScheduler",),
    "num_train_timesteps": (_TRAINED,),  # the transformers multiply by it themselves
    "time_shift_type": ("exponential", "linear"),
    "use_karras_sigmas": _NO,
    "use_exponential_sigmas": _NO,
    "use_beta_sigmas": _NO,
    "invert_sigmas": _NO,
    "stochastic_sampling": _NO,
}

# The scalars of one step, float32 or int32: "time", which the model is told, and a scheduler's own.
Level = dict[str, Any]


class Scheduler(Protocol):
    """What a sampler needs of a scheduler: a frozen dataclass, and pure functions over arrays.

    Samples are float32 [batch, ...], one an image, and never see each other.
    """

    stochastic: ClassVar[bool]  # whether `step` is given noise
    along: ClassVar[str]  # in words, what `step` goes along: "a velocity" or "noise"

    def to_json(self) -> dict[str, Any]:
        """Return the scheduler_config.json that diffusers reads."""

    def levels(
        self, num_inference_steps: int, tokens: int, strength: float = 1.0, mu: float | None = None
    ) -> list[Level]:
        """Return each step's scalars, on the host, the first step's first.

        Args:
          num_inference_steps: at a strength of 1.
          tokens: that the image has in the model.
          strength: the share of the steps that is kept, the last ones.
          mu: dynamic shift, where the family rather than the scheduler's config tells it.
        """

    def start(self, noise: jax.Array, level: Level, data: jax.Array | None = None) -> jax.Array:
        """Return the sample at the first level: noise alone, or data with noise added."""

    def memory(self, sample: jax.Array) -> Any:
        """Return what the first step gets as memory; None for a scheduler without."""

    def scale(self, sample: jax.Array, level: Level) -> jax.Array:
        """Return what the model sees of a sample; runs under jit, like `step`."""

    def step(
        self,
        sample: jax.Array,
        prediction: jax.Array,  # float32, of the sample's shape
        level: Level,
        memory: Any,
        noise: jax.Array | None,  # standard normal, of the sample's shape, if `stochastic`
    ) -> tuple[jax.Array, Any]:
        """Return the sample at the next level, and the memory for the next step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchEulerScheduler:
    """diffusers' FlowMatchEulerDiscreteScheduler as the FLUX pipeline uses it.

    A sample at noise level sigma is `(1 - sigma) * data + sigma * noise`, and the model predicts
    the velocity `noise - data`. Shifting spends more of the steps at high noise, the more so the
    more tokens an image has (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).
    """

    stochastic: ClassVar[bool] = False
    along: ClassVar[str] = "a velocity"

    shift: float = 1.0  # static shift, at least 1; unused with dynamic shifting
    use_dynamic_shifting: bool = False  # shift by the number of image tokens
    base_shift: float = 0.5  # dynamic shift mu at base_image_seq_len tokens
    max_shift: float = 1.15  # dynamic shift mu at max_image_seq_len tokens
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"  # or "linear": whether mu is the log of a shift or one
    shift_terminal: float | None = None  # stretch so that the last step starts at this sigma

    def __post_init__(self):
        check_bounds(self, shift=(1e-3, 1e3), base_shift=(-100, 100), max_shift=(-100, 100))
        check_bounds(self, shift_terminal=(0, 0.999))
        check_bounds(self, base_image_seq_len=(1, 2**31), max_image_seq_len=(1, 2**31))
        if self.base_image_seq_len == self.max_image_seq_len:
            raise CheckpointError(
                f"FlowMatchEulerScheduler: base_image_seq_len and max_image_seq_len are both "
                f"{self.max_image_seq_len}; a shift lies on the line between two lengths"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FlowMatchEulerScheduler":
        """Build from a parsed scheduler_config.json; CheckpointError on an unsupported option."""
        return config_from_json(cls, values, _SUPPORTED)

    def to_json(self) -> dict[str, Any]:
        """Return the scheduler_config.json that diffusers reads."""
        fixed = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": _TRAINED}
        return {**fixed, **dataclasses.asdict(self)}

    @property
    def smallest(self) -> float:
        """The level of the first trained timestep, which some families' steps end with.

        A static shift is in it already, and moves it once more with the steps
        (`FlowMatchEulerDiscreteScheduler.sigma_min` of diffusers).
        """
        shift = 1.0 if self.use_dynamic_shifting else self.shift
        return shift / (_TRAINED + shift - 1)

    def levels(
        self,
        num_inference_steps: int,
        tokens: int,
        strength: float = 1.0,
        mu: float | None = None,
        last: float | None = None,
    ) -> list[Level]:
        """Return noise level ("time") and the next one ("next") of each step; see `sigmas`."""
        sigmas = self.sigmas(num_inference_steps, tokens, strength, mu, last)
        return [{"time": now, "next": then} for now, then in itertools.pairwise(sigmas)]

    def start(self, noise: jax.Array, level: Level, data: jax.Array | None = None) -> jax.Array:
        """Return noise, or data at the first noise level."""
        return noise if data is None else add_noise(data, noise, level["time"])

    def memory(self, sample: jax.Array) -> None:
        """Return None: a step needs nothing of the last."""

    def scale(self, sample: jax.Array, level: Level) -> jax.Array:
        """Return the sample as it is."""
        return sample

    def step(
        self,
        sample: jax.Array,  # float32, any shape
        prediction: jax.Array,  # the velocity, of the same shape
        level: Level,
        memory: None,
        noise: None,
    ) -> tuple[jax.Array, None]:
        """Return the sample at the next noise level."""
        return euler_step(sample, prediction, level["time"], level["next"]), None

    def sigmas(
        self,
        num_inference_steps: int,
        image_tokens: int,
        strength: float = 1.0,
        mu: float | None = None,
        last: float | None = None,
    ) -> np.ndarray:
        """Return the noise levels from 1 to 0, float32 [num_inference_steps + 1].

        Args:
          num_inference_steps: at a strength of 1.
          image_tokens: how many latent tokens the image has.
          strength: the share of the steps that is kept, the last ones, rounded up to whole steps;
            for image to image, which starts at the first level that is kept.
          mu: dynamic shift; None for the one on the line between the config's two lengths.
          last: level before the shift that the last step starts at; None for 1 over the steps.

        Raises:
          ValueError: num_inference_steps is below 1.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 or more")
        last = 1 / num_inference_steps if last is None else last
        sigmas = np.linspace(1, last, num_inference_steps)
        shift = self._dynamic_shift(image_tokens, mu) if self.use_dynamic_shifting else self.shift
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        if self.shift_terminal and num_inference_steps > 1:  # one step has nothing to stretch
            sigmas = 1 - (1 - sigmas) * (1 - self.shift_terminal) / (1 - sigmas[-1])
        skipped = int(num_inference_steps - num_inference_steps * strength)
        skipped = min(skipped, num_inference_steps - 1)  # one too small to count leaves a step
        return np.append(sigmas, 0).astype(np.float32)[skipped:]

    def _dynamic_shift(self, image_tokens: int, mu: float | None) -> float:
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        if mu is None:
            mu = self.base_shift + slope * (image_tokens - self.base_image_seq_len)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu


def add_noise(
    data: jax.Array,  # float32, any shape
    noise: jax.Array,  # the same shape
    sigma: jax.Array,  # float32 scalar
) -> jax.Array:
    """Return a sample at noise level sigma, float32."""
    return sigma * noise + (1 - sigma) * data


def euler_step(
    sample: jax.Array,  # float32, any shape, at noise level sigma
    velocity: jax.Array,  # the same shape
    sigma: jax.Array,  # float32 scalar
    next_sigma: jax.Array,  # float32 scalar
) -> jax.Array:
    """Return the sample at noise level next_sigma, float32."""
    return sample + (next_sigma - sigma) * velocity.astype(sample.dtype)


SCHEDULERS: dict[str, Any] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerScheduler,
    **{kind.class_name: kind for kind in noise_schedulers.KINDS},
}


def scheduler_from_json(values: Mapping[str, Any]) -> Scheduler:
    """Build a scheduler from a parsed scheduler_config.json, by its `_class_name`.

    Raises:
      CheckpointError: the class, or an option, isn't supported.
    """
    name = values.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if not isinstance(name, str) or name not in SCHEDULERS:
        known = ", ".join(map(repr, SCHEDULERS))
        raise CheckpointError(f"scheduler {name!r} is not supported; expected one of {known}")
    return SCHEDULERS[name].from_json(values)
