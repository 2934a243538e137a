"""The compiled loops of the CPU path, in the subset of Python that numba turns into machine code. Driven by cpu.py.

What makes them fast, in the order of what it buys:

  * bf16 and f16 are rounded by comparing integers (tables.py): per block one maximum, 15 thresholds, then compare and count,
    16 weights per 256-bit vector; float32 multiplies once and compares 8 at a time;
  * counts go to a small scratch that never leaves L1, and are packed from there two at a time;
  * dequantizing computes the 16 possible values of a block in registers, splits them into byte planes (all low bytes, all
    high bytes), and looks up 16 codes with one shuffle instruction per plane. LLVM does not find that by itself, so this step
    is written in its language (llvmlite), which numba splices into the loop.

What keeps LLVM willing: unsigned indices (a signed one could be negative, i.e. count from the end), constant trip counts,
scalars for the thresholds, one narrow integer type throughout. Tried and slower: a binary search over the thresholds with
selects, a select tree or plain loads instead of the shuffle, one maximum per lane. Fast-math stays off: subnormals and every last
bit must survive. The shuffle is x86's PSHUFB; other machines get the same loop with 16 plain loads.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from halfbyte.codec.codebook import NESTED_BINS, NESTED_BLOCKSIZE, SMALLEST_SCALE

HAS_PSHUFB = platform.machine().lower() in ("x86_64", "amd64")

_BYTES = ir.VectorType(ir.IntType(8), 16)


def quantize_16bit(weight, thresholds, values, packed, absmax, blocksize):
    """int16 [n] bits of whole blocks -> packed and absmax, by the tables of tables.py."""
    counts = np.empty(64, np.int16)
    size = np.uintp(blocksize)
    for block in range(absmax.size):
        start = np.uintp(block) * size
        top = np.int16(0)
        for i in range(size):
            top = max(top, np.int16(weight[start + np.uintp(i)] & np.int16(0x7FFF)))
        absmax[block] = values[np.uintp(top)]
        t = thresholds[np.uintp(top)]
        t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
        t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
        for part in range(np.uintp(0), size, np.uintp(32)):
            first = start + np.uintp(part)
            for i in range(32):
                bits = weight[first + np.uintp(i)]
                key = np.int16(bits ^ np.int16((bits >> np.int16(15)) & np.int16(0x7FFF)))
                low = np.int16((key > t0) + (key > t1) + (key > t2) + (key > t3))
                low = np.int16(low + (key > t4) + (key > t5) + (key > t6) + (key > t7))
                low = np.int16(low + (key > t8) + (key > t9) + (key > t10) + (key > t11))
                counts[i] = low + (key > t12) + (key > t13) + (key > t14)
            byte = first >> np.uintp(1)
            for i in range(16):
                packed[byte + np.uintp(i)] = (counts[2 * i] << 4) | counts[2 * i + 1]


def quantize_f32(bits, floats, midpoints, packed, magnitudes, absmax, blocksize):
    """float32 [n] of whole blocks -> packed and absmax. `bits` is the memory of `floats` as int32, `magnitudes` of `absmax`.

    The maximum is taken over bits, where NaN is larger than infinity and infinity than everything else.
    """
    counts = np.empty(64, np.int32)
    size = np.uintp(blocksize)
    m0, m1, m2, m3, m4 = midpoints[0], midpoints[1], midpoints[2], midpoints[3], midpoints[4]
    m5, m6, m7, m8, m9 = midpoints[5], midpoints[6], midpoints[7], midpoints[8], midpoints[9]
    m10, m11, m12, m13, m14 = midpoints[10], midpoints[11], midpoints[12], midpoints[13], midpoints[14]
    for block in range(magnitudes.size):
        start = np.uintp(block) * size
        top = np.int32(0)
        for i in range(size):
            top = max(top, np.int32(bits[start + np.uintp(i)] & np.int32(0x7FFFFFFF)))
        magnitudes[block] = top
        inverse = np.float32(1.0) / max(absmax[block], np.float32(SMALLEST_SCALE))
        for part in range(np.uintp(0), size, np.uintp(32)):
            first = start + np.uintp(part)
            for i in range(32):
                x = floats[first + np.uintp(i)] * inverse
                low = np.int32((x > m0) + (x > m1) + (x > m2) + (x > m3) + (x > m4))
                low = np.int32(low + (x > m5) + (x > m6) + (x > m7) + (x > m8) + (x > m9))
                counts[i] = low + (x > m10) + (x > m11) + (x > m12) + (x > m13) + (x > m14)
            byte = first >> np.uintp(1)
            for i in range(16):
                packed[byte + np.uintp(i)] = (counts[2 * i] << 4) | counts[2 * i + 1]


def nest(centred, table, codes, largest):
    """Level 2 (reference.nest_absmax): float32 [blocks] -> codes and each row's largest magnitude."""
    half, one, last = np.float32(0.5), np.float32(1.0), np.float32(NESTED_BINS - 1)
    for row in range(largest.size):
        begin = row * NESTED_BLOCKSIZE
        end = min(begin + NESTED_BLOCKSIZE, centred.size)
        top = np.float32(0.0)
        for i in range(begin, end):
            top = max(top, abs(centred[i]))
        largest[row] = top
        inverse = one / top
        for i in range(begin, end):
            x = centred[i] * inverse
            if x == x:
                x = min(max(x, -one), one)
                codes[i] = table[np.uintp((x + one) * half * last + half)]
            else:
                codes[i] = 0


def _shuffle(builder, table, codes):
    """table[code] for 16 codes below 16 at once: <16 x i8>, <16 x i8> -> <16 x i8>."""
    if HAS_PSHUFB:
        signature = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
        pshufb = get_or_insert_function(builder.module, signature, "llvm.x86.ssse3.pshuf.b.128")
        return builder.call(pshufb, [table, codes])
    result = ir.Constant(_BYTES, ir.Undefined)
    for lane in map(ir.IntType(32), range(16)):
        entry = builder.extract_element(table, builder.extract_element(codes, lane))
        result = builder.insert_element(result, entry, lane)
    return result


def _interleave(builder, even, odd, begin, end):
    """even[begin], odd[begin], even[begin + 1], ... up to `end`, as one vector."""
    order = [index for lane in range(begin, end) for index in (lane, lane + even.type.count)]
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
    return builder.shuffle_vector(even, odd, mask)


def _planes(builder, products, kind):
    """<16 x float> -> the 16 values as `kind`, split into bytes: [<16 x i8> of byte 0 of each, of byte 1, ...]."""
    words = ir.VectorType(ir.IntType(32), 16)

    def constant(value):
        return ir.Constant(words, [value] * 16)

    values = builder.bitcast(products, words)
    if kind == "f16":
        half = builder.fptrunc(products, ir.VectorType(ir.HalfType(), 16))
        values = builder.zext(builder.bitcast(half, ir.VectorType(ir.IntType(16), 16)), words)
    elif kind == "bf16":  # not fptrunc: AVX512's instruction flushes subnormals
        even = builder.and_(builder.lshr(values, constant(16)), constant(1))
        rounded = builder.lshr(builder.add(values, builder.add(even, constant(0x7FFF))), constant(16))
        is_nan = builder.fcmp_unordered("uno", products, products)
        values = builder.select(is_nan, constant(0x7FC0), rounded)
    width = 4 if kind == "f32" else 2
    return [builder.trunc(builder.lshr(values, constant(8 * k)), _BYTES) for k in range(width)]


#: numba type of a result's elements -> the format whose bits they are (numba has no bf16)
_KINDS = {types.int16: "bf16", types.uint16: "f16", types.float32: "f32"}


@intrinsic
def _expand(typingctx, packed, byte, levels, scale, out):
    """The vector step of dequantizing: out[2 * byte : 2 * byte + 32] = values of the codes packed[byte : byte + 16].

    packed uint8, levels float32 [16], scale float32, out one of _KINDS; arrays flat
    """
    kind = _KINDS[out.dtype]

    def codegen(context, builder, signature, args):
        def pointer(position, index, vector):
            data = make_array(signature.args[position])(context, builder, args[position]).data
            data = builder.bitcast(data, ir.IntType(8).as_pointer())
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        index, floats = args[1].type, ir.VectorType(ir.FloatType(), 16)
        scales = builder.insert_element(ir.Constant(floats, ir.Undefined), args[3], ir.IntType(32)(0))
        scales = builder.shuffle_vector(scales, scales, ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16))
        products = builder.fmul(builder.load(pointer(2, index(0), floats), align=4), scales)
        tables = _planes(builder, products, kind)
        codes = builder.load(pointer(0, args[1], _BYTES), align=1)
        high = builder.lshr(codes, ir.Constant(_BYTES, [4] * 16))
        low = builder.and_(codes, ir.Constant(_BYTES, [15] * 16))
        start = builder.mul(args[1], index(2 * len(tables)))
        for half in (0, 8):
            chosen = _interleave(builder, high, low, half, half + 8)
            parts = [_shuffle(builder, table, chosen) for table in tables]
            while len(parts) > 1:  # bytes to 16-bit values, and those to 32-bit values
                joined = [_interleave(builder, a, b, 0, 16) for a, b in zip(parts[::2], parts[1::2], strict=True)]
                wide = ir.VectorType(ir.IntType(2 * parts[0].type.element.width), 16)
                parts = [builder.bitcast(part, wide) for part in joined]
            where = builder.add(start, index(2 * len(tables) * half))
            builder.store(parts[0], pointer(4, where, parts[0].type), align=1)
        return context.get_dummy_value()

    return types.void(packed, byte, levels, scale, out), codegen


def dequantize(packed, absmax, levels, out, blocksize):
    """packed codes of whole blocks -> values; the element type of `out` says which (_KINDS)."""
    half_block = np.uintp(blocksize >> 1)
    for block in range(absmax.size):
        first = np.uintp(block) * half_block
        for i in range(np.uintp(0), half_block, np.uintp(16)):
            _expand(packed, first + np.uintp(i), levels, absmax[block], out)


#: What numba compiles, and for which types.
SIGNATURES = {
    quantize_16bit: "void(int16[::1], int16[:,::1], float32[::1], uint8[::1], float32[::1], int64)",
    quantize_f32: "void(int32[::1], float32[::1], float32[::1], uint8[::1], int32[::1], float32[::1], int64)",
    nest: "void(float32[::1], uint8[::1], uint8[::1], float32[::1])",
    dequantize: [
        f"void(uint8[::1], float32[::1], float32[::1], {values}[::1], int64)"
        for values in ("int16", "uint16", "float32")
    ],
}

_compiling = threading.Lock()
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def compiled(loop: Callable[..., Any], signatures: str | Sequence[str]) -> Callable[..., Any]:
    """Machine code of a loop for those argument types: from numba's cache on disk, or made now (some seconds). Once a process."""
    with _compiling:
        if loop not in _compiled:
            _compiled[loop] = _compile(loop, signatures)
        return _compiled[loop]


def _compile(loop: Callable[..., Any], signatures: str | Sequence[str]) -> Callable[..., Any]:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signatures, cache=True, **options)(loop)  # type: ignore[no-any-return]
    except (RuntimeError, OSError):  # no folder to cache in (read-only install and home), or the disk is full
        return numba.njit(signatures, cache=False, **options)(loop)  # type: ignore[no-any-return]
