"""What one warpgroup of the 8-bit attention kernel does with 64 rows, register by register.

A thread holds two rows of an accumulator (`half` 0 and 1, eight rows apart) and of every eight
columns two neighbours; four threads share a row. The functions for Pallas are at the end: starting
the products, the softmax of a block of keys, and the end of a tile of queries.

Products q k^T become floats without a conversion, of which a processor does 16 a clock. Their sums
begin at `PRODUCT_BITS`, the bits of 1.5 * 2**23. From 2**23 to 2**24 the floats are the integers,
and bits one more are the next one: so the bits of such a sum are the float 1.5 * 2**23 + q k^T,
exactly, as long as q k^T lies within +-2**22. Codes of 127 and heads of 128 make 127**2 * 128, less
than half of that. Their order as integers is that of the floats, so that maxima are integers' (one
H200, 4608 tokens, 24 heads of 128, 2026-11-28: 261 us for 279 by integer maxima, 250 by both).
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math, vector

from pallas_kernels import compat
from pallas_kernels.attention.operands import BLOCK
from pallas_kernels.attention.reference import E4M3_BIAS, TOP

ROWS = 64  # of a warpgroup: the first extent of wgmma
SUM_ROWS = 8  # rows of ones below V^T that are multiplied, the least that wgmma takes
ROW = plgpu.Layout.WGMMA.reduce(1)  # of a value for each row
SUMS = compat.GPU_SUMS_LAYOUT
# float16's smallest step: codes scaled by it are rounded to integers by the cast to float16, and
# the bits of its subnormals are those integers.
CODE_UNIT = 2.0**-24
PRODUCT_ZERO = 1.5 * 2.0**23  # the float of a product of 0: see above
PRODUCT_BITS = 0x4B400000  # its bits
Halves = list[list[ir.Value]]  # [half][column of this thread]


def swizzle(width: int, itemsize: int = 1) -> int:
    """Return the widest swizzle of rows of `width` elements, in bytes."""
    return next(x for x in (128, 64, 32) if width * itemsize % x == 0)


def transforms(
    width: int, itemsize: int = 1
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Return how rows of `width` elements lie in shared memory."""
    size = swizzle(width, itemsize)
    return plgpu.TilingTransform((8, size // itemsize)), plgpu.SwizzleTransform(size)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _constant(value: float) -> ir.Value:
    return mgpu.c(float(value), _f32())


def _assembly(result, operands, text: str, constraints: str, *, effects: bool = False) -> ir.Value:
    inline = compat.LLVM_DIALECT.inline_asm
    return inline(result, operands, text, constraints, has_side_effects=effects, asm_dialect=0)


def _exp2(x: ir.Value) -> ir.Value:
    return _assembly(_f32(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _item(register: ir.Value) -> ir.Value:
    return vector.extract(register, [], [0])


def _scalars(x: mgpu.FragmentedArray) -> Halves:
    """Return the elements of an array in the layout of sums."""
    columns = range(x.registers.shape[1])
    return [
        [_item(x.registers[0, j, 0, 0, half, 0, 0, 0, e, 0]) for j in columns for e in (0, 1)]
        for half in (0, 1)
    ]


def _from_scalars(like: mgpu.FragmentedArray, values: Halves) -> mgpu.FragmentedArray:
    """Undo `_scalars`."""
    registers = np.empty_like(like.registers)
    kind = like.registers.flat[0].type
    for half, row in enumerate(values):
        for i, value in enumerate(row):
            registers[0, i // 2, 0, 0, half, 0, 0, 0, i % 2, 0] = vector.broadcast(kind, value)
    return mgpu.FragmentedArray(
        _registers=registers, _layout=like.layout, _is_signed=like.is_signed
    )


def _rows(x: mgpu.FragmentedArray) -> list[ir.Value]:
    """Return the values of a thread's two rows."""
    return [_item(register) for register in x.registers.flat]


def _from_rows(like: mgpu.FragmentedArray, values: list[ir.Value]) -> mgpu.FragmentedArray:
    registers = np.empty_like(like.registers)
    kind = like.registers.flat[0].type
    for i, value in enumerate(values):
        registers.flat[i] = vector.broadcast(kind, value)
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


def _largest(values: list[ir.Value]) -> ir.Value:
    """Return a row's largest integer: four chains, then over the four threads of the row."""
    chains = [functools.reduce(arith.maxsi, values[i::4]) for i in range(4)]
    best = functools.reduce(arith.maxsi, chains)
    for distance in (1, 2):
        best = arith.maxsi(best, utils.shfl_bfly(best, distance))
    return best


def _product(bits: ir.Value) -> ir.Value:
    """Return `PRODUCT_ZERO` plus the product that began at `PRODUCT_BITS`, as float32."""
    return arith.bitcast(_f32(), bits)


def _pack_codes(codes: list[ir.Value]) -> ir.Value:
    """Round four codes, in `CODE_UNIT`s, to the bytes of a register; negative ones become 0."""
    text = (
        "{ .reg .b32 lo, hi; cvt.rn.relu.f16x2.f32 lo, $2, $1; "
        "cvt.rn.relu.f16x2.f32 hi, $4, $3; prmt.b32 $0, lo, hi, 0x6420; }"
    )
    return _assembly(_i32(), codes, text, "=r,f,f,f,f")


def _probabilities(codes: Halves) -> mgpu.FragmentedArray:
    """Return codes as the first operand of the second product, float8 [ROWS, BLOCK]."""
    registers = np.empty((1, BLOCK // 16, 1, 1, 2, 1, 1, 1, 1), dtype=object)
    bytes_, kind = ir.IntegerType.get_signless(8), ir.Float8E4M3FNType.get()
    for half, row in enumerate(codes):
        for j in range(BLOCK // 16):
            word = vector.broadcast(
                ir.VectorType.get((1,), _i32()), _pack_codes(row[4 * j : 4 * j + 4])
            )
            four = vector.bitcast(ir.VectorType.get((4,), bytes_), word)
            four = vector.bitcast(ir.VectorType.get((4,), kind), four)
            registers[0, j, 0, 0, half, 0, 0, 0, 0] = four
    return mgpu.FragmentedArray(
        _registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=None
    )


def _softmax(
    products: Halves, maximum: list[ir.Value], unit: list[ir.Value]
) -> tuple[Halves, list[ir.Value], list[ir.Value]]:
    """Return codes of the probabilities, the new maxima and the factor of what was summed before.

    Args:
      products: int32 of codes, above `PRODUCT_BITS`.
      maximum: of each row so far, in octaves (log2).
      unit: octaves of a product of one.
    """
    codes: Halves = []
    maxima: list[ir.Value] = []
    factors: list[ir.Value] = []
    for half in (0, 1):
        largest = arith.subf(_product(_largest(products[half])), _constant(PRODUCT_ZERO))
        best = arith.maximumf(maximum[half], arith.mulf(largest, unit[half]))
        factors.append(_exp2(arith.subf(maximum[half], best)))
        maxima.append(best)
        # The code of 2**y is 8 (y + bias), linear between octaves: see `reference.probabilities`.
        step = _constant(8 * CODE_UNIT)
        slope = arith.mulf(unit[half], step)
        offset = math.fma(
            arith.subf(_constant(TOP), best), step, _constant(8 * E4M3_BIAS * CODE_UNIT)
        )
        # If scales allow logits of 2**n octaves, this is off by 2**(n - 18) of a code at most.
        offset = math.fma(_constant(-PRODUCT_ZERO), slope, offset)
        codes.append([math.fma(_product(value), slope, offset) for value in products[half]])
    return codes, maxima, factors


def _add_scaled(added: mgpu.FragmentedArray, sums: mgpu.FragmentedArray, factor: list) -> Halves:
    """Return sums * factor + added, with a factor for each row."""
    pairs = zip(_scalars(sums), _scalars(added), factor, strict=True)
    return [[math.fma(s, f, a) for s, a in zip(old, new, strict=True)] for old, new, f in pairs]


def _commit() -> None:
    void = ir.Type.parse("!llvm.void")
    _assembly(void, [], "wgmma.commit_group.sync.aligned;", "", effects=True)


def _wait() -> None:
    void = ir.Type.parse("!llvm.void")
    _assembly(void, [], "wgmma.wait_group.sync.aligned 0;", "", effects=True)


def _multiply(start: ir.Value, shape: tuple[int, int], a, b, *, width: int) -> mgpu.FragmentedArray:
    """Start start + a b^T, whose rows of b are `width` bytes; nothing waits for it here."""
    signed = True if start.type == _i32() else None
    zeros = mgpu.FragmentedArray.splat(start, shape, compat.GPU_SUMS_REGISTERS, is_signed=signed)
    sums = mgpu.WGMMAAccumulator.from_registers(zeros)
    transposed = utils.memref_transpose(b, (1, 0, 3, 2))
    sums = mgpu.wgmma(sums, a, transposed, swizzle=swizzle(width))
    _commit()
    return sums._value


def _multiply_qk(q, k, d: int) -> mgpu.FragmentedArray:
    return _multiply(mgpu.c(PRODUCT_BITS, _i32()), (ROWS, BLOCK), q, k, width=d)


def _multiply_pv(p, v, d: int) -> mgpu.FragmentedArray:
    return _multiply(_constant(0.0), (ROWS, d + SUM_ROWS), p, v, width=BLOCK)


def _shape(columns: int, dtype, layout) -> plgpu.ShapeDtypeStruct:
    shape = (ROWS, columns) if columns else (ROWS,)
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)


def products_type() -> plgpu.ShapeDtypeStruct:
    """Return the type of `PRODUCT_BITS` + q k^T of a block of keys."""
    return _shape(BLOCK, jnp.int32, SUMS)


def probabilities_type() -> plgpu.ShapeDtypeStruct:
    """Return the type of a block's probabilities."""
    return _shape(BLOCK, jnp.float8_e4m3fn, plgpu.Layout.WGMMA_8BIT)


def sums_type(d: int) -> plgpu.ShapeDtypeStruct:
    """Return the type of p v, with the sums of p behind it."""
    return _shape(d + SUM_ROWS, jnp.float32, SUMS)


def row_type() -> plgpu.ShapeDtypeStruct:
    """Return the type of a value for each row."""
    return _shape(0, jnp.float32, ROW)


def start_qk(d: int) -> Callable:
    """Return (q, k) to `PRODUCT_BITS` + q k^T, of which nothing may be read before a wait."""
    ref = plgpu.RefType(transforms(d))

    @plgpu.inline_mgpu(arg_types=(ref, ref), return_type=products_type())
    def start(ctx, q, k):
        del ctx
        return _multiply_qk(q, k, d)

    return start


def start_both(d: int) -> Callable:
    """Return (q, k, p, v) to q k^T of a block and p v of the one before, to be waited for."""
    ref, p = plgpu.RefType(transforms(d)), probabilities_type().layout
    v_ref = plgpu.RefType(transforms(BLOCK))

    @plgpu.inline_mgpu(arg_types=(ref, ref, p, v_ref), return_type=(products_type(), sums_type(d)))
    def start(ctx, q, k, p, v):
        del ctx
        added = _multiply_pv(p, v, d)
        return _multiply_qk(q, k, d), added

    return start


def first_softmax() -> Callable:
    """Return (products, maximum, unit) to p, the new maximum and the factor of earlier sums."""
    row = row_type()
    args = products_type().layout, row.layout, row.layout

    @plgpu.inline_mgpu(arg_types=args, return_type=(probabilities_type(), row, row))
    def softmax(ctx, products, maximum, unit):
        del ctx
        codes, maxima, factors = _softmax(_scalars(products), _rows(maximum), _rows(unit))
        return _probabilities(codes), _from_rows(maximum, maxima), _from_rows(maximum, factors)

    return softmax


def softmax_and_sums(d: int) -> Callable:
    """Return what does as `first_softmax` and adds the product of the block before to the sums.

    The sums are in true float32: those within a product are short of bits in float8 units, and so
    hold one block.
    """
    row, sums_ = row_type(), sums_type(d)
    args = products_type().layout, row.layout, row.layout, sums_.layout, sums_.layout, row.layout

    @plgpu.inline_mgpu(arg_types=args, return_type=(probabilities_type(), row, row, sums_))
    def softmax(ctx, products, maximum, unit, added, sums, factor):
        del ctx
        codes, maxima, factors = _softmax(_scalars(products), _rows(maximum), _rows(unit))
        p, total = _probabilities(codes), _add_scaled(added, sums, _rows(factor))
        rows = (_from_rows(maximum, values) for values in (maxima, factors))
        return p, *rows, _from_scalars(added, total)

    return softmax


def last_product(d: int) -> Callable:
    """Return (p, v, sums, factor) to the rows' results, float32 [ROWS, d]: the last block's p v."""
    p, v_ref = probabilities_type().layout, plgpu.RefType(transforms(BLOCK))
    args = p, v_ref, sums_type(d).layout, row_type().layout
    result = _shape(d, jnp.float32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=args, return_type=result)
    def last(ctx, p, v, sums, factor):
        del ctx
        added = _multiply_pv(p, v, d)
        _wait()
        registers = np.empty((1, d // 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        kind = ir.VectorType.get((2,), _f32())
        for half, row in enumerate(_add_scaled(added, sums, _rows(factor))):
            # Behind the d / 4 columns of this thread comes the sum of the probabilities.
            inverse = _assembly(_f32(), [row[d // 4]], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
            for j in range(d // 8):
                pair = compat.LLVM_DIALECT.mlir_undef(kind)
                for e in (0, 1):
                    pair = vector.insert(arith.mulf(row[2 * j + e], inverse), pair, [], [e])
                registers[0, j, 0, 0, half, 0, 0, 0, 0] = pair
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    return last
