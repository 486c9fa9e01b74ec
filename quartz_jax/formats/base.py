"""What every number format shares: cutting rows into blocks, scales, codes, storage."""

import abc
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from pallas_kernels.gradients import remembering, straight_through
from pallas_kernels.sharding import axes_of, partitioned
from quartz_jax.formats.tensors import BlockRows, Stored

Scales = Any  # a pytree of arrays whose last axis has length 1
Kept = dict[str, jax.Array]  # of the scales what is stored, in its dtypes; the last axis is 1


class Format(abc.ABC):
    """A number format as pure steps in float32 along the last axis.

    `outer` finds what whole rows (or the tensor) share and `inner` what a block of `block`
    elements shares; `encode` gives the code of each value under them; `keep` is what of them is
    stored, and `decode` the value of a code from that alone. They are apart so that a method may
    round column by column with scales that are already fixed (GPTQ does), and so that what is
    computed is what is stored. Subclasses are frozen dataclasses: hashable, so that they are
    static under jax.jit.
    """

    @property
    @abc.abstractmethod
    def block(self) -> int | None:
        """Elements along the row that share the inner scales; None: the whole row."""

    @property
    def scale_block(self) -> int | None:
        """Elements that count as a row of their own; None: the whole row."""
        return None

    @property
    def code_bits(self) -> int:
        """Bits of a stored code: 4, two to a byte, or 8."""
        return 4

    @property
    def signed_codes(self) -> bool:
        """Whether codes are two's complement."""
        return True

    @property
    def rows_apart(self) -> bool:
        """Whether a row's values don't depend on other rows."""
        return True

    @property
    def blocks_apart(self) -> bool:
        """Whether what `inner` finds of a block depends on no other block of its row.

        Where it doesn't hold, `inner` needs all blocks of a row, [..., blocks, block], at once.
        """
        return True

    @property
    def padding_mode(self) -> str:
        """How a short last block is filled: a mode of `jnp.pad`."""
        return "edge"

    @property
    def nibbles(self) -> tuple[str, ...]:
        """Names of what is kept of blocks in 0..15, which is stored two to a byte."""
        return ()

    @abc.abstractmethod
    def bits(self, k: int) -> float:
        """Stored bits an element, scales included, of rows of k elements."""

    @abc.abstractmethod
    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return what each block shares; blocks float32 [..., block], leaves [..., 1]."""

    @abc.abstractmethod
    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return the codes nearest to float32 values [..., any number], int32."""

    @abc.abstractmethod
    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return what is stored of the scales; names that start with "row_" are of whole rows."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return the values of int32 codes, float32."""

    def outer(self, rows: jax.Array) -> Scales:
        """Return what each row shares; rows float32 [..., k], leaves [..., 1]."""
        return ()

    def round(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return the stored values nearest to float32 [..., any number], as float32."""
        return self.decode(self.encode(values, outer, inner), self.keep(outer, inner))

    def exact_8(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array] | None:
        """Return values that int8 holds exactly and their float32 row scale, or None.

        Formats that have it are int8 operands of kernels, decoded.
        """
        return None

    def exact_16(self, codes: jax.Array, kept: Kept) -> tuple[jax.Array, jax.Array] | None:
        """Return values that bfloat16 holds exactly and their float32 row scale, or None.

        Formats that have it are multiplied in bfloat16, exact but for the order of sums.
        """
        found = self.exact_8(codes, kept)
        return found and (found[0].astype(jnp.bfloat16), found[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return what x [..., k] is after storing it, float32 [..., k]; its gradient is x's."""
        run = functools.partial(_round_trip, format=self)
        rounded = partitioned(run, lambda: axes_of(x), jax.lax.stop_gradient(x))
        return straight_through(rounded, x)

    def store(self, x: jax.Array) -> Stored:
        """Return x [..., k] as stored, with x as its source where x is traced."""
        run = functools.partial(_store, format=self)
        stored = partitioned(run, lambda: axes_of(x), jax.lax.stop_gradient(x))
        return remembering(stored, lambda x: x, x)

    def assemble(self, codes: jax.Array, kept: Kept, k: int) -> Stored:
        """Return the stored form of codes [..., blocks, block] and what is kept of their scales.

        Args:
          codes: int32.
          kept: leaves [..., blocks, 1], or [..., 1, 1] for those of whole rows.
          k: elements of a row, of which the codes hold whole blocks.
        """
        flat = join(codes)
        width = k if self.block is None else flat.shape[-1]
        if self.code_bits == 4:
            stored, padding = codec.pack(flat[..., :width].astype(jnp.int8)), width + width % 2 - k
        else:
            stored = flat[..., :width].astype(jnp.int8 if self.signed_codes else jnp.uint8)
            padding = width - k
        scales = self.pack_scales({name: leaf[..., 0] for name, leaf in kept.items()})
        return BlockRows(codes=stored, scales=scales, format=self, padding=padding)

    def disassemble(self, stored: BlockRows) -> tuple[jax.Array, Kept]:
        """Undo `assemble`: int32 codes [..., blocks, block] and kept scales."""
        codes = stored.codes
        if self.code_bits == 4:
            codes = codec.unpack(codes, signed=self.signed_codes)
        block = self.block or stored.k
        width = stored.k + -stored.k % block
        codes = split(codes[..., :width].astype(jnp.int32), block)
        scales = self.unpack_scales(stored.scales, codes.shape[-2])
        return codes, {name: leaf[..., None] for name, leaf in scales.items()}

    def pack_scales(self, scales: Kept) -> Kept:
        """Return what is kept, leaves [..., blocks] or [..., 1], in the arrays that are stored."""
        return scales | {name: codec.pack(scales[name]) for name in self.nibbles}

    def unpack_scales(self, stored: Kept, blocks: int) -> Kept:
        """Undo `pack_scales`."""
        wide = {name: codec.unpack(stored[name], signed=False) for name in self.nibbles}
        return stored | {name: leaf[..., :blocks] for name, leaf in wide.items()}


def cut(x: jax.Array, format: Format) -> tuple[jax.Array, Scales, Scales]:
    """Return float32 blocks of rows with their outer and inner scales.

    A last block that is short repeats its last element, which changes no extreme, or holds zeros
    where that changes none either.
    """
    rows = x.astype(jnp.float32)
    if format.scale_block:
        rows = split(pad(rows, format.scale_block, format.padding_mode), format.scale_block)
    outer = jax.tree.map(lambda leaf: leaf[..., None], format.outer(rows))
    block = format.block or rows.shape[-1]
    blocks = split(pad(rows, block, format.padding_mode), block)
    return blocks, outer, format.inner(blocks, outer)


@functools.partial(jax.jit, static_argnames="format")
def _round_trip(x: jax.Array, format: Format) -> jax.Array:
    blocks, outer, inner = cut(x, format)
    y = format.round(blocks, outer, inner)
    k = x.shape[-1]
    if format.scale_block:
        y = join(y)[..., : format.scale_block]
    return join(y)[..., :k]


@functools.partial(jax.jit, static_argnames="format")
def _store(x: jax.Array, format: Format) -> Stored:
    blocks, outer, inner = cut(x, format)
    return format.assemble(
        format.encode(blocks, outer, inner), format.keep(outer, inner), x.shape[-1]
    )


def pad(x: jax.Array, multiple: int, mode: str = "edge") -> jax.Array:
    """Lengthen the last axis to a multiple of `multiple`, by its last element ("edge") or zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)], mode=mode)


def split(x: jax.Array, size: int) -> jax.Array:
    """Cut the last axis into pieces, [..., k] to [..., k / size, size]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def join(x: jax.Array) -> jax.Array:
    """Undo `split`: [..., pieces, size] to [..., pieces * size]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def absmax(x: jax.Array) -> jax.Array:
    """Return max|x| over the last axis, [..., 1]."""
    return jnp.max(jnp.abs(x), axis=-1, keepdims=True)


def squared_error(stored: jax.Array, x: jax.Array) -> jax.Array:
    """Return the sum of (stored - x)**2 over the last axis, [..., 1]."""
    return jnp.sum((stored - x) ** 2, axis=-1, keepdims=True)


def multiplier_and_scale(
    extent: jax.Array,  # float32: max|x|, or max - min
    levels: int,  # integer steps in it
) -> tuple[jax.Array, jax.Array]:
    """Return levels / extent and its inverse as the QuaRTZ spec rounds them; 0, 0 if it is tiny."""
    live = extent >= codec.TINY_RANGE
    multiplier = levels / jnp.where(live, extent, 1)
    # XLA's own division may be off by two units in the last place; the correction is for 8 bits
    if levels < 256:
        multiplier = codec.correct_quotient(multiplier, levels, jnp.where(live, extent, 1))
    scale = extent * jnp.float32(1 / levels)
    return jnp.where(live, multiplier, 0), jnp.where(live, scale, 0)


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise ValueError unless a field has one of the listed values."""
    if (isinstance(value, bool) and True not in choices) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}; it must be one of {listed}")


def check_block(name: str, value: int | None, optional: bool = False) -> None:
    """Raise ValueError unless a field is a whole number of at least 1 (or None, if optional)."""
    if (value is None and optional) or (type(value) is int and value >= 1):
        return
    raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
