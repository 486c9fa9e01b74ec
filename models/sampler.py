"""From prompts to images with the models of any family, in stages, one model at a time if need be.

Latents stay float32 between steps, whatever dtype the models compute in. What differs from family
to family is its `Denoiser`'s.
"""

import contextlib
import dataclasses
import functools
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

from models.compiled import compiled, device_of
from models.denoiser import Canvas, Conditions, Configs, Denoiser, Inputs
from models.family import LONGEST_SIDE, Family, GenerationDefaults
from models.pictures import check_mode, to_pil, to_pixels
from models.schedulers import Level, Scheduler
from models.stages import Ahead, Deferred, StageTimes

_LARGEST_SCALE = float(np.finfo(np.float32).max)
_OUTPUT_TYPES = ("pil", "np", "latent")
# Of the key, apart from those of any image: for the autoencoder's noise, and for that of steps.
_ENCODER_STREAM = np.uint32(2**31)
_STEP_STREAM = np.uint32(2**31 + 1)


@dataclasses.dataclass(kw_only=True)
class Sampler:
    """A model's components; any of them may be replaced by one with the same call.

    A component that is `Deferred` is loaded for each stage that needs it and released at its end;
    where the device has room for several, a call loads what comes next while the last computes.
    Components and tokenizers are attributes too, by name: `sampler.transformer`.
    """

    family: Family
    models: Mapping[str, Any]  # nnx.Module or Deferred, by component
    tokenizers: Mapping[str, Any]  # of transformers, by name
    scheduler: Scheduler
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    # what model_index.json tells the denoiser, by name: see `Family.index_configs`
    index_configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only_size: tuple[int, int] | None = None  # width and height; None for a model of many sizes
    # classifier-free guidance as a batch of twice the rows, or as two calls, which take less memory
    guidance_in_two_calls: bool = False
    # of the stages "load <component>", "encode prompts", "encode images", "step" and "decode"
    times: StageTimes = dataclasses.field(default_factory=StageTimes)
    _ahead: Ahead | None = dataclasses.field(default=None, init=False, repr=False)  # in a call

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
        references: Image.Image | Sequence[Image.Image] = (),
        reference_scales: Sequence[float] = (),
        mask: Image.Image | None = None,
        progress: bool = True,
        output_type: str = "pil",
    ) -> list[Image.Image] | np.ndarray | jax.Array:
        """Return one image a prompt; the same arguments give the same bytes.

        Args:
          prompts: one or several texts.
          height: pixels, a multiple of 16. This and whatever else is None comes from `defaults`.
          width: pixels, a multiple of 16.
          num_inference_steps: evaluations of the model.
          guidance_scale: the distilled guidance; only for models with guidance embedding.
          true_cfg_scale: classifier-free guidance, at twice the work a step; 1 is off.
          negative_prompt: what true classifier-free guidance steers away from.
          seed: an integer or a JAX key. Image i's noise depends on it and on i, not on the batch
            size. On a CPU all of the image does, which is computed as if it were alone; other
            devices sum a batch in another order, see docs/numerics.md.
          latents: start from this noise instead, float32 as `initial_noise` returns it.
          image: where to start, one for all prompts or one for each; resized to height and width.
          strength: how far the image is replaced, above 0 up to 1: the share of the steps, the last
            ones, that run. Only with an image.
          references: what a model for editing, or with a sketch or a map beside the text, looks at.
          reference_scales: how much each of them counts, () for 1; only for models that scale them.
          mask: of the reference, white where it is painted anew; only for models that take one.
          progress: show a bar over the steps.
          output_type: "pil" for PIL images, "np" for float32 [batch, height, width, 3] in 0..1,
            "latent" for latents as the model has them, float32 [batch, ...].

        Raises:
          ValueError: an argument can't be used, and nothing has been computed then; or what a stage
            gives holds NaN or infinity, and the message names the stage.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        if num_inference_steps is None:
            num_inference_steps = self.defaults.num_inference_steps
        if true_cfg_scale is None:
            true_cfg_scale = self.defaults.true_cfg_scale
        if strength is None:
            strength = self.defaults.strength if image is not None else 1.0
        images = [image] * len(prompts) if isinstance(image, Image.Image) else image
        references = [references] if isinstance(references, Image.Image) else references
        inputs = Inputs(
            texts=[*prompts, negative_prompt],
            references=references,
            mask=mask,
            scales=reference_scales,
        )
        self._check(inputs, height, width, num_inference_steps)
        self._check_call(prompts, height, width, latents, output_type)
        _check_scales(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
        _check_image(images, strength, len(prompts))
        guidance_scale = self._guidance_scale(guidance_scale)
        canvas = self.canvas(height, width)
        # Raises for numbers of steps that a scheduler hasn't, which else would be found late.
        self.denoiser.levels(self.scheduler, num_inference_steps, canvas, strength)
        self._warn_of_size(width, height)

        with self._loading_ahead():
            key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
            if latents is None:
                latents = self.initial_noise(key, len(prompts), height, width)
            if true_cfg_scale != 1.0:
                encoded = self.encode_prompts([*prompts, negative_prompt])
                conditions = {name: x[:-1] for name, x in encoded.items()}
                negative = {
                    name: x[-1:].repeat(len(prompts), axis=0) for name, x in encoded.items()
                }
            else:
                conditions, negative = self.encode_prompts(prompts), None
            seen = self.denoiser.look(self, inputs, canvas)
            seen = {name: x.repeat(len(prompts), axis=0) for name, x in seen.items()}
            image_latents = None
            if images is not None:
                noise = _noise(jax.random.fold_in(key, _ENCODER_STREAM), latents.shape)
                pixels = np.stack([to_pixels(image, height, width) for image in images])
                image_latents = self.encode_images(pixels, noise)
            latents = self.denoise(
                latents,
                conditions | seen,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                negative=None if negative is None else negative | seen,
                image_latents=image_latents,
                strength=strength,
                key=jax.random.fold_in(key, _STEP_STREAM) if self.scheduler.stochastic else None,
                progress=progress,
            )
            if output_type == "latent":
                return latents
            pictures = np.asarray(self.decode(latents, height, width))
            return pictures if output_type == "np" else [to_pil(picture) for picture in pictures]

    def __getattr__(self, name: str) -> Any:
        """Return a component or tokenizer by its name."""
        for table in ("models", "tokenizers"):
            if name in self.__dict__.get(table, ()):
                return self.__dict__[table][name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace a component or tokenizer by its name, or set a field."""
        for table in ("models", "tokenizers"):
            if name in self.__dict__.get(table, ()):
                name, value = table, {**self.__dict__[table], name: value}
        super().__setattr__(name, value)

    @property
    def denoiser(self) -> Denoiser:
        """What the family does with models of these sizes."""
        configs = {name: x.config for name, x in self.models.items()}
        return self.family.denoiser(Configs({**self.index_configs, **configs}))

    def canvas(self, height: int, width: int) -> Canvas:
        """Return what an image's latents look like; sides in pixels."""
        return self.denoiser.canvas(height, width)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """Return what the encoders make of texts: arrays by name, a row for each text.

        Raises:
          ValueError: an encoder gives NaN or infinity.
        """
        return self.denoiser.encode(self, prompts)

    def initial_noise(self, key: jax.Array, batch: int, height: int, width: int) -> jax.Array:
        """Return standard normal latents, float32 [batch, ...]."""
        return _noise(key, (batch, *self.canvas(height, width).shape))

    def encode_images(
        self,
        images: np.ndarray,  # float32 [batch, height, width, 3] in -1..1
        noise: jax.Array,  # float32 [batch, ...], standard normal, of the latents' shape
    ) -> jax.Array:
        """Return latents of images, float32 [batch, ...].

        The autoencoder gives a distribution of latents; the noise picks the sample.
        """
        name, static = self.family.autoencoder, (self.denoiser, self.canvas(*images.shape[1:3]))
        with self.loaded(name) as autoencoder, self.times.measure("encode images"):
            encode = compiled(_encode, autoencoder, *static)
            pairs = zip(images, noise, strict=True)
            latents = [encode(image[None], sample[None]) for image, sample in pairs]
            latents = jnp.concatenate(latents).block_until_ready()
        _check_finite("encode images", "the latents", latents)
        return latents

    def denoise(
        self,
        noise: jax.Array,  # [batch, ...], as `initial_noise` gives it
        conditions: Conditions,
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        true_cfg_scale: float = 1.0,
        negative: Conditions | None = None,
        image_latents: jax.Array | None = None,
        strength: float = 1.0,
        key: jax.Array | None = None,
        progress: bool = True,
    ) -> jax.Array:
        """Return the latents after all steps, float32 of the noise's shape.

        Args:
          noise: standard normal.
          conditions: from `encode_prompts`, a row an image.
          height: of the image in pixels.
          width: of the image in pixels.
          num_inference_steps: evaluations of the model at a strength of 1.
          guidance_scale: None for models without guidance embedding.
          true_cfg_scale: used where `negative` is given.
          negative: of the negative prompts, of the same shapes.
          image_latents: start from these with noise added, as `encode_images` gives them.
          strength: the share of the steps, the last ones, that run; 1 starts from noise alone.
          key: of the steps' noise, for schedulers that add some.
          progress: show a bar over the steps.

        Raises:
          ValueError: a step gives NaN or infinity; no further one runs.
        """
        canvas = self.canvas(height, width)
        levels = self.denoiser.levels(self.scheduler, num_inference_steps, canvas, strength)
        noise = jnp.asarray(noise, jnp.float32)
        latents = self.scheduler.start(noise, levels[0], image_latents)
        with (
            self.steps(conditions, canvas, guidance_scale, negative, true_cfg_scale) as steps,
            tqdm(total=len(levels), disable=not progress, unit="step") as bar,
        ):
            start = time.perf_counter()
            # A step's result is committed to the weights' device if they are. Latents that aren't
            # would be another program's.
            latents, memory = steps.begin(latents)
            for done, level in enumerate(levels):
                last = latents
                drawn = None if key is None else _noise(jax.random.fold_in(key, done), last.shape)
                latents, memory = steps(last, memory, level, drawn)
                if done:  # the next step is queued before the last one is waited for
                    start = self._finish_step(done, last, start, bar)
            self._finish_step(len(levels), latents, start, bar)
        return latents

    @contextlib.contextmanager
    def steps(
        self,
        conditions: Conditions,
        canvas: Canvas,
        guidance_scale: float | None = None,
        negative: Conditions | None = None,
        true_cfg_scale: float = 1.0,
    ) -> Iterator["Steps"]:
        """Give what computes single steps, the model loaded for it; arguments as `denoise`'s."""
        calls = [conditions]
        if negative is not None and self.guidance_in_two_calls:
            calls = [conditions, negative]
        elif negative is not None:
            calls = [jax.tree.map(lambda *x: jnp.concatenate(x), conditions, negative)]
        with self.loaded(self.family.main) as model:
            device, images = device_of(model), _rows(conditions)

            def steps_of(calls: list[Conditions], alone: tuple[Steps, ...] = ()) -> Steps:
                prepared = [self.denoiser.prepare(model, rows, canvas) for rows in calls]
                return Steps(
                    model=model,
                    denoiser=self.denoiser,
                    scheduler=self.scheduler,
                    conditions=jax.device_put(prepared, device),
                    guidance=None if guidance_scale is None else np.float32(guidance_scale),
                    scale=None if negative is None else np.float32(true_cfg_scale),
                    device=device,
                    alone=alone,
                )

            each = range(images if images > 1 and _one_by_one(device) else 0)
            # of one call with guidance, an image's rows are its prompt's and its negative one's
            parts = (jax.tree.map(lambda x, i=i: x[i::images], calls) for i in each)
            yield steps_of(calls, tuple(steps_of(part) for part in parts))

    def _finish_step(self, number: int, latents: jax.Array, start: float, bar: tqdm) -> float:
        """Wait for a step, show, record and check it; returns the time."""
        latents.block_until_ready()
        now = time.perf_counter()
        self.times.add("step", now - start)
        bar.update()
        _check_finite("denoise", f"the latents after step {number}", latents)
        return now

    def decode(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        """Return images, float32 [batch, height, width, 3] in 0..1, from latents.

        One image at a time: at 1024 pixels the decoder's activations take gigabytes.

        Raises:
          ValueError: pixels are NaN or infinity.
        """
        name, static = self.family.autoencoder, (self.denoiser, self.canvas(height, width))
        with self.loaded(name) as autoencoder, self.times.measure("decode"):
            decode = compiled(_decode, autoencoder, *static)
            images = [decode(row[None]) for row in latents]
            images = jnp.concatenate(images).block_until_ready()
        _check_finite("decode", "the pixels", images)
        return images

    def run(self, name: str, stage: str, *args: Any, function: Callable | None = None) -> Any:
        """Return what a component makes of arguments, loaded for the time being if it is deferred.

        Args:
          name: of the component.
          stage: that its time is counted for, and that an error names.
          *args: arrays, a row for each text or image, as all results have.
          function: of a file's top level, called with the module and the arguments under jit; None
            for the module's own call.

        Raises:
          ValueError: the result holds NaN or infinity.
        """
        with self.loaded(name) as module, self.times.measure(stage):
            apply, rows = compiled(function or _apply, module), _rows(args)
            if rows > 1 and _one_by_one(device_of(module)):
                result = _joined([apply(*_row(args, i)) for i in range(rows)])
            else:
                result = apply(*args)
            jax.block_until_ready(result)
        del module  # before another one comes
        for values in jax.tree.leaves(result):
            _check_finite(stage, f"the results of {name}", values)
        return result

    def load(self) -> "Sampler":
        """Return a copy that keeps all its models loaded."""
        loaded = {}
        for name in self.models:
            with self.loaded(name) as loaded[name]:
                pass
        return self.replace(**loaded)

    def keep(self, *names: str) -> "Sampler":
        """Return a copy that keeps some models loaded."""
        loaded: dict[str, Any] = {}
        for name in names:
            if isinstance(self.models[name], Deferred):
                loaded[name] = self.models[name].load()
        return self.replace(**loaded)

    def replace(self, **models: Any) -> "Sampler":
        """Return a copy with other components, by name.

        Raises:
          ValueError: the family has no such component.
        """
        if unknown := sorted(set(models) - set(self.models)):
            known = ", ".join(self.models)
            raise ValueError(f"no component {', '.join(unknown)}; components are {known}")
        return dataclasses.replace(self, models={**self.models, **models})

    @contextlib.contextmanager
    def loaded(self, name: str) -> Iterator[nnx.Module]:
        """Give a model, loaded for the time being if it is deferred."""
        module = self.models[name]
        if isinstance(module, Deferred):
            with self.times.measure(f"load {name}"):
                # Modules hold themselves in cycles: the model of the last stage, and what loading
                # this one left behind, leave the device only when they are collected.
                gc.collect()
                ahead = self._ahead  # of another thread's call too, which may end it meanwhile
                found = None if ahead is None else ahead.take(name)
                module = module.load() if found is None else found
                del found
                gc.collect()
                jax.block_until_ready(jax.tree.leaves(nnx.state(module)))
        yield module

    @contextlib.contextmanager
    def _loading_ahead(self) -> Iterator[None]:
        """Load what a call uses in a thread, in that order, as far as the device has room."""
        order = (*self.family.encoders, self.family.main, self.family.autoencoder)
        ahead = Ahead({name: self.models[name] for name in order if name in self.models})
        self._ahead = ahead
        try:
            yield
        finally:
            self._ahead = None
            ahead.close()

    def _guidance_scale(self, given: float | None) -> float | None:
        if self.denoiser.guided:
            return self.defaults.guidance_scale if given is None else given
        if given:
            raise ValueError(
                f"guidance_scale is {given}, but this model has no guidance embedding; "
                "leave it out, or use true_cfg_scale"
            )
        return None

    def _check(self, inputs: Inputs, height: int, width: int, num_inference_steps: int) -> None:
        for text in inputs.texts:
            if not isinstance(text, str):
                raise ValueError(f"prompts holds {text!r}; every prompt must be a string")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(
                    f"prompts holds {text!r}, which isn't valid Unicode; write it in UTF-8"
                )
        multiple = self.denoiser.multiple
        for name, pixels in {"height": height, "width": width}.items():
            if pixels < 1 or pixels % multiple:
                raise ValueError(
                    f"{name} is {pixels}; it must be a positive multiple of {multiple}"
                )
            if pixels > LONGEST_SIDE:
                raise ValueError(f"{name} is {pixels}; it must be at most {LONGEST_SIDE}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 or more")
        for reference in inputs.references:
            check_mode(reference, "references")
        if inputs.mask is not None:
            check_mode(inputs.mask, "mask")
        self.denoiser.check(inputs)
        _check_reference_scales(inputs, self.denoiser.scales_references)

    def _warn_of_size(self, *asked: int) -> None:
        if self.only_size not in (None, asked):
            own, other = ("{}x{}".format(*size) for size in (self.only_size or (), asked))
            warnings.warn(
                f"this model draws {own}; of {other}, expect blurs and pieces", stacklevel=3
            )

    def _check_call(
        self,
        prompts: Sequence[str],
        height: int,
        width: int,
        latents: jax.Array | None,
        output_type: str,
    ) -> None:
        if not prompts:
            raise ValueError("prompts is empty; give at least one text")
        wanted = (len(prompts), *self.canvas(height, width).shape)
        if latents is not None and latents.shape != wanted:
            raise ValueError(f"latents has shape {latents.shape}; it must be {wanted}")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {_OUTPUT_TYPES}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """A loaded model, ready for single steps of images that are under way."""

    model: nnx.Module
    denoiser: Denoiser
    scheduler: Scheduler
    conditions: list[Conditions]  # of each call of the model; of one with guidance, twice the rows
    guidance: np.float32 | None  # distilled
    scale: np.float32 | None  # of classifier-free guidance
    device: jax.sharding.Sharding | None  # of the weights
    # of single images, where those are computed one by one; () where all are together
    alone: tuple["Steps", ...] = ()

    def __call__(
        self,
        latents: jax.Array,  # [batch, ...], float32
        memory: Any,  # as `begin` and the last step gave it
        level: Level,
        noise: jax.Array | None = None,  # [batch, ...]
    ) -> tuple[jax.Array, Any]:
        """Return the latents after a step, float32, and the scheduler's memory."""
        if self.alone:
            given = (_row((latents, noise), i) for i in range(len(self.alone)))
            each = zip(self.alone, given, memory, strict=True)
            made = [step(latent, kept, level, drawn) for step, (latent, drawn), kept in each]
            return _joined([latent for latent, _ in made]), tuple(kept for _, kept in made)
        return self._step(latents, memory, *self._fixed(level), noise)

    def begin(self, latents: jax.Array) -> tuple[jax.Array, Any]:
        """Return latents on the weights' device, and the scheduler's memory before any step."""
        if not self.alone:
            return self.put((latents, self.scheduler.memory(latents)))
        memory = tuple(step.begin(_row(latents, i))[1] for i, step in enumerate(self.alone))
        return self.put(latents), memory

    def predict(self, latents: jax.Array, level: Level) -> jax.Array:
        """Return what a step goes along, such as the velocity, float32 of the latents' shape."""
        if self.alone:
            made = (x.predict(_row(latents, i), level) for i, x in enumerate(self.alone))
            return _joined(list(made))
        return self._prediction(self.put(latents), *self._fixed(level))

    def arguments(self, latents: jax.Array, level: Level) -> dict[str, Any]:
        """Return the keyword arguments of the model's call in a step, without guidance."""
        (conditions,) = self.conditions
        seen = self.scheduler.scale(latents, level)
        guidance: Any = self.guidance
        return self.denoiser.inputs(seen, level["time"], conditions, guidance)

    def put(self, arrays: Any) -> Any:
        """Return a tree of arrays on the weights' device."""
        return jax.device_put(arrays, self.device)

    @functools.cached_property
    def _step(self) -> Callable:
        return compiled(denoising_step, self.model, self.denoiser, self.scheduler)

    @functools.cached_property
    def _prediction(self) -> Callable:
        return compiled(prediction, self.model, self.denoiser, self.scheduler)

    def _fixed(self, level: Level) -> tuple:
        return self.conditions, level, self.guidance, self.scale


def prediction(
    model: nnx.Module,
    denoiser: Denoiser,
    scheduler: Scheduler,
    latents: jax.Array,  # [batch, ...], float32
    conditions: list[Conditions],  # of one call of the model, or of two with guidance
    level: Level,
    guidance: jax.Array | None,  # [], distilled guidance
    scale: jax.Array | None,  # [], of classifier-free guidance
) -> jax.Array:
    """Return what a step goes along, float32 of the latents' shape.

    With a scale the conditions hold the prompts, then the negative ones.
    """
    seen = scheduler.scale(latents, level)
    if scale is not None and len(conditions) == 1:
        seen = jnp.concatenate([seen, seen])
    made = []
    for rows in conditions:
        call: Any = model
        given = denoiser.inputs(seen, level["time"], rows, guidance)
        made.append(denoiser.output(call(**given), seen))
    if scale is None:
        return made[0]
    positive, negative = made if len(made) == 2 else jnp.split(made[0], 2)
    return denoiser.guide(positive, negative, scale)


def denoising_step(
    model: nnx.Module,
    denoiser: Denoiser,
    scheduler: Scheduler,
    latents: jax.Array,  # [batch, ...], float32
    memory: Any,  # the scheduler's
    conditions: list[Conditions],  # as `prediction`'s, like level, guidance and scale
    level: Level,
    guidance: jax.Array | None,
    scale: jax.Array | None,
    noise: jax.Array | None,  # [batch, ...], for schedulers that add some
) -> tuple[jax.Array, Any]:
    """Return the latents after one step, float32, and the scheduler's memory."""
    made = prediction(model, denoiser, scheduler, latents, conditions, level, guidance, scale)
    return scheduler.step(latents, made, level, memory, noise)


def _one_by_one(device: jax.sharding.Sharding | None) -> bool:
    """Whether images are computed one by one: where a batch isn't faster, but sums otherwise."""
    return device is not None and all(x.platform == "cpu" for x in device.device_set)


def _rows(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _row(tree: Any, i: int) -> Any:
    """Return row i of every array of a tree, with its axis."""
    return jax.tree.map(lambda x: x[i : i + 1], tree)


def _joined(trees: Sequence[Any]) -> Any:
    """Undo `_row`."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *trees)


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return standard normal float32; what an image gets depends on its place in the batch."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:], jnp.float32))(keys)


def _check_scales(**scales: float | None) -> None:
    """Raise ValueError for a scale that float32 can't hold; None is left alone."""
    for name, scale in scales.items():
        if scale is not None and not abs(scale) <= _LARGEST_SCALE:
            raise ValueError(f"{name} is {scale}; it must be a finite number, also in float32")


def _check_reference_scales(inputs: Inputs, scalable: bool) -> None:
    """Raise ValueError for scales that the references can't have."""
    scales, count = inputs.scales, len(inputs.references)
    if scales and not scalable:
        raise ValueError("reference_scales: this model takes none; leave them out")
    if scales and len(scales) != count:
        raise ValueError(f"reference_scales holds {len(scales)}; give one a reference, {count}")
    _check_scales(**{f"reference_scales[{i}]": scale for i, scale in enumerate(scales)})


def _check_image(images: Sequence[Image.Image] | None, strength: float, prompts: int) -> None:
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
    if images is None and strength != 1:
        raise ValueError(f"strength is {strength}, but there is no image to start from")
    if images is not None and len(images) != prompts:
        raise ValueError(f"image holds {len(images)}; give one, or one for each prompt")
    for image in images or ():
        check_mode(image)


def _check_finite(stage: str, what: str, values: jax.Array) -> None:
    """Raise ValueError, naming the stage, if values hold NaN or infinity."""
    if not np.isfinite(np.asarray(values)).all():
        raise ValueError(
            f"{stage}: {what} hold NaN or infinity; a weight or a setting such as a guidance scale "
            "is out of range, and no picture can come of it"
        )


def _apply(module: Any, *args: Any) -> Any:
    return module(*args)


def _encode(autoencoder, denoiser, canvas, image, noise):
    return denoiser.encode_image(autoencoder, image, noise, canvas)


def _decode(autoencoder, denoiser, canvas, latents):
    images = denoiser.decode(autoencoder, latents, canvas).astype(jnp.float32)
    # An infinite pixel is a fault like NaN: clipped, it would look like a bright one.
    return jnp.where(jnp.isfinite(images), jnp.clip(images / 2 + 0.5, 0, 1), jnp.nan)
