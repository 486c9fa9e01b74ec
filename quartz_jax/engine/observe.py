"""What the linears of a model get to see while it runs: a sample of rows, and channel maxima."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback

from quartz_jax.conversion.model import linears, replace_linears
from quartz_jax.engine.linear import modulate
from quartz_jax.io.files import atomic_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Inputs of one linear."""

    rows: np.ndarray  # float32 [calls, rows a call, k]: tokens, evenly spaced over each call's
    absmax: np.ndarray  # float32 [k]: over every token of every call

    @property
    def flat(self) -> np.ndarray:
        """All sampled rows, float32 [samples, k]."""
        return self.rows.reshape(-1, self.rows.shape[-1])


class _Recorder(nnx.Module):
    """A linear that hands its input to a callback, under jax.jit too."""

    def __init__(self, linear: nnx.Module, rows: int, seen: Callable):
        self.linear = linear
        self.rows = rows
        self.seen = seen

    def __call__(self, x: jax.Array | tuple, *, modulation=None, **rest) -> jax.Array:
        given = whole_input(x, modulation)
        flat = given.astype(jnp.float32).reshape(-1, given.shape[-1])
        picks = np.linspace(0, flat.shape[0] - 1, min(self.rows, flat.shape[0])).astype(int)
        largest = jnp.max(jnp.abs(flat), axis=0)
        io_callback(self.seen, None, flat[picks], largest, ordered=False)
        return self.linear(given, **rest)


def whole_input(
    x: jax.Array | tuple,  # [..., k], or parts of it, as `models.linear.Part` has them
    modulation: tuple[jax.Array, jax.Array] | None,  # shift and scale, [b, 1, k]
) -> jax.Array:
    """Return what a linear multiplies, [..., k]: parts joined, and normed if there's modulation."""
    if isinstance(x, tuple):
        x = jnp.concatenate([part.value() for part in x], axis=-1)
    return x if modulation is None else modulate(x, *modulation)


def record(
    model: nnx.Module,
    run: Callable[[nnx.Module], object],
    *,
    rows_per_call: int = 64,
) -> dict[str, LayerStatistics]:
    """Run a model and return what each of its linears was given, by path.

    Args:
      model: any NNX model with nnx.Linear layers; it isn't changed.
      run: calls a model that takes its place, any number of times, jitted or not.
      rows_per_call: tokens kept of each call of a linear, evenly spaced over batch and sequence.

    Raises:
      ValueError: a linear was never called; it is named.
    """
    found: dict[str, tuple[list, list]] = {path: ([], []) for path in linears(model)}

    def wrap(path: str, linear: nnx.Linear) -> nnx.Module:
        def seen(rows, largest):
            found[path][0].append(np.asarray(rows))
            found[path][1].append(np.asarray(largest))

        return _Recorder(linear, rows_per_call, seen)

    run(replace_linears(model, wrap))
    jax.effects_barrier()
    if idle := [path for path, (rows, _) in found.items() if not rows]:
        raise ValueError(f"no input was recorded for {', '.join(idle)}; the run must call them")
    return {
        path: LayerStatistics(rows=np.stack(rows), absmax=np.max(largest, axis=0))
        for path, (rows, largest) in found.items()
    }


def save_statistics(path: Path, statistics: dict[str, LayerStatistics]) -> None:
    """Write statistics as one .npz; the file appears complete or not at all."""
    arrays = {f"{name}/rows": s.rows for name, s in statistics.items()}
    arrays |= {f"{name}/absmax": s.absmax for name, s in statistics.items()}
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: Path) -> dict[str, LayerStatistics]:
    """Undo `save_statistics`.

    Raises:
      ValueError: the file isn't one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [key.removesuffix("/rows") for key in file if key.endswith("/rows")]
            return {
                name: LayerStatistics(rows=file[f"{name}/rows"], absmax=file[f"{name}/absmax"])
                for name in names
            }
    except (KeyError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no recorded statistics: {error}") from None
