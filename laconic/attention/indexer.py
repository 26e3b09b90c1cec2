"""The two-stage search of HISA in place of the flat one of models that carry an indexer (DeepSeek sparse attention)."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.kernels.blocks import KeyBlocks

ROTATIONS = {"DeepseekV32Indexer": "apply_rotary_pos_emb", "GlmMoeDsaIndexer": "apply_rotary_pos_emb_interleave"}
FLOATS = 1 << 24  # of candidate keys that are gathered at a time


@contextlib.contextmanager
def hierarchical(model: torch.nn.Module, *, block: int = 128, blocks: int = 64) -> Iterator[None]:
    """Inside, every indexer of ``model`` scores the tokens of its ``blocks`` best blocks of ``block`` tokens only.

    Outputs are those of the model's own search wherever that many blocks hold everything that a query sees; mean keys of
    blocks are kept from step to step. The model attends as before: eager or sdpa.

    Raises:
        LaconicError: when the model has no indexer that is known, or the blocks cannot hold what it reads.
    """
    indexers: list[Any] = [m for m in model.modules() if type(m).__name__ in ROTATIONS]
    if not indexers:
        raise LaconicError(f"{type(model).__name__} has no indexer: use the method hisa, which scores with attention itself.")
    topk = max(m.index_topk for m in indexers)
    if blocks < 2 or topk > (blocks - 2) * block + 2:  # the first and the last block may hold a single visible token
        raise LaconicError(
            f"{blocks} blocks of {block} tokens may not hold the {topk} that the model reads: give at least "
            f"{-(-(topk - 2) // block) + 2} blocks."
        )
    if getattr(model.config, "_attn_implementation", None) not in ("eager", "sdpa"):
        raise LaconicError("The search in two stages serves attn_implementation eager and sdpa: load the model with one of them.")
    for module in indexers:
        module.forward = functools.partial(_forward, module, block=block, blocks=blocks, held=weakref.WeakKeyDictionary())
    try:
        yield
    finally:
        for module in indexers:
            del module.forward


@torch.no_grad()
def _forward(
    indexer: Any,
    hidden: torch.Tensor,
    q_resid: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    *,
    block: int,
    blocks: int,
    held: weakref.WeakKeyDictionary,
) -> torch.Tensor:
    """What the indexer's own forward gives: slots ``(batch, rows, topk)`` int32."""
    cache = cache if cache is not None else past_key_values
    rows, turned = hidden.shape[:2], indexer.qk_rope_head_dim
    query = indexer.wq_b(q_resid).view(*rows, indexer.n_heads, indexer.head_dim)
    keys = indexer.k_norm(indexer.wk(hidden))[:, :, None]
    rotate = getattr(sys.modules[type(indexer).__module__], ROTATIONS[type(indexer).__name__])
    moved = rotate(query[..., :turned], keys[..., :turned], *position_embeddings, unsqueeze_dim=2)
    query, keys = (torch.cat([m, t[..., turned:]], dim=-1) for m, t in zip(moved, (query, keys), strict=True))
    keys = keys[:, :, 0]
    if cache is not None:
        keys = cache.update_indexer(keys, indexer.layer_idx)
    weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    means = _means(held, cache, keys, rows[1], block)
    return search(query, keys, weights, visible.expand(*rows, -1), indexer.index_topk, blocks, means).to(torch.int32)


def _means(held: weakref.WeakKeyDictionary, cache: Any, keys: torch.Tensor, new: int, block: int) -> KeyBlocks:
    """Mean keys of the blocks; those of the last step are continued when the cache has grown by ``new`` and is the same text."""
    known, n = held.get(cache) if cache is not None else None, keys.shape[1]
    if known is not None and known[0].n == n - new and torch.equal(known[1], keys[:, n - new - 1]):
        blocks = known[0]
        blocks.append(keys[:, None, -new:])
    else:
        blocks = KeyBlocks(keys[:, None], block, kind="mean")
    if cache is not None:
        held[cache] = blocks, keys[:, -1].clone()
    return blocks


def search(
    query: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    visible: torch.Tensor,
    topk: int,
    blocks: int,
    means: KeyBlocks,
) -> torch.Tensor:
    """The ``topk`` tokens with the highest index score among those of the ``blocks`` best blocks of each query.

    The score of a token is the sum over the heads of weight * relu(q.k), that of a block the same with its mean key; the
    first and the last block that a query sees are always among the best.

    Args:
        query: ``(batch, rows, heads, dim)``; keys: ``(batch, n, dim)``, one head; weights: ``(batch, rows, heads)``.
        visible: bool ``(batch, rows, n)``; what a query sees is one run of slots.

    Returns:
        int64 ``(batch, rows, min(topk, n))``, ascending; a query that sees fewer gets its first token again in front (0 when
        it sees none).
    """
    batch, rows, _, dim = query.shape
    count = min(blocks, means.count)
    step = max(1, FLOATS // (batch * count * means.size * dim))
    parts = [
        _search(query[:, at : at + step], keys, weights[:, at : at + step], visible[:, at : at + step], topk, count, means)
        for at in range(0, rows, step)
    ]
    return torch.cat(parts, dim=1)


def _search(query, keys, weights, visible, topk, count, means):
    n, size = keys.shape[1], means.size
    seen = torch.nn.functional.pad(visible, (0, means.count * size - n)).unflatten(-1, (-1, size)).any(-1)
    order = torch.arange(means.count, device=keys.device)
    first = seen.to(torch.int8).argmax(-1, keepdim=True)
    last = torch.where(seen, order, 0).amax(-1, keepdim=True)
    worth = _score(query, means.mean, weights)
    worth = worth.masked_fill((order == first) | (order == last), torch.inf).masked_fill(~seen, -torch.inf)
    chosen = worth.topk(count, dim=-1).indices.sort(-1).values
    slots = (chosen[..., None] * size + torch.arange(size, device=keys.device)).flatten(2)
    inside = slots < n
    slots = slots.clamp(max=n - 1)
    inside &= visible.gather(-1, slots)
    rows = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
    scores = _score(query, keys[rows, slots], weights).masked_fill(~inside, -torch.inf)
    best = scores.topk(min(topk, n, scores.shape[-1]), dim=-1).indices
    own = torch.where(inside, slots, n).amin(-1, keepdim=True) % n  # a token that the query sees, and 0 if it sees none
    found = torch.where(inside.gather(-1, best), slots.gather(-1, best), own).sort(-1).values
    return torch.cat([found[..., :1].expand(-1, -1, min(topk, n) - found.shape[-1]), found], dim=-1)


def _score(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Index scores ``(batch, rows, k)`` of keys ``(batch, 1, k, dim)`` or ``(batch, rows, k, dim)``."""
    products = torch.matmul(query.float(), keys.float().transpose(-1, -2)).relu()
    return torch.matmul(weights.float()[:, :, None], products)[:, :, 0]
