"""Schedulers of models that predict noise: DDIM, PNDM, DPM-Solver++, Euler and Euler ancestral.

A model was trained on `alpha * data + sigma * noise` at 1000 timesteps, with alpha**2 + sigma**2
= 1; `ratio` is sigma / alpha. Every step of these samplers is linear in the sample, the prediction,
what the last steps predicted and fresh noise, so `levels` works the factors out on the
host, in float64, and `step` is one sum. A learned variance, which some models predict behind the
noise, plays no part in any of them: the model's output is cut to the noise before `step`.
"""

import abc
import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoint_io import check_bounds, config_from_json

if TYPE_CHECKING:
    from models.schedulers import Level

_NO = (False, None)
_SUPPORTED = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": _NO,
    "thresholding": _NO,
    "use_karras_sigmas": _NO,
    "use_exponential_sigmas": _NO,
    "use_beta_sigmas": _NO,
}


# Of the new prediction and the last three, by the number of evaluations before (arXiv 2202.09778,
# equation 12); the second is of the first step, taken again.
_PLMS = (
    (1.0, 0.0, 0.0, 0.0),
    (1 / 2, 1 / 2, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class _Step(NamedTuple):
    """Factors of one step; what it predicts of the data is linear in sample and prediction too."""

    sample: float
    prediction: float
    memory: float = 0.0  # of the data that the last step predicted
    noise: float = 0.0
    data_sample: float = 0.0
    data_prediction: float = 0.0


class _Start(NamedTuple):
    """Factors of the sample that a step starts from, where it is the first."""

    alone: float  # of noise, where there is nothing else
    data: float  # of given data
    noise: float  # of the noise that is added to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseScheduler(abc.ABC):
    """What the schedulers share; the field names are those of diffusers."""

    stochastic: ClassVar[bool] = False
    along: ClassVar[str] = "noise"
    remembers: ClassVar[bool] = False  # whether a step needs what the last one predicted
    class_name: ClassVar[str]  # in diffusers
    supported: ClassVar[Mapping[str, tuple]] = _SUPPORTED
    fixed: ClassVar[Mapping[str, Any]] = {}  # what is written besides the fields

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001  # variance of the noise that the first timestep adds
    beta_end: float = 0.02  # that of the last
    beta_schedule: str = "linear"  # or "scaled_linear", of deviations; "squaredcos_cap_v2"
    prediction_type: str = "epsilon"  # the noise; or "v_prediction" (arXiv 2202.00512)
    timestep_spacing: str = "linspace"  # or "leading", "trailing" (arXiv 2305.08891, table 2)
    steps_offset: int = 0  # added to timesteps with "leading"

    def __post_init__(self):
        check_bounds(self, num_train_timesteps=(1, 10**6), steps_offset=(0, 1000))
        check_bounds(self, beta_start=(1e-12, 0.999), beta_end=(1e-12, 0.999))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from a parsed scheduler_config.json; CheckpointError on an unsupported option."""
        return config_from_json(cls, values, {"_class_name": (cls.class_name,), **cls.supported})

    def to_json(self) -> dict[str, Any]:
        """Return the scheduler_config.json that diffusers reads."""
        return {"_class_name": self.class_name, **self.fixed, **dataclasses.asdict(self)}

    def levels(
        self, num_inference_steps: int, tokens: int, strength: float = 1.0, mu: float | None = None
    ) -> "list[Level]":
        """Return each step's timestep ("time") and factors ("step", "start"), float32.

        Args:
          num_inference_steps: at a strength of 1.
          tokens: unused: these schedules are the same for every size.
          strength: the share of the steps that is kept, the last ones, rounded down as diffusers'
            pipelines of these models do it, but one at least.
          mu: unused.

        Raises:
          ValueError: num_inference_steps is below 1 or above the timesteps that were trained.
        """
        if not 1 <= num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; it must be 1 to "
                f"{self.num_train_timesteps}"
            )
        times = self._times(num_inference_steps)
        kept = max(1, int(num_inference_steps * strength))
        found = zip(times, self._steps(times), self._starts(times), strict=True)
        return [
            {"time": np.float32(time), "step": np.float32(step), "start": np.float32(start)}
            for time, step, start in found
        ][-kept:]

    def start(self, noise: jax.Array, level: "Level", data: jax.Array | None = None) -> jax.Array:
        """Return the sample at the first level, float32: noise alone, or data with noise added."""
        factors = _Start(*level["start"])
        return (
            factors.alone * noise if data is None else factors.data * data + factors.noise * noise
        )

    def memory(self, sample: jax.Array) -> jax.Array | None:
        """Return what the first step takes for the last one's prediction, and makes nothing of."""
        return jnp.zeros_like(sample) if self.remembers else None

    def scale(self, sample: jax.Array, level: "Level") -> jax.Array:
        """Return what the model sees of a sample."""
        return sample

    def step(
        self,
        sample: jax.Array,  # float32, any shape
        prediction: jax.Array,  # of the same shape, like memory and noise
        level: "Level",
        memory: jax.Array | None,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the sample at the next level, and what this step predicted of the data."""
        factors = _Step(*level["step"])
        result = factors.sample * sample + factors.prediction * prediction
        if self.stochastic:
            result = result + factors.noise * noise
        if not self.remembers:
            return result, None
        data = factors.data_sample * sample + factors.data_prediction * prediction
        return result + factors.memory * memory, data

    def alphas(self) -> np.ndarray:
        """Return alpha**2 at each trained timestep, float64 (arXiv 2006.11239, equation 4)."""
        count, ends = self.num_train_timesteps, np.array([self.beta_start, self.beta_end])
        if self.beta_schedule == "linear":
            betas = np.linspace(*ends, count)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(*np.sqrt(ends), count) ** 2
        else:  # arXiv 2102.09672, equation 17
            at = (np.arange(count + 1) / count + 0.008) / 1.008
            level = np.cos(at * np.pi / 2) ** 2
            betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
        # Models were trained with float32 betas, of which 1 - 0.999 keeps only 14 bits.
        return np.cumprod(1 - betas.astype(np.float32), dtype=np.float64)

    def _times(self, count: int) -> np.ndarray:
        """Return the timesteps of so many steps, the noisiest first, float64."""
        trained = self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            return self._spread(count)
        if self.timestep_spacing == "leading":
            return np.arange(count)[::-1] * (trained // self._parts(count)) + self.steps_offset
        return np.round(trained - np.arange(count) * (trained / count)) - 1

    def _check_trained(self, times: np.ndarray) -> None:
        """Raise ValueError where steps begin behind the last trained timestep, as offsets can."""
        if times[0] >= self.num_train_timesteps:
            raise ValueError(
                f"{len(times)} steps would begin at timestep {times[0]:.0f} of "
                f"{self.num_train_timesteps}; take fewer"
            )

    def _spread(self, count: int) -> np.ndarray:
        """Return timesteps over the whole range."""
        return np.linspace(0, self.num_train_timesteps - 1, count).round()[::-1]

    def _parts(self, count: int) -> int:
        """Return how many parts "leading" makes of the range."""
        return count

    def _ratios(self, times: np.ndarray) -> np.ndarray:
        """Return noise over data at timesteps, which may lie between two trained ones."""
        alphas = self.alphas()
        return np.interp(times, np.arange(len(alphas)), np.sqrt(1 / alphas - 1))

    @abc.abstractmethod
    def _steps(self, times: np.ndarray) -> list[_Step]:
        """Return the factors of each step."""

    def _starts(self, times: np.ndarray) -> list[_Start]:
        """Return what each step would start from."""
        pairs = map(_unit, self._ratios(times))
        return [_Start(alone=1.0, data=alpha, noise=sigma) for alpha, sigma in pairs]


def _unit(ratio: float) -> tuple[float, float]:
    """Return alpha and sigma of a ratio of noise over data."""
    return 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)


def _data(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Return the factors of sample and prediction in the data that they tell."""
    return (1 / alpha, -sigma / alpha) if prediction_type == "epsilon" else (alpha, -sigma)


def _through(sample: float, data: float, predicted: tuple[float, float], **more: float) -> _Step:
    """Return the step `sample * x + data * predicted data`."""
    return _Step(
        sample + data * predicted[0],
        data * predicted[1],
        data_sample=predicted[0],
        data_prediction=predicted[1],
        **more,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMScheduler(NoiseScheduler):
    """Denoising diffusion implicit models without fresh noise (arXiv 2010.02502, equation 12)."""

    class_name: ClassVar[str] = "DDIMScheduler"
    supported: ClassVar[Mapping[str, tuple]] = {**_SUPPORTED, "clip_sample": _NO}
    fixed: ClassVar[Mapping[str, Any]] = {"clip_sample": False}

    timestep_spacing: str = "leading"
    set_alpha_to_one: bool = True  # of the last step's result; else that of the first timestep

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from a parsed scheduler_config.json; CheckpointError on an unsupported option."""
        return super().from_json({"clip_sample": True, **values})  # diffusers' default

    def _steps(self, times: np.ndarray) -> list[_Step]:
        alphas, trained = self.alphas(), self.num_train_timesteps
        last = 1.0 if self.set_alpha_to_one else alphas[0]
        self._check_trained(times)
        found = []
        for time in times.astype(int):
            then = time - trained // len(times)
            before, after = alphas[time], alphas[then] if then >= 0 else last
            kept = np.sqrt((1 - after) / (1 - before))
            predicted = _data(self.prediction_type, np.sqrt(before), np.sqrt(1 - before))
            found.append(_through(kept, np.sqrt(after) - kept * np.sqrt(before), predicted))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNDMScheduler(NoiseScheduler):
    """Linear multistep over four predictions of noise (arXiv 2202.09778, equation 12).

    The first step is taken twice, the second time along the mean of both predictions, so that there
    is one evaluation more than steps; later ones are of order 2 and 3 before they are of order 4.
    From given data it begins in the same way, where diffusers' pipelines take up in the middle.
    """

    class_name: ClassVar[str] = "PNDMScheduler"
    remembers: ClassVar[bool] = True
    supported: ClassVar[Mapping[str, tuple]] = {
        **_SUPPORTED,
        "skip_prk_steps": (True,),
        "timestep_spacing": ("leading",),
    }
    fixed: ClassVar[Mapping[str, Any]] = {"skip_prk_steps": True}

    timestep_spacing: str = "leading"
    set_alpha_to_one: bool = False  # of the last step's result; else that of the first timestep

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from a parsed scheduler_config.json; CheckpointError on an unsupported option."""
        return super().from_json({"skip_prk_steps": False, **values})  # diffusers' default

    def levels(
        self, num_inference_steps: int, tokens: int, strength: float = 1.0, mu: float | None = None
    ) -> "list[Level]":
        """Return each evaluation's timestep and factors, one more than steps if there are several.

        Beside "step": "blend", of the new prediction and of the last three, the latest first;
        "again", whether the sample before the last step is the one to go from.
        """
        found = super().levels(num_inference_steps, tokens, strength, mu)
        twice = [found[0], *found[1:2], *found[1:]]
        steps = [found[0], *found[:1], *found[1:]][: len(twice)]
        blends = [*_PLMS, *[_PLMS[-1]] * len(twice)]
        return [
            {**level, "step": step["step"], "blend": np.float32(blend), "again": np.bool_(i == 1)}
            for i, (level, step, blend) in enumerate(zip(twice, steps, blends, strict=False))
        ]

    def memory(self, sample: jax.Array) -> jax.Array:
        """Return room for three predictions and a sample, [batch, 4, ...]."""
        return jnp.zeros((len(sample), 4, *sample.shape[1:]), sample.dtype)

    def step(
        self,
        sample: jax.Array,  # float32 [batch, ...]
        prediction: jax.Array,  # of the same shape
        level: "Level",
        memory: jax.Array | None,  # [batch, 4, ...]
        noise: jax.Array | None,  # unused
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the sample at the next level, and what later steps look back on."""
        assert memory is not None
        kept, before = memory[:, :3], memory[:, 3]
        blend, factors, again = level["blend"], _Step(*level["step"]), level["again"]
        along = blend[0] * prediction + sum(blend[1 + i] * kept[:, i] for i in range(3))
        given = jnp.where(again, before, sample)
        latest = jnp.concatenate([prediction[:, None], kept[:, :2]], axis=1)
        kept = jnp.where(again, kept, latest)
        result = factors.sample * given + factors.prediction * along
        return result, jnp.concatenate([kept, sample[:, None]], axis=1)

    def _steps(self, times: np.ndarray) -> list[_Step]:
        """Return the factors from each timestep to the next (equation 11)."""
        alphas, trained = self.alphas(), self.num_train_timesteps
        self._check_trained(times)
        found = []
        for time in times.astype(int):
            then = time - trained // len(times)
            now = alphas[time]
            last = 1.0 if self.set_alpha_to_one else alphas[0]
            after = alphas[then] if then >= 0 else last
            down = now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after)
            sample, along = np.sqrt(after / now), -(after - now) / down
            if self.prediction_type == "v_prediction":
                sample, along = sample + along * np.sqrt(1 - now), along * np.sqrt(now)
            found.append(_Step(sample, along))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepScheduler(NoiseScheduler):
    """DPM-Solver++ of order 1 or 2 with the last prediction in memory (arXiv 2211.01095)."""

    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"
    remembers: ClassVar[bool] = True
    supported: ClassVar[Mapping[str, tuple]] = {
        **_SUPPORTED,
        "solver_order": (1, 2),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint", "heun"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "use_lu_lambdas": _NO,
        "use_flow_sigmas": _NO,
        "use_dynamic_shifting": _NO,
        "lambda_min_clipped": (float("-inf"),),
        "variance_type": (None,),
    }
    fixed: ClassVar[Mapping[str, Any]] = {"algorithm_type": "dpmsolver++"}

    solver_order: int = 2
    solver_type: str = "midpoint"  # or "heun"
    lower_order_final: bool = True  # the last of fewer than 15 steps is of order 1
    euler_at_final: bool = False  # the last step is of order 1
    final_sigmas_type: str = "zero"  # noise behind the last step; or "sigma_min", the first level's

    def _check_trained(self, times: np.ndarray) -> None:
        """Raise ValueError where steps begin behind the last trained timestep, as offsets can."""
        if times[0] >= self.num_train_timesteps:
            raise ValueError(
                f"{len(times)} steps would begin at timestep {times[0]:.0f} of "
                f"{self.num_train_timesteps}; take fewer"
            )

    def _spread(self, count: int) -> np.ndarray:
        return np.linspace(0, self.num_train_timesteps - 1, count + 1).round()[:0:-1]

    def _times(self, count: int) -> np.ndarray:
        times = super()._times(count)
        leading = self.timestep_spacing == "leading"  # which leaves the first part out
        return times + self.num_train_timesteps // (count + 1) if leading else times

    def _parts(self, count: int) -> int:
        return count + 1

    def _steps(self, times: np.ndarray) -> list[_Step]:
        last = 0.0 if self.final_sigmas_type == "zero" else self._ratios(np.zeros(1))[0]
        ratios = np.append(self._ratios(times), last)
        return [self._step(ratios, i) for i in range(len(times))]

    def _step(self, ratios: np.ndarray, i: int) -> _Step:
        now, then = ratios[i], ratios[i + 1]
        (alpha, sigma), (alpha_then, sigma_then) = _unit(now), _unit(then)
        predicted = _data(self.prediction_type, alpha, sigma)
        share = alpha_then * (1 - then / now)  # of the predicted data: alpha (1 - exp(-h))
        second = 0.0  # factor of (data - last data) / r0
        if self.solver_order == 2 and i > 0 and not self._is_lower(ratios, i):
            step = np.log(now / then)  # h, and r0 the last step over it
            second = share / 2 if self.solver_type == "midpoint" else alpha_then - share / step
            second /= np.log(ratios[i - 1] / now) / step
        return _through(sigma_then / sigma, share + second, predicted, memory=-second)

    def _is_lower(self, ratios: np.ndarray, i: int) -> bool:
        """Whether a step is the last and of order 1."""
        count = len(ratios) - 1
        few = self.lower_order_final and count < 15
        return i == count - 1 and (few or self.euler_at_final or ratios[-1] == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerDiscreteScheduler(NoiseScheduler):
    """Euler steps over samples `data + ratio * noise` (arXiv 2206.00364, algorithm 1)."""

    class_name: ClassVar[str] = "EulerDiscreteScheduler"
    supported: ClassVar[Mapping[str, tuple]] = {
        **_SUPPORTED,
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
        "sigma_min": (None,),
        "sigma_max": (None,),
    }

    def scale(self, sample: jax.Array, level: "Level") -> jax.Array:
        """Return the sample with the variance that the model was trained on."""
        return sample * level["scale"]

    def levels(
        self, num_inference_steps: int, tokens: int, strength: float = 1.0, mu: float | None = None
    ) -> "list[Level]":
        """Return each step's timestep and factors as the other schedulers do, and its "scale"."""
        found = super().levels(num_inference_steps, tokens, strength, mu)
        ratios = self._ratios(np.array([level["time"] for level in found], np.float64))
        return [
            {**level, "scale": np.float32(_unit(ratio)[0])}
            for level, ratio in zip(found, ratios, strict=True)
        ]

    def _check_trained(self, times: np.ndarray) -> None:
        """Raise ValueError where steps begin behind the last trained timestep, as offsets can."""
        if times[0] >= self.num_train_timesteps:
            raise ValueError(
                f"{len(times)} steps would begin at timestep {times[0]:.0f} of "
                f"{self.num_train_timesteps}; take fewer"
            )

    def _spread(self, count: int) -> np.ndarray:
        whole = np.linspace(0, self.num_train_timesteps - 1, count, dtype=np.float32)
        return whole[::-1].astype(np.float64)  # between two trained ones, as diffusers has it

    def _starts(self, times: np.ndarray) -> list[_Start]:
        ratios = self._ratios(times)
        whole = ratios if self.timestep_spacing != "leading" else np.hypot(1, ratios)
        return [_Start(alone, 1.0, ratio) for alone, ratio in zip(whole, ratios, strict=True)]

    def _steps(self, times: np.ndarray) -> list[_Step]:
        ratios = np.append(self._ratios(times), 0.0)
        return [self._step(now, then) for now, then in itertools.pairwise(ratios)]

    def _step(self, now: float, then: float) -> _Step:
        return self._euler(now, then)

    def _euler(self, now: float, then: float, noise: float = 0.0) -> _Step:
        """Return the step from one ratio to another."""
        alpha, sigma = _unit(now)
        of_sample, of_prediction = _data(self.prediction_type, alpha, sigma)
        predicted = (of_sample * alpha, of_prediction)  # the sample is the trained one over alpha
        return _through(then / now, 1 - then / now, predicted, noise=noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestralDiscreteScheduler(EulerDiscreteScheduler):
    """Euler steps that go too far, and fresh noise up to the next level (k-diffusion's)."""

    class_name: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    stochastic: ClassVar[bool] = True

    def _step(self, now: float, then: float) -> _Step:
        up = then * np.sqrt(1 - (then / now) ** 2)
        return self._euler(now, np.sqrt(then**2 - up**2), noise=up)


KINDS: tuple[type[NoiseScheduler], ...] = (
    DDIMScheduler,
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
)
