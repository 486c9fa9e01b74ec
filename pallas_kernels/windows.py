"""Convolutions as products of rows: what a window sees of an image, and XLA's own on integers.

Shapes: b images, h rows and w columns of pixels, c channels.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import device

_WORD = 4  # bytes
_NHWC = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Window:
    """The pixels that a convolution multiplies at once; outside of the image there are zeros."""

    size: tuple[int, int]  # rows, columns
    strides: tuple[int, int] = (1, 1)  # pixels from one window to the next
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))  # before and behind

    @property
    def taps(self) -> int:
        """Pixels in a window."""
        return math.prod(self.size)

    @property
    def is_pixel(self) -> bool:
        """Whether a window is each pixel: the convolution is a linear."""
        return self == Window(size=(1, 1))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of windows in an image."""
        sides = zip((height, width), self.size, self.strides, self.padding, strict=True)
        rows, columns = ((side + sum(pad) - size) // step + 1 for side, size, step, pad in sides)
        return rows, columns

    def unfold(
        self,
        x: jax.Array,  # [b, h, w, c]
    ) -> jax.Array:
        """Return the windows side by side, [b, rows, columns, taps c], channels innermost.

        Raises:
          ValueError: x has other axes, or fewer pixels than a window.
        """
        if self.is_pixel:
            return x
        grid = self._checked(x)
        words = x.dtype == jnp.int8 and x.shape[3] % _WORD == 0
        if words and device.current().platform == "gpu":
            return _in_words(lambda wide: self._side_by_side(wide, grid), x)
        return self._side_by_side(x, grid)

    def _side_by_side(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
        down, across = self.strides
        bottom, right = (grid[0] - 1) * down + 1, (grid[1] - 1) * across + 1
        seen = [
            lax.slice(
                padded,
                (0, top, left, 0),
                (len(x), top + bottom, left + right, x.shape[3]),
                (1, down, across, 1),
            )
            for top, left in itertools.product(*map(range, self.size))
        ]
        return jnp.concatenate(seen, axis=-1)

    def convolve(
        self,
        x: jax.Array,  # [b, h, w, c]
        w: jax.Array,  # [n, taps c], of the dtype of x
    ) -> jax.Array:
        """Return XLA's convolution, [b, rows, columns, n]: what `unfold(x) w^T` is.

        Of int8 it is exact sums in int32, rounded to float32; of floats, in their dtype.

        Raises:
          ValueError: as `unfold`.
        """
        self._checked(x)
        return _convolve(x, w, self)

    def _checked(self, x: jax.Array) -> tuple[int, int]:
        grid = self.grid(*x.shape[1:3]) if x.ndim == 4 else (0, 0)
        if min(grid) < 1:
            raise ValueError(
                f"x has shape {list(x.shape)}; it must be [images, height, width, channels] with "
                f"at least one window of {self.size[0]}x{self.size[1]}"
            )
        return grid


@functools.partial(jax.jit, static_argnames="window")
def _convolve(x: jax.Array, w: jax.Array, window: Window) -> jax.Array:
    """Do what `Window.convolve` does, as one program also where its caller isn't traced.

    XLA gives int8 to cuDNN only where float32 is made of the sums at once
    (`CheckNoIllegalIntegerConvs` of `cudnn_fused_conv_rewriter.cc`).
    """
    kernel = w.reshape(w.shape[0], *window.size, x.shape[-1]).transpose(1, 2, 3, 0)
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    sums = lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        dimension_numbers=_NHWC,
        preferred_element_type=jnp.int32 if integers else x.dtype,
    )
    return sums.astype(jnp.float32) if integers else sums


def _in_words(
    move: Callable[[jax.Array], jax.Array],
    x: jax.Array,  # int8 [..., c], c a multiple of 4
) -> jax.Array:
    """Return what a function that moves whole pixels makes of int8, which it gets four at a time.

    XLA's kernels on GPUs move an element a thread, and a byte takes as long as a word.
    """
    words = lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, _WORD), jnp.int32)
    moved = lax.bitcast_convert_type(move(words), jnp.int8)
    return moved.reshape(*moved.shape[:-2], -1)
