"""The hot functions, dispatched by device and dtype to plain torch, numba (CPU) or triton (GPU).

Shapes everywhere: query ``(batch, heads, head_dim)`` of one step; keys and values ``(batch, kv_heads, n, head_dim)``, views
with any strides as long as the last dimension is contiguous, or ``Ragged``; query head h uses KV head
``h // (heads // kv_heads)``.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import torch

from laconic.errors import LaconicError
from laconic.kernels import reference
from laconic.kernels.blocks import KeyBlocks
from laconic.kernels.index import KeyIndex
from laconic.kernels.ragged import Ragged

Array = torch.Tensor | Ragged


def _implementation(*tensors: Array) -> ModuleType:
    """The fastest module that serves these tensors."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.stride(-1) != 1 or tensor.requires_grad:
            return reference
    return _module(tensors[0].device.type, dtype)


@functools.cache
def _module(device: str, dtype: torch.dtype) -> ModuleType:
    if device == "cpu":
        from laconic.kernels import cpu

        return cpu if dtype in cpu.DTYPES else reference
    if device == "cuda":
        from laconic.kernels import gpu

        return gpu
    return reference


def decode_attention(
    query: torch.Tensor,
    keys: Array,
    values: Array,
    *,
    scale: float,
    starts: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of one query per row over all entries from ``starts`` on.

    Returns:
        output ``(batch, heads, head_dim)`` in the query's dtype and the log of the softmax denominator ``(batch, heads)``,
        float32, with which partial attentions merge exactly (see ``merge_attention``). Nothing visible: zeros and -inf.
    """
    module = _implementation(query, keys, values)
    return module.decode_attention(query, keys, values, scale=scale, starts=starts, softcap=softcap)


def selected_attention(
    query: torch.Tensor,
    keys: Array,
    values: Array,
    indices: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``decode_attention`` over the entries ``indices`` only, int64 ``(batch, kv_heads or 1, k)``; -1 is an empty slot.

    Only the selected rows are read, in place: nothing is gathered into a copy.
    """
    module = _implementation(query, keys, values)
    return module.selected_attention(query, keys, values, indices, scale=scale, softcap=softcap)


def vote(
    query: torch.Tensor,
    keys: Array,
    *,
    scale: float,
    starts: torch.Tensor | None = None,
    stop: int | None = None,
    over: str = "layer",
    index: KeyIndex | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Soft vote (TokenSelect, 2024): softmax of the scaled logits per query head over slots starts..stop-1, summed over heads.

    With ``index`` the logits come from its 8-bit keys and ``keys`` are not read.

    Returns:
        float32 ``(batch, 1, n)`` over all heads of the layer, ``(batch, kv_heads, n)`` with ``over="group"``, or
        ``(batch, heads, n)`` with ``over="head"``, which sums nothing; 0 outside the candidates.
    """
    if over not in ("layer", "group", "head"):
        raise LaconicError(f"vote: over='{over}' is unknown: use layer, group or head.")
    if index is not None:
        if query.device.type == "cpu":
            from laconic.kernels import cpu_index

            return cpu_index.vote(query, index, scale=scale, starts=starts, stop=stop, over=over, softcap=softcap)
        if query.device.type == "cuda":
            from laconic.kernels import gpu

            return gpu.index_vote(query, index, scale=scale, starts=starts, stop=stop, over=over, softcap=softcap)
        keys = index.keys().to(query.dtype)
    module = _implementation(query, keys)
    return module.vote(query, keys, scale=scale, starts=starts, stop=stop, over=over, softcap=softcap)


def logits(
    query: torch.Tensor,
    keys: Array,
    *,
    scale: float = 1.0,
    indices: torch.Tensor | None = None,
    index: KeyIndex | None = None,
) -> torch.Tensor:
    """q.k times ``scale``, float32 ``(batch, heads, n)``, or of the entries ``indices`` only.

    ``indices``: int64 ``(batch, kv_heads or 1, k)``, which gives ``(batch, heads, k)``; -1 is an empty slot and gives -inf.
    With ``index`` they come from its 8-bit keys and ``keys`` are not read; it takes ``indices``, best in ascending order.
    """
    if index is None:
        return _implementation(query, keys).logits(query, keys, scale=scale, indices=indices)
    if query.device.type == "cpu":
        from laconic.kernels import cpu_index

        return cpu_index.logits(query, index, indices, scale=scale)
    if query.device.type == "cuda":
        from laconic.kernels import gpu

        return gpu.index_logits(query, index, indices, scale=scale)
    return reference.logits(query, index.keys(), scale=scale, indices=indices)


def block_bounds(query: torch.Tensor, blocks: KeyBlocks) -> torch.Tensor:
    """The most that q.k can be for any key of each block, float32 ``(batch, heads, blocks)``; -inf for an empty block.

    Each dimension contributes the larger of q * max and q * min (Quest, 2024): q * max where q is positive, else q * min.
    """
    bounds = logits(torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1), blocks.bounds)
    empty = torch.arange(blocks.count, device=query.device) >= blocks.counts[..., None]
    return bounds.masked_fill(empty.repeat_interleave(query.shape[1] // empty.shape[1], 1), float("-inf"))


def topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest per row, ascending; ties go to the lowest index. int64 ``(batch, heads, k)``."""
    if not 0 < k <= scores.shape[-1]:
        raise LaconicError(f"topk: {k} of {scores.shape[-1]} entries cannot be chosen.")
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        from laconic.kernels import cpu

        chosen = cpu.topk(scores, k)
    else:
        chosen = None if bool(torch.isnan(scores).any()) else reference.topk(scores, k)
    if chosen is None:
        raise LaconicError("topk: some scores are not numbers (NaN): the model's activations overflow; try float32.")
    return chosen


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """Index of the largest entry of each row ``(..., n)``, the lowest of equal ones, int64 ``(...)``.

    On the CPU by NumPy, which compares eight or sixteen numbers at once where torch compares one.
    """
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.asarray(scores.detach().numpy().argmax(-1)))
    return scores.argmax(-1)


def greedy(
    rule: str,
    rows: torch.Tensor,
    *,
    weight: torch.Tensor,
    offset: torch.Tensor,
    usable: torch.Tensor,
    seeds: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Tokens in the order in which a greedy loop picks them, each the one of largest gain, the lowest of equal ones.

    Args:
        rule: one of ``reference_greedy.RULES``; there is what each means.
        rows: ``(batch, n, d)``, what the rule reads of each token.
        weight: float32 ``(batch, n)``, >= 0; offset: float32 ``(batch, n)``.
        usable: boolean ``(batch, n)``: the others are never picked.
        seeds: int64 ``(batch,)``: the first pick, -1 for the one of largest gain.
        counts: int64 ``(batch,)``, at most the usable tokens.

    Returns:
        int64 ``(batch, max(counts))``, -1 at the end.

    Raises:
        LaconicError: when a row of a usable token holds NaN or infinity.
    """
    if not bool(torch.isfinite(rows.sum(-1, dtype=torch.float32)[usable]).all()):
        raise LaconicError(
            "greedy: some features are not finite numbers (NaN, infinity): the model's activations overflow; try float32."
        )
    module = reference if rows.is_cuda else _module(rows.device.type, rows.dtype)  # which takes any strides
    return module.greedy(rule, rows.detach(), weight, offset, usable, seeds, counts)


def most_isolated(directions: torch.Tensor) -> int:
    """Of float32 rows ``(n, d)`` of length 1, the one whose largest cosine with another is least, the lowest of equal ones."""
    module = reference if directions.is_cuda else _module(directions.device.type, directions.dtype)
    return module.most_isolated(directions)


def compact(entries: Array, slots: torch.Tensor, bases: torch.Tensor | None = None) -> None:
    """Moves entries in place: slot j of each row and head becomes what slot ``slots[j]`` was; -1 moves nothing.

    Args:
        entries: ``(batch, heads, n)`` or ``(batch, heads, n, dim)`` of any type; what it has after the last slot is left over.
        slots: int64 ``(batch, heads or 1, k)``, ascending.
        bases: with ``Ragged`` entries, where slot 0 of each row and head is to stand afterwards; None: where it stands.
    """
    if entries.device.type == "cpu":
        from laconic.kernels import cpu_moves

        cpu_moves.compact(entries, slots, bases)
    else:
        reference.compact(entries, slots, bases)


def column_sums(
    query: torch.Tensor,
    keys: Array,
    *,
    scale: float,
    starts: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention probability that each key receives, summed over the query rows, in O(rows-block x n) memory.

    Args:
        query: ``(batch, heads, rows, head_dim)``: the last ``rows`` positions. A single row gives its probabilities.
        starts: ``(batch, kv_heads)`` first visible slot; rows before it are padding and give nothing.
        window: a row sees only the last ``window`` slots, its own included.
        positions: int64 ``(batch, kv_heads or 1, n)``, ascending, each once: what a ``window`` counts where tokens between
            entries are gone. None: slots.

    Returns:
        float32 ``(batch, heads, n)``.
    """
    module = _implementation(query, keys)
    options = {"scale": scale, "starts": starts, "window": window, "softcap": softcap, "positions": positions}
    return module.column_sums(query, keys, **options)


def merge_attention(
    outputs: list[torch.Tensor], lses: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over disjoint parts as one: ``outputs`` (batch, heads, head_dim) each, ``lses`` (batch, heads) each."""
    stacked = torch.stack(lses)
    lse = stacked.logsumexp(0)
    weights = (stacked - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    output = (weights[..., None] * torch.stack(outputs).float()).sum(0)
    return output.to(outputs[0].dtype), lse
