"""Arrays on meshes with explicit axes, JAX's default: XLA splits the work, results keep the axes.

Codes are packed, and rows are cut into groups, in shapes that no sharding of k survives by rule. So
operations on such arrays run with automatic axes, where XLA moves what it must; integers and maxima
are the same in any order, so that the numbers are those of one device.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = tuple[Any, ...]  # of a PartitionSpec, one entry for each axis of an array


def axes_of(array: Any) -> Axes:
    """Return which mesh axes each axis of an array is sharded over explicitly; None where not."""
    if not isinstance(array, jax.Array):
        return (None,) * len(getattr(array, "shape", ()))
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def is_split(args: Any) -> bool:
    """Whether arrays, or what is traced, lie on a mesh of devices over which XLA splits them."""
    arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    meshes.append(jax.sharding.get_abstract_mesh())
    return any(
        kind != AxisType.Manual and mesh.shape[name] > 1
        for mesh in meshes
        if not mesh.empty
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )


@contextlib.contextmanager
def in_jax_defaults() -> Iterator[None]:
    """Trace without 64-bit types and with JAX's usual promotion, whatever the user has set.

    The number formats are defined in 32 bits; the dtypes of counters and constants would not be.
    """
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def _without_float64(leaf: Any) -> Any:
    """Return float64 arrays in float32, to which formats and products round what they are given."""
    wide = isinstance(leaf, jax.Array) and leaf.dtype == jnp.float64
    return leaf.astype(jnp.float32) if wide else leaf


def partitioned(
    run: Callable[..., Any],
    axes: Callable[[], Sequence[Any]],
    *args: Any,
) -> Any:
    """Return run(*args), in JAX's usual types, whose results keep explicit axes.

    Args:
      run: of arrays, to arrays.
      axes: returns the explicit axes that the results shall have, one entry for each of their own
        axes; entries that don't divide an axis, or come twice, are dropped. It is called only where
        an array has explicit axes.
      *args: pytrees of arrays: all that `run` depends on.
    """
    args = jax.tree.map(_without_float64, args)
    run = in_jax_defaults()(run)
    mesh = _explicit_mesh(args)
    if mesh is None:
        return run(*args)
    wanted = tuple(axes())
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        shapes = jax.eval_shape(run, *jax.tree.map(_unsharded, args))
    shardings = jax.tree.map(lambda leaf: _sharding(mesh, wanted, leaf.shape), shapes)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(run, axes=explicit, out_sharding=shardings)(*args)


def put_on(mesh: Any, axes: Axes, tree: Any) -> Any:
    """Return arrays on a mesh, sharded over axes where those divide them; () for all of each."""

    def put(array: jax.Array) -> jax.Array:
        wanted = axes or (None,) * array.ndim
        return jax.device_put(array, _sharding(mesh, wanted, array.shape))

    return jax.tree.map(put, tree)


def _explicit_mesh(args: Any) -> Any:
    """Return the mesh of the first array that is sharded over explicit axes, or None."""
    for leaf in jax.tree.leaves(args):
        if any(axis is not None for axis in axes_of(leaf)):
            mesh = jax.typeof(leaf).sharding.mesh
            if AxisType.Explicit in mesh.axis_types:
                return mesh
    return None


def _unsharded(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def _sharding(mesh: Any, wanted: Axes, shape: tuple[int, ...]) -> NamedSharding:
    used: set[str] = set()
    kept = []
    for names, size in zip(wanted, shape, strict=True):
        group = () if names is None else names if isinstance(names, tuple) else (names,)
        parts = math.prod(mesh.shape[name] for name in group)
        fits = bool(group) and size % parts == 0 and used.isdisjoint(group)
        kept.append(names if fits else None)
        used.update(group if fits else ())
    return NamedSharding(mesh, PartitionSpec(*kept))
