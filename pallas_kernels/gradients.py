"""What JAX differentiates in the place of integers: straight through, by a definition, or nothing.

Rounding has the derivative zero almost everywhere, and integers carry none at all. So quantized
rows remember the floats that they were made of, as long as those are traced: what is computed from
the rows has the derivative of the same computation on those floats (the straight-through estimator
of Bengio et al. 2013, arXiv 1308.3432, section 4). Where the floats are lost, as across a call of
`jax.jit` or `jax.tree.map`, differentiation raises instead of giving the numbers of the scales
alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels.operands import Rows

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", bound=Rows)


def with_derivative(
    run: Callable[..., Any],
    definition: Callable[..., Any],
    *args: Any,
) -> Any:
    """Return run(*args), which JAX differentiates as definition(*args).

    Args:
      run: is computed.
      definition: of the same arguments and results, in operations that have derivatives; it may
        raise instead, and is called only to be differentiated.
      *args: pytrees of arrays: all that `run` and `definition` depend on and that may be traced.
    """
    if not _traced(args):
        return run(*args)

    def rule(primals, tangents):
        leaves, tree = jax.tree.flatten(primals)
        given = jax.tree.leaves(tangents)
        live = [i for i, tangent in enumerate(given) if not isinstance(tangent, SymbolicZero)]

        def of_live(*values):
            return definition(*tree.unflatten(_put(leaves, live, values)))

        tangents = [given[i] for i in live]
        return run(*primals), jax.jvp(of_live, [leaves[i] for i in live], tangents)[1]

    call = jax.custom_jvp(run)
    call.defjvp(rule, symbolic_zeros=True)
    return call(*args)


def straight_through(value: jax.Array, source: jax.Array | None) -> jax.Array:
    """Return value, which JAX differentiates as source; as itself if there is none."""
    if source is None:
        return value
    return with_derivative(
        lambda value, source: value,
        lambda value, source: source.astype(value.dtype),
        value,
        source,
    )


def remembering(rows: R, made_of: Callable[..., jax.Array], *args: Any) -> R:
    """Return rows that remember the floats made_of(*args), [..., k], if any of these is traced.

    The rows themselves must be made of `lax.stop_gradient(args)`.
    """
    if not _traced(args):
        return rows
    source = made_of(*args)
    guarded = jax.tree.map(lambda leaf: _guarded(leaf, source), rows)
    return dataclasses.replace(guarded, source=source)


def no_gradient(instead: str) -> Callable[[F], F]:
    """Return a decorator of functions that no array can be differentiated through.

    Args:
      instead: what to do, for the message.
    """

    def decorate(function: F) -> F:
        def refuse(array: Any) -> Any:
            if not isinstance(array, jax.core.Tracer) or not _is_float(array):
                return array
            definition = functools.partial(_refuse, function.__name__, instead)
            return with_derivative(lambda x: x, definition, array)

        @functools.wraps(function)
        def guarded(*args, **kwargs):
            args, kwargs = jax.tree.map(refuse, (args, kwargs))
            return function(*args, **kwargs)

        return guarded  # type: ignore[return-value]

    return decorate


def _refuse(name: str, instead: str, _: Any) -> Any:
    raise ValueError(f"{name} has no gradient; {instead}")


def _traced(args: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))


def _put(leaves: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Return leaves with values in some places."""
    changed = dict(zip(places, values, strict=True))
    return [changed.get(i, leaf) for i, leaf in enumerate(leaves)]


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _guarded(leaf: jax.Array, source: jax.Array) -> jax.Array:
    """Return a leaf of rows made of source; to differentiate through it alone raises.

    Forward derivatives can't know what they are for: there it is NaN.
    """
    if not _is_float(leaf):
        return leaf

    def poisoned(leaf, source):
        total = _UNDIFFERENTIABLE.bind(jnp.sum(source.astype(jnp.float32)), tangent=False)
        ones = (leaf == leaf).astype(jnp.float32)  # sharded as the leaf
        return (ones * total).astype(leaf.dtype)

    return with_derivative(lambda leaf, source: leaf, poisoned, leaf, source)


def _refuse_transpose(*_: Any, **__: Any) -> Any:
    raise ValueError(
        "quantized rows have no gradient where the floats that they were made of are lost, as they "
        "are across jax.jit, jax.vmap, lax.scan or jax.tree.map; quantize within the same function "
        "as what uses the rows, or take jax.lax.stop_gradient of them"
    )


def _identity_or_nan(x: jax.Array, tangent: bool) -> jax.Array:
    return x * jnp.nan if tangent else x


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], tangent: bool) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    y = _UNDIFFERENTIABLE.bind(x, tangent=tangent)
    return y, dx if isinstance(dx, ad.Zero) else _UNDIFFERENTIABLE.bind(dx, tangent=True)


# The identity, whose tangents are NaN and whose transpose raises: only a backward pass that reaches
# it does.
_UNDIFFERENTIABLE = Primitive("quartz_undifferentiable")
_UNDIFFERENTIABLE.def_impl(_identity_or_nan)
_UNDIFFERENTIABLE.def_abstract_eval(lambda x, tangent: x)
ad.deflinear2(_UNDIFFERENTIABLE, _refuse_transpose)
ad.primitive_jvps[_UNDIFFERENTIABLE] = _jvp
batching.defvectorized(_UNDIFFERENTIABLE)
mlir.register_lowering(_UNDIFFERENTIABLE, mlir.lower_fun(_identity_or_nan, multiple_results=False))
