"""Matmul of quantized tensors, whatever their formats."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codec, device, matmul
from pallas_kernels.arguments import check_array
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gradients import with_derivative
from pallas_kernels.matmul import PreparedWeights, check_epilogue, reference
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows, int8_values
from pallas_kernels.sharding import partitioned
from quartz_jax.formats import BlockRows, Stored
from quartz_jax.formats.storage import axes_of_rows, dequantize, exact_16, row_operand


def quartz_matmul(
    x: Stored,  # [..., k]
    w: Stored | PreparedWeights,  # [n, k]
    *,
    bias: jax.Array | None = None,  # [n], any float
    activation: str | None = None,
    gate: jax.Array | None = None,  # [n] or [images, n], any float
    residual: jax.Array | None = None,  # [..., n], any float
    branch: Branch | None = None,  # input [m, r] and up [n, r], m rows of x
    out_dtype: Any = jnp.bfloat16,
    implementation: Implementation = None,
) -> jax.Array:
    """Multiply quantized activations by quantized weights: y = x w^T + bias.

    With one scale a row the dot over k is one exact int32, acc; then in float32 and in this order
    y = acc * s_x * s_w + branch + bias, or for an asymmetric x (held minus 128), with c = sum over
    k of w, y = (acc + 128 c) * s_x * s_w + (lo_x * s_w) * c + branch + bias; then activation,
    gate, residual, each where given, and the cast to `out_dtype`. With a scale block the blocks'
    results are added in order in float32 before the rest. Formats that no int8 dot holds are
    multiplied as `execution` says.

    The gradient goes straight through to what was quantized in the same function, and is exact in
    the scales, bias, gate, residual and branch; prepared weights have none.

    Args:
      x: symmetric or asymmetric. Its contraction axis may be any; the result has the others.
      w: symmetric, two axes; the contraction axis may be either (w is [k, n] if it is the first).
        Or the same prepared for one backend, see `pallas_kernels.matmul.prepare`.
      bias: added to every row.
      activation: "gelu" applies its tanh form, or None.
      gate: multiplies every row; or one for each image of as many rows.
      residual: added last.
      branch: a product in 16 bits, added before the bias.
      out_dtype: of the result.
      implementation: a backend of `pallas_kernels.matmul`, several in order of preference, or
        None for the best on this device. Prepared weights run on their own, which must be among
        them.

    Returns:
      [..., n] of out_dtype; NaN in rows where x's or columns where w's scale is NaN.

    Raises:
      ValueError: shapes or scale blocks that don't agree, an asymmetric w, an argument of another
        shape or dtype, or a named implementation that can't run here, isn't that of prepared
        weights, or has no part in formats like these.
    """
    _check(x, w)
    epilogue = Epilogue(
        bias=bias,
        gate=gate,
        residual=residual,
        branch=branch,
        activation=activation,
        out_dtype=out_dtype,
    )
    x, w = _last(x), _last(w)
    leading, n = x.shape[:-1], w.shape[0]
    _check_residual(residual, (*leading, n))
    flat = None if residual is None else jax.eval_shape(_flatten, residual)
    check_epilogue(dataclasses.replace(epilogue, residual=flat), math.prod(leading), n)
    return multiply(x, w, epilogue, implementation)


def execution(x: Stored, w: Stored | PreparedWeights) -> str:
    """Return how a product of formats is computed.

    "int8": one int8 dot, by kernels. "int8 blocks": one for each scale block, by kernels.
    "bf16": decoded to bfloat16, which holds both exactly, and multiplied there. "simulated":
    decoded to float32 and multiplied there; nothing is gained but the format's error.
    """
    operands = [_row_kind(t) for t in (x, w)]
    if all(kind == "row" for kind in operands):
        return "int8"
    if all(kind in ("row", "blocks") for kind in operands):
        return "int8 blocks"
    exact = (isinstance(t, BlockRows) and _has_exact_16(t) for t in (x, w))
    return "bf16" if all(exact) else "simulated"


def multiply(
    x: Stored,  # [..., k]
    w: Stored | PreparedWeights,  # [n, k]
    epilogue: Epilogue,
    implementation: Implementation = None,
) -> jax.Array:
    """Multiply what was checked, with a residual of x's rows; [..., n]."""
    sources = x.source, None if isinstance(w, PreparedWeights) else w.source

    def axes():
        n = None if isinstance(w, PreparedWeights) else axes_of_rows(w)[0]
        return *axes_of_rows(x)[:-1], n

    run = functools.partial(partitioned, functools.partial(_multiply, implementation), axes)
    definition = functools.partial(partitioned, _in_floats, axes)
    return with_derivative(run, definition, sources, x, w, epilogue)


def _in_floats(
    sources: tuple[jax.Array | None, jax.Array | None],  # of x and of w
    x: Stored,
    w: Stored | PreparedWeights,
    epilogue: Epilogue,
) -> jax.Array:
    """Return what JAX differentiates in the place of the product."""
    x_floats, w_floats = (
        dequantize(dataclasses.replace(tensor, source=source))
        for tensor, source in zip((x, matmul.differentiable(w)), sources, strict=True)
    )
    y = reference.in_floats(_flatten(x_floats), w_floats, _of_rows(epilogue))
    return y.reshape(*x_floats.shape[:-1], -1)


def _multiply(
    implementation: Implementation,
    _: Any,  # the sources
    x: Stored,
    w: Stored | PreparedWeights,
    epilogue: Epilogue,
) -> jax.Array:
    y = _multiply_rows(x, w, _of_rows(epilogue), implementation)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _of_rows(epilogue: Epilogue) -> Epilogue:
    """Return an epilogue whose residual has the leading axes of x made one."""
    residual = None if epilogue.residual is None else _flatten(epilogue.residual)
    return dataclasses.replace(epilogue, residual=residual)


def _multiply_rows(
    x: Stored,  # [..., k]
    w: Stored | PreparedWeights,  # [n, k]
    epilogue: Epilogue,
    implementation: Implementation,
) -> jax.Array:
    """Return [m, n], m all rows of x."""
    how = execution(x, w)
    if how == "int8":
        rows = jax.tree.map(_flatten, _int8_rows(x))
        weights = w if isinstance(w, PreparedWeights) else _row_operand(w)
        return matmul.matmul(rows, weights, epilogue, implementation=implementation)
    assert not isinstance(w, PreparedWeights)
    if how == "int8 blocks":
        return _multiply_blocks(x, w, epilogue, implementation)
    if implementation is not None:
        raise ValueError(
            f"implementation is {implementation!r}, but {how!r} products of these formats have no "
            "kernels; pass None"
        )
    y = _in_bf16(x, w) if how == "bf16" else simulated_dot(dequantize(x), dequantize(w))
    return reference.finish(y.reshape(-1, y.shape[-1]), epilogue)


def simulated_dot(
    x: jax.Array,  # [..., k], float32
    w: jax.Array,  # [n, k], float32
) -> jax.Array:
    """Return x w^T, float32 [..., n], with float32 products on every device."""
    return jnp.einsum("...k,nk->...n", x, w, precision=lax.Precision.HIGHEST)


def _row_kind(tensor: Stored | PreparedWeights) -> str | None:
    """Return "row" for int8 under one scale a row, "blocks" for scale blocks, None for others."""
    if isinstance(tensor, PreparedWeights | Int8Rows):
        return "row"
    if isinstance(tensor, PackedRows):
        return "blocks" if tensor.scale_block else "row"
    return "row" if jax.eval_shape(row_operand, tensor) is not None else None


def _has_exact_16(tensor: BlockRows) -> bool:
    return jax.eval_shape(exact_16, tensor) is not None


def _row_operand(tensor: Stored) -> PackedRows | Int8Rows:
    """Return what kernels multiply of a tensor that has such a form."""
    rows = row_operand(tensor)
    assert rows is not None
    return rows


def _int8_rows(x: Stored) -> Int8Rows:
    rows = _row_operand(x)
    if isinstance(rows, Int8Rows):
        return rows
    bits = 4 if rows.step == "power" else 8
    return Int8Rows(values=int8_values(rows), scale=rows.scale, lo=rows.lo, value_bits=bits)


def _in_bf16(x: Stored, w: Stored) -> jax.Array:
    """Multiply in bfloat16, exact but for the order of float32 sums; [..., n]."""
    (a, a_scale), (b, b_scale) = _exact_16(x), _exact_16(w)
    if device.current().platform == "cpu":  # as exact in float32, and faster
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    y = jnp.einsum("...k,nk->...n", a, b, preferred_element_type=jnp.float32)
    return y * a_scale * b_scale[:, 0]


def _exact_16(tensor: Stored) -> tuple[jax.Array, jax.Array]:
    """Return the bfloat16 values and scales of a tensor that has them."""
    assert isinstance(tensor, BlockRows)
    found = exact_16(tensor)
    assert found is not None
    return found


def _multiply_blocks(
    x: Stored,
    w: Stored,
    epilogue: Epilogue,
    implementation: Implementation,
) -> jax.Array:
    """Add up one matmul for each scale block, x [m, k], scales [m, 1 or blocks]."""
    block = _block(x) or _block(w)
    given, weight = _row_operand(x), _row_operand(w)
    values, x_scale, x_lo = jax.tree.map(_flatten, (int8_values(given), given.scale, given.lo))
    blocks = -(-values.shape[1] // block)

    def cut(values):  # [rows, k] to [blocks, rows, block], zeros after the end of k
        values = codec.pad(values, block)
        return jnp.moveaxis(values.reshape(values.shape[0], blocks, block), 1, 0)

    def spread(scale):  # [rows, 1 or blocks] to [blocks, rows, 1]
        return jnp.broadcast_to(scale, (scale.shape[0], blocks)).T[..., None]

    def add(total, part):
        whole = Epilogue(out_dtype=jnp.float32)
        return total + matmul.matmul(*part, whole, implementation=implementation), None

    lo = None if x_lo is None else spread(x_lo)
    rows = Int8Rows(values=cut(values), scale=spread(x_scale), lo=lo)
    parts = rows, Int8Rows(values=cut(int8_values(weight)), scale=spread(weight.scale))
    first, _ = add(jnp.float32(0), jax.tree.map(lambda part: part[0], parts))
    total, _ = lax.scan(add, first, jax.tree.map(lambda part: part[1:], parts))
    return reference.finish(total, epilogue)


def _flatten(array: jax.Array) -> jax.Array:
    """Make all leading axes one, [..., k] to [m, k]."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _block(tensor: Stored) -> int | None:
    return tensor.scale_block if isinstance(tensor, PackedRows) else None


def _last(tensor: Any) -> Any:
    """Return a tensor as rows: the contraction axis is the last of the arrays in any case."""
    packed = isinstance(tensor, PackedRows) and tensor.axis != -1
    return dataclasses.replace(tensor, axis=-1) if packed else tensor


def _check_residual(residual: Any, shape: tuple[int, ...]) -> None:
    if residual is not None:
        check_array("residual", residual, shape, jnp.floating)


def _check(x: Any, w: Any) -> None:
    for name, tensor, kinds in (("x", x, Stored), ("w", w, Stored | PreparedWeights)):
        if not isinstance(tensor, kinds):
            raise ValueError(f"{name} is a {type(tensor).__name__}; quantize it first")
    prepared = isinstance(w, PreparedWeights)
    if not prepared and w.ndim != 2:
        raise ValueError(f"w has shape {list(w.shape)}; it must have two axes, [n, k]")
    if not prepared and getattr(w, "lo", None) is not None:
        raise ValueError("w is asymmetric; quantize weights with range='absmax'")
    if x.k != w.k:
        raise ValueError(
            f"x has shape {list(x.shape)} with k={x.k} and w {list(w.shape)} with k={w.k}; both "
            "must have the same k"
        )
    if _block(x) and (prepared or (_block(w) and _block(x) != _block(w))):
        other = "prepared" if prepared else _block(w)
        raise ValueError(
            f"x has scale_block={_block(x)} and w {other}; they must agree, or one be None"
        )
