"""Runs the assembly of kernels on arrays: the few PTX instructions that are in it (PTX ISA 8.5)."""

import re

import ml_dtypes
import numpy as np


def run(code: str, outputs: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """Return the outputs $0, $1, ... of a block, uint32 each, from 32-bit inputs of one shape."""
    registers = {f"${outputs + i}": np.asarray(x).view(np.uint32) for i, x in enumerate(inputs)}
    declared = set()
    for statement in code.strip().removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        operands = [part.strip() for part in re.split(r",\s*", rest)] if rest else []
        if name == ".reg":
            declared |= {part.split()[-1] for part in operands}
        elif name:
            target, *read = operands
            assert target in declared or target.removeprefix("$") in map(str, range(outputs))
            values = [_value(operand, registers) for operand in read]
            result = INSTRUCTIONS[name](*values)
            assert result.dtype.itemsize == 4
            registers[target] = result.view(np.uint32)
    return [registers[f"${i}"] for i in range(outputs)]


def _value(operand: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    if operand.startswith("0f"):
        return np.uint32(int(operand[2:], 16))
    return registers[operand] if operand in registers else np.uint32(int(operand, 0))


def _floats(function):
    """Return a function of words from one of float32."""

    def wrapped(*words):
        with np.errstate(all="ignore"):
            return np.asarray(function(*(w.view(np.float32) for w in words)), np.float32)

    return wrapped


def _words(function):
    return lambda *words: np.asarray(function(*(np.asarray(w) for w in words))).astype(np.uint32)


def _fma(a, b, c):
    # The product is exact in float64; the sum too, where its terms are as near as they are here.
    return a.astype(np.float64) * b + c


def _permute(low, high, selector):
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(low, high, selector).shape, np.uint64)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)).astype(np.uint64) & np.uint64(15)
        byte = both >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        result |= np.where(nibble >> np.uint64(3), sign, byte) << np.uint64(8 * i)
    return result


def _pairs(dtype):
    """Return what rounds two float32 to a word, the second in its lower half."""

    def convert(high, low):
        halves = [np.asarray(w.view(np.float32)).astype(dtype).view(np.uint16) for w in (low, high)]
        return halves[0] | halves[1].astype(np.uint32) << np.uint32(16)

    return convert


INSTRUCTIONS = {
    "mov.b32": _words(lambda a: a),
    "prmt.b32": _words(_permute),
    "shr.u32": _words(lambda a, b: a >> b),
    "shl.b32": _words(lambda a, b: a << b),
    "and.b32": _words(lambda a, b: a & b),
    "xor.b32": _words(lambda a, b: a ^ b),
    "add.u32": _words(lambda a, b: a + b),
    "sub.u32": _words(lambda a, b: a - b),
    "mad.lo.u32": _words(lambda a, b, c: a * b + c),
    # Of the truth tables only the choice by a mask: (a & b) | (~a & c).
    "lop3.b32": _words(lambda a, b, c, table: {0xCA: (a & b) | (~a & c)}[int(table)]),
    "mul.rn.f32": _floats(lambda a, b: a * b),
    "add.rn.f32": _floats(lambda a, b: a + b),
    "sub.rn.f32": _floats(lambda a, b: a - b),
    "min.f32": _floats(np.minimum),
    "fma.rn.f32": _floats(_fma),
    "cvt.rn.bf16x2.f32": _pairs(ml_dtypes.bfloat16),
    "cvt.rn.f16x2.f32": _pairs(np.float16),
}
