"""The quantized drop-in for a linear, and how its input is made ready."""

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import functions
from pallas_kernels.arguments import CHOICES
from pallas_kernels.dispatch import Implementation
from pallas_kernels.functions import Norm, Part
from pallas_kernels.gradients import with_derivative
from pallas_kernels.matmul import PreparedWeights, differentiable, reference
from pallas_kernels.matmul.dequantize import dequantize as dequantize_rows
from pallas_kernels.operands import Branch, Epilogue, Int8Rows, PackedRows
from pallas_kernels.quantize import channels
from pallas_kernels.quantize import quantize as quantize_and_decode
from pallas_kernels.quantize.reference import before
from pallas_kernels.sharding import axes_of, partitioned
from quartz_jax.engine.matmul import execution, multiply, simulated_dot
from quartz_jax.formats import BlockRows, Format, Int, Quartz, Stored
from quartz_jax.formats.storage import axes_of_rows, dequantize, row_operand
from quartz_jax.transforms import (
    BlockRotation,
    Offset,
    Op,
    Product,
    Scale,
    TakeOut,
    TurnedRows,
    Wide,
)
from quartz_jax.transforms.wide import rounded_input

FEW_ROWS = 8  # rows of x up to which reading the weights is the whole cost of a weight-only layer
INT8 = Int(width=8)
_FEW_ROWS_BACKENDS = ("triton_few_rows", "xla")  # those that read the packed order


class QuantizedWeight(nnx.Variable):
    """Holds a stored tensor or PreparedWeights; no nnx.Param: optimizers leave it alone."""


class LayerOps(nnx.Variable):
    """Holds the ops of a layer, a tuple of pytrees; no nnx.Param."""


class QuantizedLinear(nnx.Module):
    """y = x' W^T + b + what the ops add: W quantized, and x' unless the layer is weight-only.

    x' is x through the ops, see `transforms.base`. Ops that the pass over the input or the
    epilogue of the product can take in run there; the others run before, by XLA.
    """

    kind = "linear"  # of what it replaces

    def __init__(
        self,
        weight: Stored | PreparedWeights,  # [n, k], symmetric
        bias: nnx.Param | None,  # [n]
        activation: Format | None,  # of the input; None makes the layer weight-only
        ops: tuple[Op, ...] = (),
        *,
        dtype: Any = None,  # that the input is brought to; None leaves it
        role: str | None = None,  # of the linear that it replaces
        simulated: bool = False,  # compute in float32 what kernels would, decoded; for comparisons
    ):
        self.weight = QuantizedWeight(weight)
        self.bias = bias
        self.activation = activation
        self.ops = LayerOps(ops) if ops else None
        self.dtype = dtype
        self.role = role
        self.simulated = simulated

    @property
    def out_features(self) -> int:
        """Outputs, n."""
        return self.weight.get_value().shape[0]

    @property
    def in_features(self) -> int:
        """Inputs, k."""
        return self.weight.get_value().shape[1]

    def with_branch(
        self,
        down: jax.Array | np.ndarray,  # [k, rank], floating
        up: jax.Array | np.ndarray,  # [rank, n], floating
        dtype: Any,  # that the branch is multiplied in
    ) -> "QuantizedLinear":
        """Return a copy that adds x down up, as an adapter of the 16-bit linear does.

        It shares the weight. The product is added in the epilogue. Where the layer's input is int8,
        what a 16-bit branch would read is near enough (as `apart` has it), so nothing is computed
        for the branch alone; elsewhere it reads x itself.
        """
        ops = self.ops.get_value() if self.ops else ()
        down, up = (jnp.asarray(x, jnp.float32) for x in (down, up))
        wide, turned = self._beside(down, up)
        branch = Product(down=wide.astype(dtype), up=turned.T.astype(dtype))
        return self._with_ops(_with_product(ops, branch, down, self.activation))

    def _with_ops(self, ops: tuple[Op, ...], **more: Any) -> "QuantizedLinear":
        """Return a copy with other ops; `more` is what a subclass is made of beside this."""
        return type(self)(
            self.weight.get_value(),
            self.bias,
            self.activation,
            ops,
            dtype=self.dtype,
            role=self.role,
            simulated=self.simulated,
            **more,
        )

    @property
    def folded(self) -> bool:
        """Whether it is given some channels rotated, or gives some so, unlike the linear."""
        ops = self.ops.get_value() if self.ops else ()
        return any(isinstance(op, TurnedRows) or getattr(op, "folded", None) for op in ops)

    def _beside(
        self,
        down: jax.Array,  # float32 [k, rank]
        up: jax.Array,  # float32 [rank, n]
    ) -> tuple[jax.Array, jax.Array]:
        """Return the factors of a branch beside the 16-bit linear for one beside this layer.

        Where rotations are folded, it is given some channels rotated, or is to give some so.
        """
        for op in self.ops.get_value() if self.ops else ():
            if isinstance(op, BlockRotation):
                down = op.given(down.T).T
            elif isinstance(op, TurnedRows):
                up = op.turned(up)
        return down, up

    def __call__(
        self,
        x: jax.Array | tuple,  # [..., k], floating; or parts, as `models.linear.Part` has them
        *,
        norm: Any = None,  # as `models.linear.Norm` has it, of [k] or [b, 1, k]
        activation: str | None = None,  # "gelu": its tanh form
        gate: jax.Array | None = None,  # [b, 1, n]
        residual: jax.Array | None = None,  # [..., n]
    ) -> jax.Array:
        """Return [..., n] in the dtype of x: what `models.linear.Linear` does, quantized."""
        weight = self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        state = weight, bias, self.ops.get_value() if self.ops else ()
        parts = _parts(x)

        def axes():
            first = parts[0].array if isinstance(parts, tuple) else parts
            n = None if isinstance(weight, PreparedWeights) else axes_of_rows(weight)[0]
            return *axes_of(first)[:-1], n

        run = functools.partial(self._run, activation)
        norm = None if norm is None else functions.as_norm(norm)
        return partitioned(run, axes, state, parts, norm, gate, residual)

    def _run(
        self,
        activation: str | None,
        state: tuple,  # weight, bias and ops
        x: jax.Array | tuple[Part, ...],
        norm: Norm | None,
        gate: jax.Array | None,
        residual: jax.Array | None,
    ) -> jax.Array:
        """Do what the call does."""
        weight, bias, ops = state
        given, leading = self._given(x, norm)
        n, dtype = self.out_features, given.dtype
        epilogue = Epilogue(
            bias=bias,
            activation=activation,
            gate=None if gate is None else _of_images(gate),
            residual=None if residual is None else residual.reshape(-1, n).astype(dtype),
            out_dtype=dtype,
        )
        ops, last = apart(ops, self.activation)
        given, epilogue = through(ops, given, epilogue)
        run = simulated_product if self.simulated else product
        y = run(given, weight, self.activation, epilogue, last)
        return y.reshape(*leading, n)

    def _given(self, x: jax.Array | tuple, norm: Norm | None) -> tuple["Given", tuple]:
        """Return the input as rows, and its leading axes."""
        if self.dtype is not None:
            x = _cast(x, self.dtype)
        rows, leading = _rows(x)
        if norm is None:
            return Given(rows=rows, leading=leading), leading
        norm = jax.tree.map(_of_images, norm)
        return Given(rows=rows, leading=leading, norm=norm), leading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """The input of a product as it is handed to the quantize pass: what is still to be done."""

    rows: jax.Array | tuple[Part, ...]  # [m, k], or parts of it
    leading: tuple[int, ...] = (-1,)  # axes that m stands for: tokens last, images before
    norm: Norm | None = None  # of [k] or [images, k]
    multiplier: jax.Array | None = None  # float32 [k]
    rotation: int | None = None  # channels of a block
    rotated_from: int = 0  # first channel that is rotated
    wide: jax.Array | None = None  # bool [groups of a QuaRTZ format]: those that keep eight bits

    @property
    def dtype(self) -> Any:
        """That of the rows."""
        return self.rows[0].dtype if isinstance(self.rows, tuple) else self.rows.dtype

    def value(self) -> jax.Array:
        """Return the input itself, [m, k]: float32 behind a multiplier or a rotation."""
        return before(self.rows, self.norm, self.multiplier, **self._rotated)

    def images(self, format: Format) -> jax.Array:
        """Return the input as a format takes it: images apart if rows share something there."""
        x = self.value()
        return x if format.rows_apart else x.reshape(*self.leading, x.shape[-1])

    def behind(self, rows: jax.Array) -> "Given":
        """Return rows [m, k] for which nothing is left to be done."""
        return Given(rows=rows, leading=self.leading)

    def quantized(self, format: Format, implementation: Implementation = None) -> Stored:
        """Return the input in a format; 4-bit codes come decoded, as matmuls want them."""
        if passes_quartz(format):
            kind: dict[str, Any] = {"bits": 4, "group_size": format.group_size}
            kind |= {"rounding": format.rounding, "wide": self.wide}
            kind |= {"range": format.range, "step": format.step, "levels": format.levels}
        elif isinstance(format, Int) and format.is_operand:
            kind = {"bits": 8, "range": format.range}
        else:
            # The scale, a block's step and the rounding must see the same numbers. Without the
            # barrier QuaRTZ's error grew by a quarter on an H100 (JAX 0.11.2), presumably since
            # XLA computes what comes before anew for each, in other roundings.
            return format.store(jax.lax.optimization_barrier(self.images(format)))
        return quantize_and_decode(
            self.rows,
            norm=self.norm,
            multiplier=self.multiplier,
            **self._rotated,
            implementation=implementation,
            **kind,
        )

    def scaled(self, factor: jax.Array) -> "Given":
        """Return it with channels multiplied by factors [k]: in the norm, where there is one."""
        if self.rotation is not None:
            return self.behind(channels.scale_channels(self.value(), factor))
        if self.multiplier is not None:
            return dataclasses.replace(self, multiplier=self.multiplier * factor)
        if self.norm is None:
            return dataclasses.replace(self, multiplier=factor)
        norm = jax.tree.map(lambda vector: vector * factor, self.norm)
        return dataclasses.replace(self, norm=norm)

    def rotated(self, op: BlockRotation) -> "Given":
        """Return it with blocks of channels rotated, in the pass if that has the size.

        Channels before the op's first come rotated already, if they are to be.
        """
        if op.first == self.k:
            return self
        if self.rotation is None and op.size in channels.SIZES and op.first % op.size == 0:
            return dataclasses.replace(self, rotation=op.size, rotated_from=op.first)
        wide = self.value().astype(jnp.float32)
        return self.behind(channels.rotate_from(wide, op.size, op.first))

    @property
    def k(self) -> int:
        """Channels."""
        if isinstance(self.rows, tuple):
            return sum(part.size for part in self.rows)
        return self.rows.shape[1]

    @property
    def _rotated(self) -> dict[str, Any]:
        return {"rotation": self.rotation, "rotated_from": self.rotated_from}


def through(ops: tuple[Op, ...], given: Given, epilogue: Epilogue) -> tuple[Given, Epilogue]:
    """Return the input behind all ops, and the epilogue with what they add."""
    dtype = given.dtype
    for op in ops:
        if isinstance(op, Scale):
            given = given.scaled(op.factor)
        elif isinstance(op, BlockRotation):
            given = given.rotated(op)
        elif isinstance(op, Product):
            inner = op.inner(given.value().astype(dtype))
            epilogue = _with_branch(epilogue, inner, op.up.astype(dtype))
        elif isinstance(op, TakeOut):
            whole = given.value()
            taken = whole[:, op.index].astype(dtype)
            epilogue = _with_branch(epilogue, taken, op.weight.astype(dtype))
            given = given.behind(whole.at[:, op.index].set(0))
        elif isinstance(op, TurnedRows):  # the layers behind expect them so
            continue
        elif isinstance(op, Wide):  # the last of all
            given = dataclasses.replace(given, wide=op.groups)
        elif isinstance(op, Offset):
            bias = op.bias if epilogue.bias is None else epilogue.bias.astype(jnp.float32) + op.bias
            given = given.behind(given.value().astype(jnp.float32) + op.amount)
            epilogue = dataclasses.replace(epilogue, bias=bias)
        else:
            x, added = op(given.value().astype(jnp.float32))
            if added is not None:
                raise ValueError(f"{type(op).__name__} adds to the output, and nothing runs that")
            given = given.behind(x)
    return given, epilogue


def _with_product(
    ops: tuple[Op, ...],
    branch: Product,  # of what the layer is given
    down: jax.Array,  # float32 [k, rank]: of what the 16-bit linear is given, before all ops
    activation: Format | None,
) -> tuple[Op, ...]:
    """Return ops with one branch more: last, if it may read the quantized input, else first."""
    narrow = down.T if _is_int8(activation) else None
    for op in ops:
        narrow = None if narrow is None else op.behind(narrow)
    if narrow is None:
        return (branch, *ops)
    last = Product(down=narrow.T.astype(branch.down.dtype), up=branch.up)
    if not ops or not isinstance(ops[-1], Product):
        return (*ops, last)
    both = zip((ops[-1].down, ops[-1].up), (last.down, last.up), strict=True)
    down, up = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in both)
    return (*ops[:-1], Product(down=down, up=up))


def apart(ops: tuple[Op, ...], activation: Format | None) -> tuple[tuple[Op, ...], Product | None]:
    """Return the ops, and apart from them a last branch that may read the quantized input.

    Eight bits are so near to what a branch would read in 16 that it reads those: half the bytes,
    and nothing to be computed for it alone.
    """
    last = ops[-1] if ops else None
    if isinstance(last, Product) and _is_int8(activation):
        return ops[:-1], last
    return ops, None


def _is_int8(activation: Format | None) -> bool:
    """Whether an input's format is one that int8 kernels read as it is."""
    return isinstance(activation, Int) and activation.is_operand


def down_8bit(branch: Product) -> Stored | PreparedWeights:
    """Return what a branch that reads the quantized input multiplies it by, [rank, k]."""
    return INT8.store(branch.down.T) if branch.down_8bit is None else branch.down_8bit


def _with_branch(epilogue: Epilogue, inner: jax.Array, up: jax.Array) -> Epilogue:
    """Return the epilogue with one more branch: several are one of the sum of their ranks."""
    if epilogue.branch is not None:
        inner = jnp.concatenate([epilogue.branch.input, inner], axis=1)
        up = jnp.concatenate([epilogue.branch.up, up], axis=1)
    return dataclasses.replace(epilogue, branch=Branch(input=inner, up=up))


def product(
    given: Given,  # [m, k]
    weight: Stored | PreparedWeights,  # [n, k]
    activation: Format | None,
    epilogue: Epilogue,
    branch: Product | None = None,  # that reads the quantized input, int8 rows
) -> jax.Array:
    """Return the product [m, n], its input quantized unless activation is None."""
    if activation is None:
        x = given.value().astype(given.dtype)
        return with_derivative(_weight_only, _in_floats, x, weight, epilogue)
    if how_it_runs(weight, activation) == "simulated":  # a format without an operand
        return simulated_product(given, weight, activation, epilogue, branch)
    rows = given.quantized(activation)
    if branch is not None:
        inner = multiply(rows, down_8bit(branch), Epilogue(out_dtype=given.dtype))
        epilogue = _with_branch(epilogue, inner, branch.up.astype(given.dtype))
    return multiply(rows, weight, epilogue)


def simulated_product(
    given: Given,  # [m, k]
    weight: Stored | PreparedWeights,  # [n, k]
    activation: Format | None,
    epilogue: Epilogue,
    branch: Product | None = None,  # that reads the quantized input
) -> jax.Array:
    """Return the product [m, n] in float32 of what the formats make of input and weight."""
    assert not isinstance(weight, PreparedWeights)
    if activation is None:
        x = given.value().astype(jnp.float32)
    else:  # never packed
        x = jax.lax.optimization_barrier(given.images(activation))
        x = rounded_input(x, activation, given.wide)
    x = x.reshape(-1, x.shape[-1])
    if branch is not None:
        inner = simulated_dot(x, dequantize(INT8.store(branch.down.T))).astype(given.dtype)
        epilogue = _with_branch(epilogue, inner, branch.up.astype(given.dtype))
    return with_derivative(_float32_dot, _in_floats, x, weight, epilogue)


def how_it_runs(weight: Stored | PreparedWeights, activation: Format | None) -> str:
    """Return how a layer computes: what `execution` says, or "weight-only"."""
    return "weight-only" if activation is None else _execution(weight, activation)


def passes_quartz(format: Format) -> TypeGuard[Quartz]:
    """Whether the quantize pass has a QuaRTZ format."""
    if not isinstance(format, Quartz) or format.scale_block is not None:
        return False
    return format.group_size in CHOICES["group_size"]


def _execution(weight: Stored | PreparedWeights, activation: Format) -> str:
    return execution(_abstract_row(activation, weight.shape[1]), weight)


@functools.lru_cache(maxsize=256)
def _abstract_row(format: Format, k: int) -> Stored:
    """Return a row of k in a format, with shapes in place of arrays."""
    return jax.eval_shape(format.store, jax.ShapeDtypeStruct((1, k), jnp.float32))


def _of_images(
    vectors: jax.Array,  # [columns] or [b, 1, columns]
) -> jax.Array:
    """Return [columns] of what all rows share, or [b, columns]."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    return rows[0] if rows.shape[0] == 1 else rows


def _cast(x: jax.Array | tuple, dtype: Any) -> jax.Array | tuple:
    """Return x, or all its parts, in a dtype."""
    if not isinstance(x, tuple):
        return x.astype(dtype)
    return tuple(dataclasses.replace(part, array=part.array.astype(dtype)) for part in x)


def _parts(x: jax.Array | tuple) -> jax.Array | tuple[Part, ...]:
    """Return x, or its parts as kernels have them."""
    if not isinstance(x, tuple):
        return x
    return tuple(
        Part(
            array=part.array,
            start=part.start,
            size=part.size,
            activation=part.activation,
            times=part.times,
        )
        for part in x
    )


def _rows(
    x: jax.Array | tuple[Part, ...],
) -> tuple[jax.Array | tuple[Part, ...], tuple[int, ...]]:
    """Return x or its parts with the leading axes made one, [m, k], and those axes."""
    first = x[0].array if isinstance(x, tuple) else x
    flat = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), x)
    return flat, first.shape[:-1]


def _in_floats(
    x: jax.Array,  # [m, k]
    weight: Stored | PreparedWeights,  # [n, k]
    epilogue: Epilogue,
) -> jax.Array:
    """Return what JAX differentiates where the input isn't stored, [m, n]."""
    return reference.in_floats(x, dequantize(differentiable(weight)), epilogue)


def _float32_dot(
    x: jax.Array,  # [m, k], float32
    weight: Stored,  # [n, k]
    epilogue: Epilogue,
) -> jax.Array:
    """Multiply in float32, [m, n]."""
    return reference.finish(simulated_dot(x, dequantize(weight)), epilogue)


def _weight_only(
    x: jax.Array,  # [m, k]
    weight: Stored | PreparedWeights,  # [n, k]
    epilogue: Epilogue,
) -> jax.Array:
    """Multiply 16-bit x by quantized weights, [m, n].

    Few rows are bound by reading the weights, so those stay packed: x becomes 16-bit integers, two
    int8 rows each. Many rows multiply in the dtype of x, and so do the weights.
    """
    rows = weight if isinstance(weight, PreparedWeights) else row_operand(weight)
    by_row = None if getattr(rows, "scale_block", None) else rows
    if by_row is None:
        assert not isinstance(weight, PreparedWeights)
        y = _dot(x, dequantize(weight, x.dtype))
    elif x.shape[0] <= FEW_ROWS and not isinstance(weight, BlockRows):
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), *_split_16_bits(x))
        backends = "xla" if isinstance(by_row, Int8Rows) else _FEW_ROWS_BACKENDS
        y = multiply(both, by_row, Epilogue(out_dtype=jnp.float32), backends)
        y = y[: x.shape[0]] + y[x.shape[0] :]
    else:
        assert not isinstance(by_row, PreparedWeights)  # `place` leaves such layers as they are
        return _in_dtype(x, by_row, epilogue)
    return reference.finish(y, epilogue)


def _in_dtype(
    x: jax.Array,  # [m, k]
    w: Int8Rows | PackedRows,  # [n, k]
    epilogue: Epilogue,
) -> jax.Array:
    """Multiply as a layer that isn't quantized does, weights, product and bias in the dtype of x.

    cuBLAS then scales nothing and adds the bias itself. In float32 the results of a FLUX layer
    took a third longer on an H200, and scales behind the product another pass over it.
    """
    y = jnp.einsum("mk,nk->mn", x, dequantize_rows(w, x.dtype), preferred_element_type=x.dtype)
    if epilogue.bias is not None and epilogue.branch is None:
        y = y + epilogue.bias.astype(x.dtype)
        epilogue = dataclasses.replace(epilogue, bias=None)
    return reference.finish(y.astype(jnp.float32), epilogue)


def _dot(
    x: jax.Array,  # [m, k]
    w: jax.Array,  # [n, k]
) -> jax.Array:
    """Return x w^T in float32, [m, n]."""
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.float32)


def _split_16_bits(x: jax.Array) -> tuple[Int8Rows, Int8Rows]:
    """Return two int8 tensors that add up to x within 2**-16 of each row's largest magnitude.

    round(x * (32639 / a)) = 256 high + low, with a = max|x|: high in -127..127, low in -128..127.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.where(jnp.isfinite(wide).all(axis=-1, keepdims=True), largest / 32639, jnp.nan)
    levels = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int32)
    high = (levels + 128) >> 8
    parts = (high, 256 * scale), (levels - 256 * high, scale)
    first, second = (Int8Rows(values=v.astype(jnp.int8), scale=s) for v, s in parts)
    return first, second
