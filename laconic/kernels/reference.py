"""The kernels in plain torch: what they mean. Every faster version is held to these."""

from __future__ import annotations

import torch

from laconic.kernels.ragged import Ragged, dense
from laconic.kernels.reference_greedy import greedy as greedy
from laconic.kernels.reference_greedy import most_isolated as most_isolated

NEGATIVE = float("-inf")


def _logits(
    query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """q.k, float32 ``(batch, kv_heads, group, n)``."""
    batch, heads, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, dim).float()
    logits = torch.matmul(grouped, keys.float().transpose(-1, -2)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _attend(logits: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last axis times values; rows with nothing to see give zeros and lse -inf."""
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == NEGATIVE, 0.0)[..., None]).exp()
    output = torch.matmul(weights, values.float())
    return output.reshape(*query.shape[:2], -1).to(query.dtype), lse.reshape(query.shape[:2])


def _first(starts, keys):
    """First slots that are visible and stored, or None for all."""
    if not isinstance(keys, Ragged):
        return starts
    return keys.starts if starts is None else torch.maximum(starts, keys.starts)


def decode_attention(query, keys, values, *, scale, starts=None, softcap=None):
    starts, keys, values = _first(starts, keys), dense(keys), dense(values)
    logits = _logits(query, keys, scale, softcap)
    if starts is not None:
        slot = torch.arange(keys.shape[2], device=keys.device)
        logits = logits.masked_fill((slot < starts[..., None])[:, :, None], NEGATIVE)
    return _attend(logits, values, query)


def selected_attention(query, keys, values, indices, *, scale, softcap=None):
    index = indices.expand(-1, keys.shape[1], -1)
    if isinstance(keys, Ragged):
        index = index.masked_fill(index < keys.starts[..., None], -1)
    keys, values = dense(keys), dense(values)
    rows = index.clamp(min=0)[..., None]
    picked_keys, picked_values = (t.gather(2, rows.expand(-1, -1, -1, t.shape[-1])) for t in (keys, values))
    logits = _logits(query, picked_keys, scale, softcap).masked_fill((index < 0)[:, :, None], NEGATIVE)
    return _attend(logits, picked_values, query)


def vote(query, keys, *, scale, starts=None, stop=None, over="layer", softcap=None):
    starts, keys = _first(starts, keys), dense(keys)
    logits = _logits(query, keys, scale, softcap)
    slot = torch.arange(keys.shape[2], device=keys.device)
    if starts is not None:
        logits = logits.masked_fill((slot < starts[..., None])[:, :, None], NEGATIVE)
    if stop is not None:
        logits = logits.masked_fill(slot >= stop, NEGATIVE)
    shares = logits.softmax(-1).nan_to_num(0.0)
    if over == "head":
        return shares.flatten(1, 2)
    votes = shares.sum(2)
    return votes.sum(1, keepdim=True) if over == "layer" else votes


def topk(scores, k):
    """By selection, without sorting all: everything above the k-th value, then ties from the lowest index up."""
    kth = scores.topk(k, dim=-1).values[..., -1:]
    above, tied = scores > kth, scores == kth
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= room))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], k)


def column_sums(query, keys, *, scale, starts=None, window=None, softcap=None, positions=None, rows=128):
    starts, keys = _first(starts, keys), dense(keys)
    batch, heads, count, dim = query.shape
    kv_heads, n = keys.shape[1:3]
    grouped = query.view(batch, kv_heads, heads // kv_heads, count, dim)
    sums = torch.zeros(batch, kv_heads, heads // kv_heads, n, dtype=torch.float32, device=query.device)
    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        row = torch.arange(n - count + begin, n - count + end, device=query.device)[:, None]
        stop = n - count + end  # nothing above the diagonal is computed
        start = 0 if window is None or positions is not None else max(0, n - count + begin - window + 1)
        slot = torch.arange(start, stop, device=query.device)
        hidden = slot > row
        if window is not None and positions is None:
            hidden = hidden | (slot <= row - window)
        elif window is not None:
            at = positions[:, :, None, None]
            hidden = hidden | (at[..., :stop] <= at[..., n - count + begin : stop].transpose(-1, -2) - window)
        part = grouped[..., begin:end, :].float().flatten(2, 3) @ keys[:, :, start:stop].float().transpose(-1, -2)
        logits = part.mul_(scale).view(batch, kv_heads, -1, end - begin, stop - start)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if starts is None:
            logits.masked_fill_(hidden, NEGATIVE)
            sums[..., start:stop] += logits.softmax(-1).sum(3)
        else:
            first = starts[:, :, None, None, None]
            logits.masked_fill_(hidden | (slot < first), NEGATIVE)
            weights = logits.softmax(-1).masked_fill(row < first, 0.0)  # rows of padding attend to nothing
            sums[..., start:stop] += weights.sum(3)
    return sums.view(batch, heads, n)


def compact(entries, slots, bases=None):
    real = slots >= 0
    if isinstance(entries, Ragged):
        place = torch.arange(slots.shape[-1], device=slots.device) + (entries.bases if bases is None else bases)[..., None]
        entries.data[place[real]] = entries.data[(entries.bases[..., None] + slots)[real]]
        return
    index = slots.clamp(min=0).expand(*entries.shape[:2], -1)
    real, shape = real.expand_as(index), (*index.shape, *entries.shape[3:])
    if entries.dim() == 4:
        index, real = (t[..., None].expand(shape) for t in (index, real))
    kept = entries[:, :, : slots.shape[-1]]
    kept.copy_(torch.where(real, entries.gather(2, index), kept))


def logits(query, keys, *, scale=1.0, indices=None):
    keys = dense(keys)
    if indices is not None:
        index = indices.expand(-1, keys.shape[1], -1)
        keys = keys.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, keys.shape[-1]))
    products = _logits(query, keys, scale)
    if indices is not None:
        products = products.masked_fill((index < 0)[:, :, None], NEGATIVE)
    return products.flatten(1, 2)
