"""Quantized matmul: y = x w^T for int8 activations and 4-bit or int8 weights, integer-exact."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import (
    check_array,
    check_choices,
    check_k,
    check_of_images,
    check_stretched_steps,
)
from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.gradients import with_derivative
from pallas_kernels.matmul import (
    mosaic_gpu,
    mosaic_tpu,
    reference,
    triton,
    triton_few_rows,
    xla,
)
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows
from pallas_kernels.sharding import axes_of, partitioned

__all__ = [
    "MATMUL",
    "MATMUL_INT8",
    "Branch",
    "Epilogue",
    "Int8Rows",
    "PackedRows",
    "PreparedWeights",
    "differentiable",
    "matmul",
    "prepare",
]

_TPU = Backend(
    name="mosaic_tpu",
    splits=False,
    run=mosaic_tpu.matmul,
    why_not=mosaic_tpu.why_not,
    prepare=mosaic_tpu.prepare,
    run_prepared=mosaic_tpu.matmul_prepared,
)
_FEW_ROWS = Backend(
    name="triton_few_rows", run=triton_few_rows.matmul, why_not=triton_few_rows.why_not
)
_HOPPER = Backend(
    name="mosaic_gpu",
    run=mosaic_gpu.matmul,
    why_not=mosaic_gpu.why_not,
    prepare=mosaic_gpu.prepare,
    run_prepared=mosaic_gpu.matmul_prepared,
)
_ANYWHERE = (
    Backend(name="triton", run=triton.matmul, why_not=triton.why_not),
    Backend(name="xla", run=xla.matmul),
    Backend(name="reference", run=reference.matmul),
)
# The first that can run does. Each takes x, w and an epilogue.
MATMUL = Operation(name="matmul", backends=(_TPU, _FEW_ROWS, _HOPPER, *_ANYWHERE))
MATMUL_INT8 = Operation(name="matmul_int8", backends=(_TPU, _HOPPER, *_ANYWHERE))

_MANY_ROWS = 4096  # for which prepared weights are
# Of k, up to which int32 holds the sum of any products: 127 * 127 each, and 255 * 127 for
# asymmetric x once the 128 that it is lowered by is put back.
_MAX_K = (2**31 - 1) // (127 * 127)
_MAX_K_ASYMMETRIC = (2**31 - 1) // (255 * 127)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["implementation", "n", "k", "bits"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedWeights:
    """Weights in the order that one backend reads, made once; not for storage."""

    arrays: Any  # the backend's own
    implementation: str  # the backend's name
    n: int  # output channels
    k: int  # contraction length
    bits: int  # 4, or 8 for int8

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape of the weights."""
        return self.n, self.k

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return self.n * self.k

    @property
    def operation(self) -> Operation:
        """The operation whose backend they are for."""
        return MATMUL if self.bits == 4 else MATMUL_INT8

    def explain(
        self,
        x: Int8Rows,  # [m, k]
        epilogue: Epilogue = Epilogue(),  # noqa: B008 (frozen)
    ) -> str:
        """Say whether `matmul` runs: on their own backend, since no other reads them."""
        return self.operation.explain(x, self, epilogue, implementation=self.implementation)


def matmul(
    x: Int8Rows,  # [m, k]
    w: Int8Rows | PackedRows | PreparedWeights,  # [n, k], symmetric, one scale a row
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (frozen)
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """Multiply int8 activations by weights that share one scale a row.

    The dot over all of k is an exact int32. The rest is float32, in the order that
    `reference.scale_sums` and `reference.finish` give:
    residual + gate * activation(acc * s_x * s_w (+ terms of lo) + branch + bias).

    It is differentiated as `reference.in_floats`: the product of what the operands stand for, of
    which rows that were quantized in the same function are their floats, and exact in the scales
    and in the epilogue's arrays. Prepared weights have no derivative.

    Args:
      x: the activations.
      w: the weights: int8, packed 4-bit codes, or what `prepare` made of either.
      epilogue: what becomes of the product.
      implementation: a backend's name, several in order of preference, or None for the best on
        this device. Prepared weights run on their own, which must be among them.

    Returns:
      [m, n] of the epilogue's out_dtype. Rows whose scale is NaN are NaN.

    Raises:
      ValueError: operands of other types, shapes or dtypes, k = 0 or so large that int32 sums
        could wrap, weights that are asymmetric or have scale blocks, values that the number format
        lacks, an out_dtype that isn't floating of 16 bits or more, or a named implementation that
        can't run here or isn't that of prepared weights.
    """
    _check_x(x)
    _check_w(w)
    _check_same_k(x, w)
    check_epilogue(epilogue, x.shape[0], w.shape[0])
    backend = _backend(x, w, epilogue, implementation)
    sources = x.source, None if isinstance(w, PreparedWeights) else w.source

    def run(_, x, w, epilogue):
        if not isinstance(w, PreparedWeights):
            return backend.run(x, w, epilogue)
        assert backend.run_prepared is not None
        return backend.run_prepared(x, w.arrays, epilogue)

    def axes():
        n = None if isinstance(w, PreparedWeights) else axes_of(w.scale)[0]
        return axes_of(x.values)[0], n

    run = functools.partial(partitioned, run, axes)
    definition = functools.partial(partitioned, _in_floats, axes)
    return with_derivative(run, definition, sources, x, w, epilogue)


def _backend(
    x: Int8Rows,
    w: Int8Rows | PackedRows | PreparedWeights,
    epilogue: Epilogue,
    implementation: Implementation,
) -> Backend:
    if not isinstance(w, PreparedWeights):
        return _operation(w).choose(implementation, x, w, epilogue)
    if w.implementation not in w.operation.names(implementation):
        raise ValueError(
            f"implementation is {implementation!r}, but w is prepared for {w.implementation!r}; "
            "pass None, or weights that aren't prepared"
        )
    return w.operation.choose(w.implementation, x, w, epilogue)


def differentiable(w: Any) -> Any:
    """Return weights whose floats can be had, for differentiation; raises ValueError for others."""
    if not isinstance(w, PreparedWeights):
        return w
    raise ValueError(
        f"weights prepared for {w.implementation!r} have no gradient; differentiate with weights "
        "that aren't, such as those of a model before `place`"
    )


def _in_floats(
    sources: tuple[jax.Array | None, jax.Array | None],  # of x and of w
    x: Int8Rows,
    w: Int8Rows | PackedRows | PreparedWeights,
    epilogue: Epilogue,
) -> jax.Array:
    """Return what JAX differentiates in the place of the product."""
    x_floats = reference.floats_of(x, sources[0])
    w_floats = reference.floats_of(differentiable(w), sources[1])
    return reference.in_floats(x_floats, w_floats, epilogue)


def prepare(
    w: Int8Rows | PackedRows,  # [n, k], symmetric, one scale a row
    *,
    out_dtype: Any = jnp.bfloat16,
    implementation: Implementation = None,
) -> PreparedWeights | None:
    """Reorder weights for the backend that would multiply many rows by them.

    Args:
      w: the weights.
      out_dtype: of the results to come: not every backend writes every type.
      implementation: as `matmul` takes it.

    Returns:
      The weights for `matmul`, or None where that backend reads them as they are.

    Raises:
      ValueError: weights that `matmul` would refuse, or a named implementation that can't run here.
    """
    if isinstance(w, PreparedWeights):
        raise ValueError("w is prepared already; pass Int8Rows or PackedRows")
    _check_w(w)
    _check_out_dtype(out_dtype)
    n, k = w.shape
    shape: Any = jax.ShapeDtypeStruct  # stands where an array would
    x = Int8Rows(values=shape((_MANY_ROWS, k), jnp.int8), scale=shape((_MANY_ROWS, 1), jnp.float32))
    backend = _operation(w).choose(implementation, x, w, Epilogue(out_dtype=out_dtype))
    if backend.prepare is None:
        return None
    bits = 8 if isinstance(w, Int8Rows) else 4
    arrays = backend.prepare(w)
    return PreparedWeights(arrays=arrays, implementation=backend.name, n=n, k=k, bits=bits)


def _operation(w: Int8Rows | PackedRows) -> Operation:
    return MATMUL_INT8 if isinstance(w, Int8Rows) else MATMUL


def _check_x(x: Any) -> None:
    if not isinstance(x, Int8Rows):
        raise ValueError(f"x is a {type(x).__name__}; it must be Int8Rows")
    check_array("x.values", x.values, ("m", "k"), jnp.int8)
    check_choices(value_bits=x.value_bits)
    m = x.values.shape[0]
    check_array("x.scale", x.scale, (m, 1), jnp.float32)
    if x.lo is not None:
        check_array("x.lo", x.lo, (m, 1), jnp.float32)


def _check_w(w: Any) -> None:
    """Refuse weights that no backend multiplies."""
    if isinstance(w, PreparedWeights):
        return
    if isinstance(w, Int8Rows):
        check_array("w.values", w.values, ("n", "k"), jnp.int8)
        n = w.values.shape[0]
    elif isinstance(w, PackedRows):
        _check_packed(w)
        n = w.codes.shape[0]
    else:
        raise ValueError(
            f"w is a {type(w).__name__}; it must be Int8Rows, PackedRows or PreparedWeights"
        )
    if w.lo is not None:
        raise ValueError("w is asymmetric; quantize weights with range='absmax'")
    check_k(w.k)
    check_array("w.scale", w.scale, (n, 1), jnp.float32)


def _check_packed(w: PackedRows) -> None:
    """Refuse packed weights whose arrays or metadata don't fit together."""
    check_choices(group_size=w.group_size, step=w.step, levels=w.levels, range=w.range)
    if (w.axis, w.scale_block, w.range) != (-1, None, "absmax"):
        raise ValueError(
            f"w has axis={w.axis}, scale_block={w.scale_block} and range={w.range!r}; matmul takes "
            "axis=-1, scale_block=None and range='absmax'"
        )
    check_array("w.codes", w.codes, ("n", "k_padded / 2"), jnp.uint8)
    n, columns = w.codes.shape
    if 2 * columns % w.group_size or not 0 <= w.padding < max(w.group_size, 1):
        raise ValueError(
            f"w.codes holds {2 * columns} elements a row with padding={w.padding}; they must be "
            f"whole groups of {w.group_size}, less than one of them padding"
        )
    groups = 2 * columns // w.group_size
    check_array("w.shifts", w.shifts, (n, -(-groups // 2)), jnp.uint8)
    if w.levels == "stretched":
        check_stretched_steps("w.shifts", w.shifts)


def _check_same_k(x: Int8Rows, w: Int8Rows | PackedRows | PreparedWeights) -> None:
    k = x.shape[1]
    if k != w.k:
        raise ValueError(f"x has k={k} and w has k={w.k}; both must be the same")
    check_k(k)
    most, kind = (_MAX_K, "") if x.lo is None else (_MAX_K_ASYMMETRIC, " with an asymmetric x")
    if k > most:
        raise ValueError(
            f"k is {k}{kind}; int32 sums of int8 products hold for k up to {most}: cut k into "
            "pieces and add their results"
        )


def check_epilogue(epilogue: Any, m: int, n: int) -> None:
    """Refuse what doesn't fit a result of [m, n]."""
    if not isinstance(epilogue, Epilogue):
        raise ValueError(f"epilogue is a {type(epilogue).__name__}; it must be an Epilogue")
    if epilogue.gate is not None:
        check_of_images("gate", epilogue.gate, m, n)
    shapes = {"bias": (n,), "residual": (m, n)}
    for name, shape in shapes.items():
        array = getattr(epilogue, name)
        if array is not None:
            check_array(name, array, shape, jnp.floating)
    if epilogue.branch is not None:
        _check_branch(epilogue.branch, m, n)
    check_choices(activation=epilogue.activation)
    _check_out_dtype(epilogue.out_dtype)


def _check_branch(branch: Any, m: int, n: int) -> None:
    if not isinstance(branch, Branch):
        raise ValueError(f"branch is a {type(branch).__name__}; it must be a Branch")
    check_array("branch.input", branch.input, (m, "r"), jnp.floating)
    rank = branch.input.shape[1]
    if rank < 1:
        raise ValueError("branch.input has no columns; pass branch=None")
    check_array("branch.up", branch.up, (n, rank), jnp.floating)
    if branch.input.dtype != branch.up.dtype:
        raise ValueError(
            f"branch.input has dtype {branch.input.dtype} and branch.up {branch.up.dtype}; both "
            "must be the same"
        )


def _check_out_dtype(out_dtype: Any) -> None:
    if not jnp.issubdtype(out_dtype, jnp.floating) or jnp.finfo(out_dtype).bits < 16:
        raise ValueError(
            f"out_dtype is {out_dtype}; it must be floating of 16 bits or more, such as bfloat16"
        )
