"""What the linears and convolutions of a model get to see while it runs, gathered on the device."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import functions
from pallas_kernels.windows import Window
from quartz_jax.engine.surgery import replace_layers
from quartz_jax.io.files import atomic_file
from quartz_jax.recipes.sites import is_conv, sites, sizes, window_of
from quartz_jax.transforms.base import HIGHEST, Need, Seen

M = TypeVar("M", bound=nnx.Module)

ROWS = 8192  # tokens kept of all calls of a layer, for methods that ask for rows


class Statistic(nnx.Variable):
    """A sum, maximum or sample of what a layer was given."""


class Observed(nnx.Module):
    """A layer that gathers statistics of its inputs; nothing grows with the number of calls.

    Those of a convolution are of windows, as its weight [n, taps channels] multiplies them.
    """

    def __init__(
        self,
        linear: nnx.Linear | nnx.Conv,
        needs: Container[Need],
        calls: int,  # to come, at most
        rows: int,  # kept of each call, evenly spaced over its tokens; fewer if it has fewer
    ):
        _, k = sizes(linear)
        self.linear = linear
        self.window = window_of(linear) if is_conv(linear) else None
        self.calls = Statistic(jnp.int32(0))
        self.tokens = Statistic(jnp.float32(0))

        def zeros(need: Need, *shape: int) -> Statistic | None:
            return Statistic(jnp.zeros(shape)) if need in needs else None

        self.absmax, self.mean = zeros("absmax", k), zeros("mean", k)
        self.gram, self.rows = zeros("gram", k, k), zeros("rows", calls, rows, k)

    def __call__(self, x: jax.Array | tuple, *, norm: Any = None, **rest) -> jax.Array:
        """Do what the layer does, and take note of its input."""
        self._see(whole_input(x, norm, self.window))
        if norm is not None:
            rest["norm"] = norm
        linear: Callable[..., jax.Array] = self.linear  # subclasses take more than nnx.Linear
        return linear(x, **rest)

    def _see(self, given: jax.Array) -> None:
        flat = given.reshape(-1, given.shape[-1])
        wide = flat.astype(jnp.float32)
        if self.absmax is not None:
            largest = jnp.max(jnp.abs(wide), axis=0)
            self.absmax.set_value(jnp.maximum(self.absmax.get_value(), largest))
        if self.mean is not None:
            self.mean.set_value(self.mean.get_value() + jnp.sum(wide, axis=0))
        if self.gram is not None:
            # Products of 16-bit inputs are exact in float32, so that fast units may make them.
            product = jnp.matmul(
                flat.T, flat, precision=HIGHEST, preferred_element_type=jnp.float32
            )
            self.gram.set_value(self.gram.get_value() + product)
        if self.rows is not None:
            kept = self.rows.get_value()
            picks = np.linspace(0, len(flat) - 1, kept.shape[1]).astype(int)
            at = (self.calls.get_value(), 0, 0)
            self.rows.set_value(jax.lax.dynamic_update_slice(kept, wide[picks][None], at))
        self.calls.set_value(self.calls.get_value() + 1)
        self.tokens.set_value(self.tokens.get_value() + len(flat))

    def seen(self) -> Seen:
        """Return the statistics, on the device."""
        calls = int(self.calls.get_value())
        tokens = jnp.maximum(self.tokens.get_value(), 1)

        def value(name: str) -> jax.Array | None:
            variable = getattr(self, name)
            return None if variable is None else variable.get_value()

        rows, mean, gram = value("rows"), value("mean"), value("gram")
        return Seen(
            rows=None if rows is None else rows[:calls],
            absmax=value("absmax"),
            mean=None if mean is None else mean / tokens,
            gram=None if gram is None else gram / tokens,
        )


def whole_input(
    x: jax.Array | tuple,  # [..., k], or parts of it, as `models.linear.Part` has them
    norm: Any = None,  # as `models.linear.Norm` has it, of [k] or [b, 1, k]
    window: Window | None = None,  # of a convolution, whose x is [b, h, w, c]
) -> jax.Array:
    """Return what a layer multiplies, [..., k]: parts joined, normed and unfolded to windows."""
    if window is not None:
        assert not isinstance(x, tuple)
        return window.unfold(x)
    if isinstance(x, tuple):
        x = jnp.concatenate([part.value() for part in x], axis=-1)
    return x if norm is None else functions.modulate(x, functions.as_norm(norm))


def watch(
    model: M,
    needs: Mapping[str, frozenset[Need]],  # by path of a linear
    calls: int,  # of the model, at most
    rows: int = ROWS,
) -> M:
    """Return a copy of a model whose linears gather what is needed of them; shares its arrays."""
    per_call = max(1, rows // max(calls, 1))

    def observed(path: str, linear: nnx.Linear | nnx.Conv) -> nnx.Module:
        return Observed(linear, needs[path], calls, per_call)

    return replace_layers(model, observed, only=needs)


def statistics(model: nnx.Module) -> dict[str, Seen]:
    """Return what the linears of a watched model saw, by path."""
    return {
        ".".join(map(str, path)): module.seen()
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Observed)
    }


def observe(
    model: nnx.Module,
    samples: Iterable[Mapping[str, Any]],
    needs: Mapping[str, frozenset[Need]] | None = None,
    *,
    rows: int = ROWS,
    call: Callable[..., Any] | None = None,
) -> dict[str, Seen]:
    """Run a model on samples and return what its linears were given, by path.

    Args:
      model: any NNX model with nnx.Linear layers; it isn't changed.
      samples: keyword arguments of calls of the model, all of one shape to compile once.
      needs: statistics by path, as `Recipe.needs` gives them; None for rows and maxima of all
        linears.
      rows: tokens kept of a layer over all calls, for "rows".
      call: runs the model on a sample's arguments; None to call the model itself.

    Raises:
      ValueError: a linear was never called; it is named.
    """
    samples = list(samples)
    if needs is None:
        linears = (site.path for site in sites(model) if site.kind == "linear")
        needs = {path: frozenset({"rows", "absmax"}) for path in linears}
    watched = watch(model, needs, len(samples), rows)

    @nnx.jit
    def run(model: nnx.Module, sample: Mapping[str, Any]) -> None:
        (call or type(model).__call__)(model, **sample)

    for sample in samples:
        run(watched, sample)
    found = statistics(watched)
    idle = [
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(watched)
        if isinstance(module, Observed) and not int(module.calls.get_value())
    ]
    if idle:
        raise ValueError(f"no input was recorded for {', '.join(idle)}; the run must call them")
    return found


def save_statistics(path: Path, found: Mapping[str, Seen]) -> None:
    """Write statistics as one .npz; the file appears complete or not at all."""
    arrays: dict[str, Any] = {
        f"{name}/{field.name}": np.asarray(value)
        for name, seen in found.items()
        for field in dataclasses.fields(seen)
        if (value := getattr(seen, field.name)) is not None
    }
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: Path) -> dict[str, Seen]:
    """Undo `save_statistics`.

    Raises:
      ValueError: the file isn't one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            fields: dict[str, dict[str, Any]] = {}  # NumPy's arrays, until they are used
            for key in file:
                name, _, field = key.rpartition("/")
                fields.setdefault(name, {})[field] = file[key]
        return {name: Seen(**arrays) for name, arrays in fields.items()}
    except (KeyError, OSError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no recorded statistics: {error}") from None
