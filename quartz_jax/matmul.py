"""Matmul of quantized tensors."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codec, matmul
from pallas_kernels.dispatch import Implementation
from pallas_kernels.matmul import PreparedWeights, reference
from pallas_kernels.operands import Epilogue, Int8Rows, PackedRows
from quartz_jax.codec import decode_rows
from quartz_jax.tensor import IntTensor, QuartzTensor


def quartz_matmul(
    x: QuartzTensor | IntTensor,  # [..., k]
    w: QuartzTensor | IntTensor | PreparedWeights,  # [n, k]
    *,
    bias: jax.Array | None = None,  # [n], any float
    activation: str | None = None,
    gate: jax.Array | None = None,  # [n], any float
    residual: jax.Array | None = None,  # [..., n], any float
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: Implementation = None,
) -> jax.Array:
    """Multiply quantized activations by quantized weights: y = x w^T + bias.

    With one scale a row the dot over k is one exact int32, acc; then in float32 and in this order
    y = acc * s_x * s_w + bias, or for an asymmetric x (held minus 128), with c = sum over k of w,
    y = (acc + 128 c) * s_x * s_w + (lo_x * s_w) * c + bias; then activation, gate, residual, each
    where given, and the cast to `out_dtype`. With a scale block the blocks' results are added in
    order in float32 before the bias.

    Args:
      x: symmetric or asymmetric. Its contraction axis may be any; the result has the others.
      w: symmetric, two axes; the contraction axis may be either (w is [k, n] if it is the first).
        Or the same prepared for one backend, see `pallas_kernels.matmul.prepare`.
      bias: added to every row.
      activation: "gelu" applies its tanh form, or None.
      gate: multiplies every row.
      residual: added last.
      out_dtype: of the result.
      implementation: a backend of `pallas_kernels.matmul`, several in order of preference, or
        None for the best on this device. Prepared weights run on their own, which must be among
        them.

    Returns:
      [..., n] of out_dtype; NaN in rows where x's or columns where w's scale is NaN.

    Raises:
      ValueError: shapes or scale blocks that don't agree, an asymmetric w, or a named
        implementation that can't run here or isn't that of prepared weights.
    """
    _check(x, w, bias)
    values = decode_rows(x)
    x2, x_scale, x_lo = jax.tree.map(_flatten, (values, x.scale, x.lo))
    if residual is not None:
        residual = _flatten(residual)
    epilogue = Epilogue(
        bias=bias, gate=gate, residual=residual, activation=activation, out_dtype=out_dtype
    )
    block = None if isinstance(w, PreparedWeights) else _block(x) or _block(w)
    rows = Int8Rows(values=x2, scale=x_scale, lo=x_lo, value_bits=_value_bits(x))
    if block:
        y = _matmul_blocks(rows, w, epilogue, block=block, implementation=implementation)
    else:
        weights = w if isinstance(w, PreparedWeights) else operand(w)
        y = matmul.matmul(rows, weights, epilogue, implementation=implementation)
    return y.reshape(*values.shape[:-1], y.shape[-1])


def operand(w: QuartzTensor | IntTensor) -> Int8Rows | PackedRows:
    """Return weights with one scale a row as the kernels take them."""
    if isinstance(w, IntTensor):
        return Int8Rows(values=decode_rows(w), scale=w.scale)
    return PackedRows(
        codes=w.codes,
        shifts=w.shifts,
        scale=w.scale,
        group_size=w.config.group_size,
        step=w.config.step,
        padding=w.padding,
    )


def _matmul_blocks(x: Int8Rows, w, epilogue: Epilogue, *, block, implementation) -> jax.Array:
    """Add up one matmul for each scale block; scales are [m, 1 or blocks]."""

    def cut(values):  # [rows, k] to [blocks, rows, block], zeros after the end of k
        values = codec.pad(values, block)
        return jnp.moveaxis(values.reshape(values.shape[0], blocks, block), 1, 0)

    blocks = -(-x.k // block)

    def spread(scale):  # [rows, 1 or blocks] to [blocks, rows, 1]
        return jnp.broadcast_to(scale, (scale.shape[0], blocks)).T[..., None]

    def add(total, part):
        values, w, x_scale, w_scale, *x_lo = part
        y = matmul.matmul(
            Int8Rows(values=values, scale=x_scale, lo=x_lo[0] if x_lo else None),
            Int8Rows(values=w, scale=w_scale),
            Epilogue(out_dtype=jnp.float32),
            implementation=implementation,
        )
        return total + y, None

    parts = (cut(x.values), cut(decode_rows(w)), spread(x.scale), spread(w.scale))
    parts += () if x.lo is None else (spread(x.lo),)
    first, _ = add(jnp.float32(0), jax.tree.map(lambda part: part[0], parts))
    total, _ = lax.scan(add, first, jax.tree.map(lambda part: part[1:], parts))
    return reference.finish(total, epilogue)


def _flatten(array: jax.Array) -> jax.Array:
    """Make all leading axes one, [..., k] to [m, k]."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _block(tensor: QuartzTensor | IntTensor) -> int | None:
    return tensor.config.scale_block if isinstance(tensor, QuartzTensor) else None


def _value_bits(x: QuartzTensor | IntTensor) -> int:
    """Return 4 if the values of x are 4-bit codes times powers of two, else 8."""
    if isinstance(x, QuartzTensor):
        return 4 if x.config.step == "power" else 8
    return min(x.bits, x.value_bits)


def _check(x, w, bias) -> None:
    kinds = {"x": (x, QuartzTensor | IntTensor)}
    kinds["w"] = w, QuartzTensor | IntTensor | PreparedWeights
    for name, (tensor, kind) in kinds.items():
        if not isinstance(tensor, kind):
            raise ValueError(f"{name} is a {type(tensor).__name__}; quantize it first")
    prepared = isinstance(w, PreparedWeights)
    if not prepared and w.ndim != 2:
        raise ValueError(f"w has shape {list(w.shape)}; it must have two axes, [n, k]")
    if not prepared and w.lo is not None:
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
    rows = w.n if prepared else w.scale.shape[0]
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{rows}]")
