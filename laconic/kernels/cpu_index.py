"""The vote on 8-bit keys on the CPU: sixteen tokens and four dimensions a time."""

from __future__ import annotations

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numba as nb
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic

from laconic.kernels import cpu
from laconic.kernels.index import QUAD, TILE, ZERO, KeyIndex

HEADS = 4  # query heads per pass over a tile
HAS_VNNI = bool(llvm.get_host_cpu_features().get("avx512vnni", False))
_DOT = "llvm.x86.avx512.vpdpbusd.512"


@intrinsic
def _tile_fast(context, keys, query, output, quads):
    """The four by sixteen dot products of ``_tile_plain`` with the byte dot-product instruction of AVX-512 VNNI.

    Addresses: ``keys`` (quads, 64) uint8, ``query`` (4, quads * 4) int8, ``output`` (4, 16) int32.
    """

    def generate(context, builder, signature, args):
        word, byte = ir.IntType(32), ir.IntType(8)
        lanes, bytes_ = ir.VectorType(word, TILE), ir.VectorType(byte, TILE * QUAD)
        keys, query, output, quads = args
        take_bytes = llvm.llvm_version_info >= (22,)
        operand = bytes_ if take_bytes else lanes
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(lanes, [lanes, operand, operand]), _DOT)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(lanes, None)) for _ in range(HEADS)]
        size = ir.IntType(64)
        with cgutils.for_range(builder, quads) as loop:
            at = builder.add(keys, builder.mul(loop.index, size(TILE * QUAD)))
            key = builder.load(builder.inttoptr(at, operand.as_pointer()), align=1)
            for head, total in enumerate(sums):
                offset = builder.add(builder.mul(quads, size(head * QUAD)), builder.mul(loop.index, size(QUAD)))
                pair = builder.load(builder.inttoptr(builder.add(query, offset), word.as_pointer()), align=1)
                single = builder.insert_element(ir.Constant(lanes, ir.Undefined), pair, ir.IntType(32)(0))
                mask = ir.Constant(ir.VectorType(word, TILE), [0] * TILE)
                spread = builder.shuffle_vector(single, ir.Constant(lanes, ir.Undefined), mask)
                spread = builder.bitcast(spread, operand) if take_bytes else spread
                builder.store(builder.call(function, [builder.load(total), key, spread]), total)
        for head, total in enumerate(sums):
            at = builder.add(output, size(head * TILE * 4))
            store = builder.store(builder.load(total), builder.inttoptr(at, lanes.as_pointer()))
            store.align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@nb.njit(nogil=True, cache=True)
def _tile_plain(keys, query, output):
    """output[h, t] = sum over dimensions of unsigned key byte times signed query byte, for a tile (quads, 64)."""
    output[:] = 0
    for quad in range(keys.shape[0]):
        for h in range(HEADS):
            for t in range(TILE):
                for i in range(QUAD):
                    output[h, t] += np.int32(keys[quad, t * QUAD + i]) * np.int32(query[h, quad * QUAD + i])


@nb.njit(nogil=True, cache=True)
def _tile(keys, query, output):
    if HAS_VNNI:
        _tile_fast(
            np.int64(keys.ctypes.data), np.int64(query.ctypes.data), np.int64(output.ctypes.data), np.int64(keys.shape[0])
        )
    else:
        _tile_plain(keys, query, output)


@nb.njit(nogil=True, cache=True)
def _logits(products, offset, factor, scales, row):
    """row = (product - offset) * scales * factor: a loop over a slice from 0 becomes SIMD, one from ``first`` does not."""
    for j in range(row.shape[0]):
        row[j] = np.float32(products[j] - offset) * (scales[j] * factor)


@nb.njit(parallel=True, nogil=True, cache=True)
def _vote_chunks(query, query_scales, data, scales, starts, stop, weights, tops, sums):
    """As ``cpu._vote_chunks``, from bytes: query int8 (batch, kv_heads, group, d) with a factor each (batch, kv_heads, group)."""
    batch, kv_heads, group, _ = query.shape
    chunks = tops.shape[3]
    for job in nb.prange(batch * kv_heads * chunks):
        task = np.int64(job)
        b, rest = divmod(task, kv_heads * chunks)
        h, chunk = divmod(rest, chunks)
        begin, end = max(chunk * cpu.CHUNK, starts[b, h]), min((chunk + 1) * cpu.CHUNK, stop)
        products = np.empty((HEADS, TILE), np.int32)
        for g in range(0, group, HEADS):
            offsets = np.zeros(HEADS, np.int32)
            for i in range(HEADS):
                for x in query[b, h, g + i]:
                    offsets[i] += np.int32(ZERO) * np.int32(x)
            for tile in range(begin // TILE, (end + TILE - 1) // TILE):
                _tile(data[b, h, tile], query[b, h, g : g + HEADS], products)
                first, last = max(begin, tile * TILE), min(end, (tile + 1) * TILE)
                lanes = slice(first - tile * TILE, last - tile * TILE)
                for i in range(HEADS):
                    _logits(
                        products[i, lanes], offsets[i], query_scales[b, h, g + i], scales[b, h, first:last],
                        weights[b, h, g + i, first:last],
                    )  # fmt: skip
        for g in range(group):
            cpu._soften(weights[b, h, g, begin:end], tops[b, h, g], sums[b, h, g], chunk)


def vote(query: torch.Tensor, index: KeyIndex, *, scale: float, starts=None, stop=None, over="layer") -> torch.Tensor:
    batch, kv_heads = index.scales.shape[:2]
    group, n = query.shape[1] // kv_heads, index.n
    grouped = torch.from_numpy(cpu._grouped(query, kv_heads))
    steps = grouped.abs().amax(-1).clamp(min=1e-12) / 127
    codes = (grouped / steps[..., None]).round().to(torch.int8).numpy()
    stop = n if stop is None else min(stop, n)
    chunks = max(1, -(-stop // cpu.CHUNK))
    weights = np.empty((*codes.shape[:3], n), np.float32)
    tops = np.full((*codes.shape[:3], chunks), cpu.NEGATIVE, np.float32)
    sums = np.zeros_like(tops)
    first = cpu._starts(starts, batch, kv_heads)
    cpu.use_threads(index.bytes)
    _vote_chunks(
        codes, (steps * scale).numpy(), index.data.numpy(), index.scales.numpy(), first, stop, weights, tops, sums
    )
    return cpu.tally(weights[:, :, :group], tops[:, :, :group], sums[:, :, :group], first, stop, over)
