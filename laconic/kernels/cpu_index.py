"""The vote on 8-bit keys on the CPU, and logits of chosen ones: sixteen tokens and four dimensions at a time."""

from __future__ import annotations

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numba as nb
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic

from laconic.kernels import simd
from laconic.kernels.cpu_common import NEGATIVE, cap, first_slots, grouped, jit, largest, soften, use_threads
from laconic.kernels.cpu_scores import CHUNK, tally, vote_space
from laconic.kernels.index import QUAD, TILE, ZERO, KeyIndex
from laconic.kernels.simd import HEADS

HAS_VNNI = bool(simd.FEATURES.get("avx512vnni", False))
_DOT = "llvm.x86.avx512.vpdpbusd.512"


@intrinsic
def _tile_fast(typing, query, head, data, tile, bias, steps, scales, scale_at, logits, column):
    """``_tile_plain`` with the byte dot-product instruction of AVX-512 VNNI."""

    def generate(context, builder, signature, arguments):
        kinds, word, size = signature.args, ir.IntType(32), ir.IntType(64)
        (query, (_, dim)), (data, _), (bias, _), (steps, _), (scales, _), (logits, (_, width)) = (
            simd.array(context, builder, kinds[i], arguments[i]) for i in (0, 2, 4, 5, 6, 8)
        )
        tile, scale_at, column = arguments[3], arguments[7], arguments[9]
        heads = [builder.add(arguments[1], size(h)) for h in range(HEADS)]
        lanes, floats = simd.vector(word, TILE), simd.vector(ir.FloatType(), TILE)
        operand = simd.vector(ir.IntType(8), TILE * QUAD) if llvm.llvm_version_info >= (22,) else lanes
        dot = cgutils.get_or_insert_function(builder.module, ir.FunctionType(lanes, [lanes, operand, operand]), _DOT)
        sums = [cgutils.alloca_once(builder, lanes) for _ in range(HEADS)]
        for h, total in zip(heads, sums, strict=True):
            builder.store(simd.spread(builder, builder.load(simd.at(builder, bias, h)), TILE), total)
        with cgutils.for_range(builder, builder.udiv(dim, size(QUAD))) as loop:
            place = builder.add(tile, builder.mul(loop.index, size(TILE * QUAD)))
            key = builder.load(builder.bitcast(simd.at(builder, data, place), operand.as_pointer()), align=1)
            for h, total in zip(heads, sums, strict=True):
                place = builder.add(builder.mul(h, dim), builder.mul(loop.index, size(QUAD)))
                four = builder.load(builder.bitcast(simd.at(builder, query, place), word.as_pointer()), align=1)
                wide = builder.bitcast(simd.spread(builder, four, TILE), operand)
                builder.store(builder.call(dot, [builder.load(total), key, wide]), total)
        place = builder.bitcast(simd.at(builder, scales, scale_at), floats.as_pointer())
        token_scales = builder.load(place, align=4)
        for h, total in zip(heads, sums, strict=True):
            step = simd.spread(builder, builder.load(simd.at(builder, steps, h)), TILE)
            scaled = builder.fmul(builder.sitofp(builder.load(total), floats), builder.fmul(token_scales, step))
            to = simd.at(builder, logits, builder.mul(h, width), column)
            builder.store(scaled, builder.bitcast(to, floats.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(query, i, data, i, bias, steps, scales, i, logits, i), generate


@jit()
def _tile_plain(query, head, data, tile, bias, steps, scales, scale_at, logits, column):
    """Logits of four query heads and the sixteen tokens of a tile, from ``column`` on.

    Args:
        query: int8 ``(group, dim)``; bias int32 and steps float32 ``(group,)``: minus ZERO times the sum of a query, and
            the size of its units times the scale of the logits.
        data, tile: the bytes of all keys, flat, and where the tile begins; scales, scale_at: the same for the scales.
    """
    sums = np.empty(TILE, np.int32)
    for h in range(head, head + HEADS):
        sums[:] = bias[h]
        for i in range(query.shape[1]):
            place = tile + i // QUAD * (TILE * QUAD) + i % QUAD
            for t in range(TILE):
                sums[t] += np.int32(data[place + t * QUAD]) * np.int32(query[h, i])
        for t in range(TILE):
            logits[h, column + t] = np.float32(sums[t]) * (scales[scale_at + t] * steps[h])


@jit()
def _tile(query, head, data, tile, bias, steps, scales, scale_at, logits, column):
    if HAS_VNNI:
        _tile_fast(query, head, data, tile, bias, steps, scales, scale_at, logits, column)
    else:
        _tile_plain(query, head, data, tile, bias, steps, scales, scale_at, logits, column)


@jit(parallel=True)
def _vote_chunks(query, bias, steps, data, scales, capacity, starts, stop, softcap, weights, tops, sums):
    """As ``cpu_scores._vote_chunks``, from bytes; ``data`` and ``scales`` are flat, with ``capacity`` tokens per head."""
    batch, kv_heads, group, dim = query.shape
    chunks = tops.shape[3]
    for job in nb.prange(batch * kv_heads * chunks):
        task = np.int64(job)  # the index of prange is unsigned, which would turn sums into floats
        b, rest = divmod(task, kv_heads * chunks)
        h, chunk = divmod(rest, chunks)
        begin, end = max(chunk * CHUNK, starts[b, h]), min((chunk + 1) * CHUNK, stop)
        base = (b * kv_heads + h) * capacity
        if begin < end:
            for column in range(begin // TILE * TILE, end, TILE):
                for g in range(0, group, HEADS):
                    _tile(
                        query[b, h], g, data, (base + column) * dim, bias[b, h], steps[b, h], scales, base + column,
                        weights[b, h], column,
                    )  # fmt: skip
            for g in range(group):
                row = weights[b, h, g, begin:end]
                if softcap > 0:
                    cap(row, softcap)
                tops[b, h, g, chunk] = largest(row, NEGATIVE)
                sums[b, h, g, chunk] = soften(row, tops[b, h, g, chunk])


@jit(parallel=True)
def _logit_chunks(query, bias, steps, data, scales, capacity, indices, logits):
    """Logits (batch, kv_heads, group, n) of the tokens ``indices`` (batch, kv_heads, n), a tile at a time.

    Where the slots ascend, every tile that holds some of them is computed once.
    """
    batch, kv_heads, group, dim = query.shape
    n = indices.shape[2]
    chunks = (n + CHUNK - 1) // CHUNK
    for job in nb.prange(batch * kv_heads * chunks):
        task = np.int64(job)
        b, rest = divmod(task, kv_heads * chunks)
        h, chunk = divmod(rest, chunks)
        base = (b * kv_heads + h) * capacity
        tile, held = np.empty((group, TILE), np.float32), np.int64(-1)
        for j in range(chunk * CHUNK, min((chunk + 1) * CHUNK, n)):
            slot = indices[b, h, j]
            if slot < 0:
                logits[b, h, :, j] = NEGATIVE
                continue
            if slot // TILE != held:
                held = slot // TILE
                at = base + held * TILE
                for g in range(0, group, HEADS):
                    _tile(query[b, h], g, data, at * dim, bias[b, h], steps[b, h], scales, at, tile, 0)
            for g in range(group):
                logits[b, h, g, j] = tile[g, slot % TILE]


def _in_bytes(query: torch.Tensor, kv_heads: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``_tile_plain`` calls query, int8 ``(batch, kv_heads, group, dim)``, bias and steps ``(batch, kv_heads, group)``."""
    groups = torch.from_numpy(grouped(query, kv_heads))
    units = groups.abs().amax(-1).clamp(min=1e-12) / 127
    codes = (groups / units[..., None]).round().to(torch.int8)
    return codes.numpy(), (codes.sum(-1, dtype=torch.int32) * -ZERO).numpy(), (units * scale).numpy()


def logits(query: torch.Tensor, index: KeyIndex, indices: torch.Tensor, *, scale: float) -> torch.Tensor:
    batch, kv_heads, capacity = index.scales.shape
    chosen = np.ascontiguousarray(indices.expand(batch, kv_heads, -1).numpy())
    use_threads(chosen.size * index.data.shape[3] * QUAD)
    codes, bias, steps = _in_bytes(query, kv_heads, scale)
    out = np.empty((*codes.shape[:3], chosen.shape[2]), np.float32)
    data, scales = index.data.view(-1).numpy(), index.scales.view(-1).numpy()
    _logit_chunks(codes, bias, steps, data, scales, capacity, chosen, out)
    return torch.from_numpy(out)[:, :, : query.shape[1] // kv_heads].flatten(1, 2)


def vote(
    query: torch.Tensor, index: KeyIndex, *, scale: float, starts=None, stop=None, over="layer", softcap=None
) -> torch.Tensor:
    kv_heads, capacity = index.scales.shape[1:]
    use_threads(index.bytes)
    codes, bias, steps = _in_bytes(query, kv_heads, scale)
    stop = index.n if stop is None else min(stop, index.n)
    weights, tops, sums = vote_space(codes.shape[:3], index.n, stop)
    first = first_slots(starts, index.scales)
    _vote_chunks(
        codes, bias, steps, index.data.view(-1).numpy(), index.scales.view(-1).numpy(),
        capacity, first, stop, np.float32(softcap or 0.0), weights, tops, sums,
    )  # fmt: skip
    return tally(weights, tops, sums, query.shape[1] // kv_heads, first, stop, index.n, over)
