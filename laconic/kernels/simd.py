"""The innermost loops of the CPU kernels, as vector code that LLVM fits to the processor at hand.

They take four query heads and four rows (keys or values) at a time, so that every number loaded is used four times. Rows
are offsets in elements into a flat array: float32, bfloat16 (its bits as uint16) or float16 (its bits as int16). While four
rows are worked on, those ``AHEAD`` rows later are asked for, line by line: a processor's own prefetchers stop at the end of
a page and know nothing of rows that lie anywhere, and work on a row that has yet to come from memory would wait for it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba.core import cgutils, types
from numba.extending import intrinsic

FEATURES = llvm.get_host_cpu_features()
LANES = 16 if FEATURES.get("avx512f", False) else 8 if FEATURES.get("avx2", False) else 4  # floats in a register
HAS_HALF = bool(FEATURES.get("f16c", False)) or platform.machine().lower() in ("arm64", "aarch64")  # float16 to float32
HEADS = 4  # query heads at a time
ROWS = 4  # keys or values at a time
AHEAD = 3 * ROWS  # rows are asked for so many rows before they are needed, into the second-level cache
CHUNKS = (2, 1)  # registers of a row that are worked on without a loop
_FLOAT, _WORD, _SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FAST = ("contract", "reassoc")


def vector(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def spread(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    """A vector with ``scalar`` in every lane."""
    blank = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    single = builder.insert_element(blank, scalar, _WORD(0))
    return builder.shuffle_vector(single, blank, ir.Constant(vector(_WORD, lanes), [0] * lanes))


def array(context: Any, builder: ir.IRBuilder, kind: types.Array, value: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
    """Pointer to the first element, and the shape, of a contiguous array."""
    made = context.make_array(kind)(context, builder, value)
    return made.data, cgutils.unpack_tuple(builder, made.shape, kind.ndim)


def at(builder: ir.IRBuilder, pointer: ir.Value, *offsets: ir.Value) -> ir.Value:
    """Pointer to the element at the sum of ``offsets``."""
    total = offsets[0]
    for offset in offsets[1:]:
        total = builder.add(total, offset)
    return builder.gep(pointer, [total])


def _load(builder: ir.IRBuilder, pointer: ir.Value, kind: types.Type) -> ir.Value:
    """``LANES`` stored elements from ``pointer`` on, as floats."""
    floats = vector(_FLOAT)
    if kind == types.float32:
        return builder.load(builder.bitcast(pointer, floats.as_pointer()), align=4)
    if kind == types.int16:
        halves = builder.load(builder.bitcast(pointer, vector(ir.HalfType()).as_pointer()), align=2)
        return builder.fpext(halves, floats)
    bits = builder.load(builder.bitcast(pointer, vector(ir.IntType(16)).as_pointer()), align=2)
    words = builder.zext(bits, vector(_WORD))
    return builder.bitcast(builder.shl(words, spread(builder, _WORD(16))), floats)


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    return builder.fadd(total, builder.fmul(a, b, flags=_FAST), flags=_FAST)


def _sum_lanes(builder: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """The sums over the lanes of ``vectors``, in order, packed into len(vectors) / LANES vectors."""
    even = ir.Constant(vector(_WORD), list(range(0, 2 * LANES, 2)))
    odd = ir.Constant(vector(_WORD), list(range(1, 2 * LANES, 2)))
    for _ in range(LANES.bit_length() - 1):
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd), flags=_FAST)
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors


def _chunked(builder: ir.IRBuilder, dim: ir.Value, work: Callable[[ir.Value, int], None]) -> None:
    """Calls ``work(first element, registers)`` for the whole registers of ``dim`` elements, the longest runs first."""
    done = _SIZE(0)
    for registers in CHUNKS:
        size = _SIZE(registers * LANES)
        count = builder.udiv(builder.sub(dim, done), size)
        with cgutils.for_range(builder, count) as loop:
            work(builder.add(done, builder.mul(loop.index, size)), registers)
        done = builder.add(done, builder.mul(count, size))


def _prefetch(builder: ir.IRBuilder, pointer: ir.Value) -> None:
    """Asks for the cache line of ``pointer``; any address will do, also one beyond the array."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(pointer, byte), _WORD(0), _WORD(2), _WORD(1)])  # read, second level, data


def _four(builder: ir.IRBuilder, rows: ir.Value, first: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
    """The offsets rows[first..first+3], and those that are to be asked for meanwhile."""
    places = [builder.add(first, _SIZE(j)) for j in range(ROWS)]
    now = [builder.load(at(builder, rows, place)) for place in places]
    return now, [builder.load(at(builder, rows, place, _SIZE(AHEAD))) for place in places]


@intrinsic
def dots(typing, query, head, keys, rows, first, scale, logits, column):
    """logits[head..head+3, column..column+3] = scale * q.k over the first dim // LANES * LANES dimensions.

    ``query`` float32 (group, dim) and ``logits`` float32 (group, any), both contiguous. The keys are at the offsets
    rows[first..first+3]; ``rows`` goes on for ``AHEAD`` entries more, which are only asked for.
    """

    def generate(context, builder, signature, arguments):
        kinds = signature.args
        query, (_, dim) = array(context, builder, kinds[0], arguments[0])
        keys, _ = array(context, builder, kinds[2], arguments[2])
        rows, _ = array(context, builder, kinds[3], arguments[3])
        logits, (_, width) = array(context, builder, kinds[6], arguments[6])
        scale, column = arguments[5], arguments[7]
        now, later = _four(builder, rows, arguments[4])
        heads = [builder.add(arguments[1], _SIZE(h)) for h in range(HEADS)]
        zero = ir.Constant(vector(_FLOAT), None)
        sums = [cgutils.alloca_once(builder, zero.type) for _ in range(HEADS * ROWS)]
        for total in sums:
            builder.store(zero, total)

        def work(start, registers):
            for j in range(ROWS):
                for r in range(registers):
                    d = builder.add(start, _SIZE(r * LANES))
                    _prefetch(builder, at(builder, keys, later[j], d))
                    key = _load(builder, at(builder, keys, now[j], d), kinds[2].dtype)
                    for h in range(HEADS):
                        q = _load(builder, at(builder, query, builder.mul(heads[h], dim), d), types.float32)
                        total = sums[h * ROWS + j]
                        builder.store(_multiply_add(builder, q, key, builder.load(total)), total)

        _chunked(builder, dim, work)
        packed = _sum_lanes(builder, [builder.load(total) for total in sums])
        packed = [builder.fmul(part, spread(builder, scale), flags=_FAST) for part in packed]
        for h in range(HEADS):
            part, lane = packed[h * ROWS // LANES], h * ROWS % LANES
            four = builder.shuffle_vector(part, part, ir.Constant(vector(_WORD, ROWS), list(range(lane, lane + ROWS))))
            to = at(builder, logits, builder.mul(heads[h], width), column)
            builder.store(four, builder.bitcast(to, four.type.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(query, i, keys, rows, i, types.float32, logits, i), generate


@intrinsic
def add_rows(typing, weights, head, values, rows, first, output):
    """output[head..head+3] += sum over j < 4 of weights[head.., first + j] * values[rows[first + j]], in whole registers.

    ``weights`` float32 (group, any) and ``output`` float32 (group, dim), both contiguous; ``rows`` as in ``dots``.
    """

    def generate(context, builder, signature, arguments):
        kinds = signature.args
        weights, (_, width) = array(context, builder, kinds[0], arguments[0])
        values, _ = array(context, builder, kinds[2], arguments[2])
        rows, _ = array(context, builder, kinds[3], arguments[3])
        output, (_, dim) = array(context, builder, kinds[5], arguments[5])
        now, later = _four(builder, rows, arguments[4])
        heads = [builder.add(arguments[1], _SIZE(h)) for h in range(HEADS)]
        places = [(h, builder.add(arguments[4], _SIZE(j))) for h in heads for j in range(ROWS)]
        factors = [
            spread(builder, builder.load(at(builder, weights, builder.mul(h, width), place))) for h, place in places
        ]

        def work(start, registers):
            for r in range(registers):
                d = builder.add(start, _SIZE(r * LANES))
                for row in later:
                    _prefetch(builder, at(builder, values, row, d))
                loaded = [_load(builder, at(builder, values, row, d), kinds[2].dtype) for row in now]
                for h in range(HEADS):
                    to = at(builder, output, builder.mul(heads[h], dim), d)
                    total = _load(builder, to, types.float32)
                    for j in range(ROWS):
                        total = _multiply_add(builder, factors[h * ROWS + j], loaded[j], total)
                    builder.store(total, builder.bitcast(to, total.type.as_pointer()), align=4)

        _chunked(builder, dim, work)
        return context.get_dummy_value()

    i = types.int64
    return types.void(weights, i, values, rows, i, output), generate


@intrinsic
def as_float(typing, value):
    """One stored element as float32."""

    def generate(context, builder, signature, arguments):
        kind = signature.args[0]
        if kind == types.float32:
            return arguments[0]
        if kind == types.int16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), _FLOAT)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _WORD), _WORD(16)), _FLOAT)

    return types.float32(value), generate


@intrinsic
def power_of_two(typing, exponent):
    """2 ** exponent for an int32 in the range of float32, by writing the exponent bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.shl(builder.add(arguments[0], _WORD(127)), _WORD(23)), _FLOAT)

    return types.float32(types.int32), generate
