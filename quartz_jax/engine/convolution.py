"""The quantized drop-in for a convolution: windows of integers, multiplied as a linear's rows are.

A row of the product is a window, and one int8 dot over it has one scale. A pixel lies in several
windows, so its integers can be shared only under a scale that these share. There are two ways:

- "image": the whole image is one row of the input's format, quantized once; its integers are
  unfolded, one byte each. Next to scales of windows the step is as much larger as the image's
  largest value is than a window's.
- "window": floats are unfolded, and each window is quantized with a scale of its own, `taps` times
  the bytes in that pass. Ops that tell the taps of a window apart need it, and so do formats whose
  blocks or offsets a window would cut.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.functions import Norm
from pallas_kernels.gradients import no_gradient
from pallas_kernels.matmul import PreparedWeights, reference
from pallas_kernels.operands import Epilogue, Int8Rows, int8_values
from pallas_kernels.quantize.channels import SIZES
from pallas_kernels.windows import Window
from quartz_jax.engine.linear import (
    Given,
    QuantizedLinear,
    how_it_runs,
    passes_quartz,
    simulated_product,
)
from quartz_jax.engine.matmul import multiply
from quartz_jax.formats import Format, Int, Quartz, Stored
from quartz_jax.formats.storage import dequantize, row_operand
from quartz_jax.transforms import BlockRotation, Op


class QuantizedConv(QuantizedLinear):
    """y = windows of x', times W^T, + b + what the ops add: see `QuantizedLinear`.

    W is [n, taps c], channels innermost. A convolution over single pixels runs as a linear. The
    call takes images [b, h, w, c], or windows that are unfolded already, [m, taps c].
    """

    kind = "conv"

    def __init__(
        self,
        weight: Stored | PreparedWeights,  # [n, taps c], symmetric
        bias: nnx.Param | None,  # [n]
        activation: Format | None,
        ops: tuple[Op, ...] = (),
        *,
        window: Window,
        **options: Any,  # of QuantizedLinear
    ):
        super().__init__(weight, bias, activation, ops, **options)
        self.window = window
        self.by_xla = False  # whether XLA convolves the integers, for lack of a matmul's gain

    @property
    def scales(self) -> str:
        """What shares a scale of the input: "pixel", "image" or "window"; or "none"."""
        if self.window.is_pixel:
            return "pixel"
        ops = self.ops.get_value() if self.ops else ()
        if self.activation is None:
            return "window" if ops else "none"
        apart = self._is_cut(self.activation) or not all(map(self._is_of_pixels, ops))
        if len(ops) > 1 or how_it_runs(self.weight.get_value(), self.activation) != "int8":
            apart = True
        return "window" if apart else "image"

    def by_window(self, x: jax.Array) -> jax.Array:
        """Return the result [b, rows, columns, n] with a scale a window, in any case."""
        seen = self.window.unfold(x)
        y = self(seen.reshape(-1, seen.shape[-1]))
        return y.reshape(*seen.shape[:3], self.out_features)

    def _with_ops(self, ops: tuple[Op, ...], **more: Any) -> QuantizedLinear:
        """Return a copy with other ops."""
        return super()._with_ops(ops, window=self.window, **more)

    def _is_cut(self, format: Format) -> bool:
        """Whether a window cuts what shares something in an image's row of a format."""
        if isinstance(format, Int):
            return not format.is_operand or format.range != "absmax"
        if not isinstance(format, Quartz) or not passes_quartz(format):
            return True
        return format.range != "absmax" or self._channels % format.group_size != 0

    def _is_of_pixels(self, op: Op) -> bool:
        """Whether an op does the same to every pixel, and the pass over the input has it."""
        size = op.size if isinstance(op, BlockRotation) else 0
        return size in SIZES and self._channels % size == 0

    @property
    def _channels(self) -> int:
        return self.in_features // self.window.taps

    def _run(
        self,
        activation: str | None,
        state: tuple,  # weight, bias and ops
        x: Any,
        norm: Norm | None,
        gate: jax.Array | None,
        residual: jax.Array | None,
    ) -> jax.Array:
        """Do what the call does."""
        scales = "pixel" if isinstance(x, tuple) or x.ndim == 2 else self.scales
        if scales == "window":
            x = self.window.unfold(x)
        if scales in ("pixel", "window"):
            return super()._run(activation, state, x, norm, gate, residual)
        if activation is not None or norm is not None or gate is not None:
            raise ValueError("a convolution takes neither norm nor activation nor gate")
        weight, bias, ops = state
        x = x if self.dtype is None else x.astype(self.dtype)
        grid = (len(x), *self.window.grid(*x.shape[1:3]))
        residual = None if residual is None else residual.reshape(-1, self.out_features)
        residual = None if residual is None else residual.astype(x.dtype)
        epilogue = Epilogue(bias=bias, residual=residual, out_dtype=x.dtype)
        run = self._of_floats if scales == "none" else self._of_integers
        return run(x, weight, ops, epilogue).reshape(*grid, self.out_features)

    def _of_floats(
        self, x: jax.Array, weight: Stored, ops: tuple[Op, ...], epilogue: Epilogue
    ) -> jax.Array:
        """Return [m, n]: weights decoded to the dtype of x, or in float32 to be compared with."""
        dtype = jnp.float32 if self.simulated else x.dtype
        y = self.window.convolve(x.astype(dtype), dequantize(weight, dtype))
        return reference.finish(y.reshape(-1, y.shape[-1]).astype(jnp.float32), epilogue)

    def _of_integers(
        self,
        x: jax.Array,  # [b, h, w, c]
        weight: Stored | PreparedWeights,
        ops: tuple[Op, ...],
        epilogue: Epilogue,
    ) -> jax.Array:
        """Return [m, n], each image one row of the input's format."""
        rotation = next((op.size for op in ops if isinstance(op, BlockRotation)), None)
        images = Given(rows=x.reshape(len(x), -1), rotation=rotation)
        assert self.activation is not None
        # The kernels hold a row at a time, of which an image has too many elements.
        quantized = images.quantized(self.activation, "reference")
        assert isinstance(quantized, Int8Rows)
        if self.simulated:
            seen = self.window.unfold(dequantize(quantized).reshape(x.shape))
            given = Given(rows=seen.reshape(-1, seen.shape[-1]))
            return simulated_product(given, weight, None, epilogue)
        if self.by_xla:
            assert not isinstance(weight, PreparedWeights)
            return _convolved(quantized, weight, epilogue, self.window, x.shape)
        windows = self._windows(quantized, x.shape)
        y = multiply(windows, weight, epilogue)
        return y.reshape(-1, y.shape[-1])

    def _windows(self, images: Int8Rows, shape: tuple[int, ...]) -> Int8Rows:
        """Return the windows of quantized images, [b, rows, columns, taps c]."""
        values = self.window.unfold(images.values.reshape(shape))
        scale = jnp.broadcast_to(images.scale[:, None, None], (*values.shape[:3], 1))
        source = images.source
        source = None if source is None else self.window.unfold(source.reshape(shape))
        return Int8Rows(values=values, scale=scale, value_bits=images.value_bits, source=source)


@no_gradient("take that of the model that place was given")
def _convolved(
    images: Int8Rows,  # [b, h w c]
    weight: Stored,  # [n, taps c]
    epilogue: Epilogue,
    window: Window,
    shape: tuple[int, ...],  # of the images, [b, h, w, c]
) -> jax.Array:
    """Return [m, n] by XLA's convolution of int8, exact."""
    rows = row_operand(weight)
    assert rows is not None
    sums = window.convolve(images.values.reshape(shape), int8_values(rows))
    scale = jnp.broadcast_to(images.scale[:, None, None], (*sums.shape[:3], 1))
    y = reference.scale_sums(sums, scale, rows.scale[:, 0])
    return reference.finish(y.reshape(-1, y.shape[-1]), epilogue)
