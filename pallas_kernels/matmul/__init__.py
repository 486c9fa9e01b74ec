"""Quantized matmul: y = x w^T for int8 activations and 4-bit or int8 weights, integer-exact."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import check_array, check_choices, check_k
from pallas_kernels.dispatch import Backend, Implementation, Operation
from pallas_kernels.matmul import (
    mosaic_gpu,
    mosaic_tpu,
    reference,
    triton,
    triton_few_rows,
    xla,
)


def _any_bits(run: Callable) -> Callable:
    """Let a backend that multiplies int8 whatever it holds ignore `x_bits`."""
    return lambda *args, x_bits=8, **options: run(*args, **options)


# The first that can run does.
MATMUL = Operation(
    name="matmul",
    backends=(
        Backend(
            name="mosaic_tpu",
            run=mosaic_tpu.matmul,
            why_not=mosaic_tpu.why_not,
            prepare=mosaic_tpu.prepare_weights,
            run_prepared=mosaic_tpu.matmul_prepared,
        ),
        Backend(
            name="triton_few_rows",
            run=_any_bits(triton_few_rows.matmul),
            why_not=triton_few_rows.why_not,
        ),
        Backend(
            name="mosaic_gpu",
            run=_any_bits(mosaic_gpu.matmul),
            why_not=mosaic_gpu.why_not,
            prepare=mosaic_gpu.prepare_weights,
            run_prepared=_any_bits(mosaic_gpu.matmul_prepared),
        ),
        Backend(name="triton", run=_any_bits(triton.matmul), why_not=triton.why_not),
        Backend(name="xla", run=_any_bits(xla.matmul)),
        Backend(name="reference", run=_any_bits(reference.matmul)),
    ),
)
MATMUL_INT8 = Operation(
    name="matmul_int8",
    backends=(
        Backend(
            name="mosaic_tpu",
            run=mosaic_tpu.matmul_int8,
            why_not=mosaic_tpu.why_not,
            prepare=mosaic_tpu.prepare_int8,
            run_prepared=mosaic_tpu.matmul_prepared,
        ),
        Backend(
            name="mosaic_gpu",
            run=mosaic_gpu.matmul_int8,
            why_not=mosaic_gpu.why_not,
            prepare=mosaic_gpu.prepare_int8,
            run_prepared=_any_bits(mosaic_gpu.matmul_prepared),
        ),
        Backend(name="triton", run=triton.matmul_int8, why_not=triton.why_not),
        Backend(name="xla", run=xla.matmul_int8),
        Backend(name="reference", run=reference.matmul_int8),
    ),
)
_MANY_ROWS = 4096  # for which prepared weights are


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
    def operation(self) -> Operation:
        """The operation whose backend they are for."""
        return MATMUL if self.bits == 4 else MATMUL_INT8

    def explain(self, x: jax.Array, **options) -> str:
        """Say whether `matmul_prepared` runs: on their own backend, since no other reads them."""
        return self.operation.explain(x, self, implementation=self.implementation, **options)


def matmul(
    x: jax.Array,  # [m, k], int8: decoded values, minus 128 if asymmetric
    w_codes: jax.Array,  # [n, k_padded / 2], uint8: packed symmetric codes
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8: packed shifts
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    group_size: int,
    step: str,
    bias: jax.Array | None = None,  # [n], any float
    x_lo: jax.Array | None = None,  # [m, 1], float32: given if x is asymmetric
    activation: str | None = None,  # "gelu": its tanh form, after the bias
    gate: jax.Array | None = None,  # [n], any float: multiplies the columns, after the activation
    residual: jax.Array | None = None,  # [m, n], any float: added last
    out_dtype: jnp.dtype = jnp.bfloat16,
    x_bits: int = 8,  # 4 if x is 4-bit codes times powers of two, less 128 if asymmetric
    implementation: Implementation = None,
) -> jax.Array:
    """Multiply int8 activations by packed 4-bit weights that share one scale a row.

    The dot over all of k is an exact int32 (|sum| < 2**31 for k < 66,000 in the worst case); the
    epilogue is float32, in the order that `reference.epilogue` gives. `x_bits` changes no integer:
    it lets a device without int8 units multiply in float8, which holds such values exactly.

    Returns:
      [m, n] of out_dtype. Rows whose scale is NaN are NaN.

    Raises:
      ValueError: arguments of other shapes or dtypes, k = 0, a group_size, step or activation that
        isn't known, an out_dtype that isn't floating of 16 bits or more, or a named implementation
        that can't run here.
    """
    check_array("x", x, ("m", "k"), jnp.int8)
    check_choices(x_bits=x_bits)
    _check_packed(w_codes, w_shifts, k=x.shape[1], group_size=group_size, step=step)
    epilogue = {"bias": bias, "x_lo": x_lo, "activation": activation}
    epilogue |= {"gate": gate, "residual": residual, "out_dtype": out_dtype}
    _check(x, w_codes.shape[0], x_scale, w_scale, **epilogue)
    operands = x, w_codes, w_shifts, x_scale, w_scale
    options = {"group_size": group_size, "step": step, "x_bits": x_bits}
    return MATMUL(*operands, implementation=implementation, **options, **epilogue)


def matmul_int8(
    x: jax.Array,  # [m, k], int8: decoded values, minus 128 if asymmetric
    w: jax.Array,  # [n, k], int8: symmetric
    x_scale: jax.Array,  # [m, 1], float32
    w_scale: jax.Array,  # [n, 1], float32
    *,
    bias: jax.Array | None = None,  # [n], any float
    x_lo: jax.Array | None = None,  # [m, 1], float32: given if x is asymmetric
    activation: str | None = None,  # "gelu": its tanh form, after the bias
    gate: jax.Array | None = None,  # [n], any float: multiplies the columns, after the activation
    residual: jax.Array | None = None,  # [m, n], any float: added last
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: Implementation = None,
) -> jax.Array:
    """Multiply int8 activations by int8 weights; otherwise as `matmul`."""
    check_array("x", x, ("m", "k"), jnp.int8)
    check_array("w", w, ("n", "k"), jnp.int8)
    _check_same_k(x, w)
    epilogue = {"bias": bias, "x_lo": x_lo, "activation": activation}
    epilogue |= {"gate": gate, "residual": residual, "out_dtype": out_dtype}
    _check(x, w.shape[0], x_scale, w_scale, **epilogue)
    return MATMUL_INT8(x, w, x_scale, w_scale, implementation=implementation, **epilogue)


def prepare(
    w_codes: jax.Array,  # [n, k_padded / 2], uint8: packed symmetric codes
    w_shifts: jax.Array,  # [n, ceil(groups / 2)], uint8: packed shifts
    w_scale: jax.Array,  # [n, 1], float32
    *,
    k: int,
    group_size: int,
    step: str,
    implementation: Implementation = None,
) -> PreparedWeights | None:
    """Reorder packed weights for the backend that would multiply many rows by them.

    Returns:
      The weights for `matmul_prepared`, or None where that backend reads the packed order.

    Raises:
      ValueError: weights that `matmul` would refuse, or a named implementation that can't run here.
    """
    _check_packed(w_codes, w_shifts, k=k, group_size=group_size, step=step)
    check_array("w_scale", w_scale, (w_codes.shape[0], 1), jnp.float32)
    n, kind = w_codes.shape[0], {"group_size": group_size, "step": step}
    rows = jax.ShapeDtypeStruct((_MANY_ROWS, k), jnp.int8)
    backend = MATMUL.choose(implementation, rows, w_codes, **kind)
    if backend.prepare is None:
        return None
    arrays = backend.prepare(w_codes, w_shifts, w_scale, k=k, **kind)
    return PreparedWeights(arrays=arrays, implementation=backend.name, n=n, k=k, bits=4)


def prepare_int8(
    w: jax.Array,  # [n, k], int8: symmetric
    w_scale: jax.Array,  # [n, 1], float32
    *,
    implementation: Implementation = None,
) -> PreparedWeights | None:
    """Reorder int8 weights; otherwise as `prepare`."""
    check_array("w", w, ("n", "k"), jnp.int8)
    n, k = w.shape
    check_k(k)
    check_array("w_scale", w_scale, (n, 1), jnp.float32)
    rows = jax.ShapeDtypeStruct((_MANY_ROWS, k), jnp.int8)
    backend = MATMUL_INT8.choose(implementation, rows, w)
    if backend.prepare is None:
        return None
    arrays = backend.prepare(w, w_scale)
    return PreparedWeights(arrays=arrays, implementation=backend.name, n=n, k=k, bits=8)


def matmul_prepared(
    x: jax.Array,  # [m, k], int8: decoded values, minus 128 if asymmetric
    w: PreparedWeights,  # [n, k]
    x_scale: jax.Array,  # [m, 1], float32
    *,
    bias: jax.Array | None = None,  # [n], any float
    x_lo: jax.Array | None = None,  # [m, 1], float32: given if x is asymmetric
    activation: str | None = None,  # "gelu": its tanh form, after the bias
    gate: jax.Array | None = None,  # [n], any float: multiplies the columns, after the activation
    residual: jax.Array | None = None,  # [m, n], any float: added last
    out_dtype: jnp.dtype = jnp.bfloat16,
    x_bits: int = 8,  # 4 if x is 4-bit codes times powers of two, less 128 if asymmetric
    implementation: Implementation = None,
) -> jax.Array:
    """Multiply by prepared weights; otherwise as `matmul`.

    Raises:
      ValueError: what `matmul` refuses, or an implementation without the weights' own.
    """
    check_array("x", x, ("m", "k"), jnp.int8)
    check_choices(x_bits=x_bits)
    _check_same_k(x, w)
    epilogue = {"bias": bias, "x_lo": x_lo, "activation": activation}
    epilogue |= {"gate": gate, "residual": residual, "out_dtype": out_dtype}
    scale = jax.ShapeDtypeStruct((w.n, 1), jnp.float32)
    _check(x, w.n, x_scale, scale, **epilogue)
    if w.implementation not in w.operation.names(implementation):
        raise ValueError(
            f"implementation is {implementation!r}, but w is prepared for {w.implementation!r}; "
            "pass None, or weights that aren't prepared"
        )
    backend = w.operation.choose(w.implementation, x, w, x_scale, scale, **epilogue)
    return backend.run_prepared(x, w.arrays, x_scale, x_bits=x_bits, **epilogue)


def _check_packed(w_codes, w_shifts, *, k: int, group_size: int, step: str) -> None:
    """Refuse packed weights that aren't those of rows of k elements."""
    check_choices(group_size=group_size, step=step)
    check_k(k)
    check_array("w_codes", w_codes, ("n", "k_padded / 2"), jnp.uint8)
    n, columns = w_codes.shape
    groups = -(-k // group_size)
    if 2 * columns != groups * group_size:
        raise ValueError(
            f"w_codes holds {2 * columns} elements a row, but x has k={k}; both must have the same "
            f"k, that of w_codes padded to a multiple of {group_size}"
        )
    check_array("w_shifts", w_shifts, (n, -(-groups // 2)), jnp.uint8)


def _check_same_k(x, w) -> None:
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x has k={x.shape[1]} and w has k={w.shape[1]}; both must be the same")
    check_k(x.shape[1])


def _check(x, n, x_scale, w_scale, *, bias, x_lo, activation, gate, residual, out_dtype) -> None:
    """Refuse an argument that doesn't follow from the rows of x [m, ...] and n columns."""
    m = x.shape[0]
    check_array("x_scale", x_scale, (m, 1), jnp.float32)
    check_array("w_scale", w_scale, (n, 1), jnp.float32)
    optional = {"x_lo": (x_lo, (m, 1), jnp.float32), "bias": (bias, (n,), jnp.floating)}
    optional |= {"gate": (gate, (n,), jnp.floating), "residual": (residual, (m, n), jnp.floating)}
    for name, (array, shape, dtype) in optional.items():
        if array is not None:
            check_array(name, array, shape, dtype)
    check_choices(activation=activation)
    if not jnp.issubdtype(out_dtype, jnp.floating) or jnp.finfo(out_dtype).bits < 16:
        raise ValueError(
            f"out_dtype is {out_dtype}; it must be floating of 16 bits or more, such as bfloat16"
        )
