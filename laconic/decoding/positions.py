"""Which masked positions a step commits: one function for every masked-diffusion method.

Shapes: logits ``(rows, n, vocabulary)``, all others ``(rows, n)``, positions in ascending order.
"""

from __future__ import annotations

import math

import torch


def probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Softmax probability of one token per position. In float32: in bfloat16 values near 0.9 lie 0.004 apart."""
    logits = logits.float()
    return (logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)).exp()


def negative_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Minus the entropy of each position's distribution, in nats. A logit may be minus infinity."""
    log_p = logits.float().log_softmax(-1)
    return (log_p.exp() * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def draw(logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token per position: the most probable at temperature 0, else a sample of ``softmax(logits / temperature)``."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return (logits.float() / temperature - noise.log()).argmax(-1)  # Gumbel-max


def select(
    score: torch.Tensor,
    open: torch.Tensor,
    *,
    threshold: float = math.inf,
    least: int = 1,
    relaxed: float | None = None,
    width: int = 0,
    anchors: torch.Tensor | None = None,
    penalty: float = 0.0,
    places: torch.Tensor | None = None,
    contiguous: bool = False,
) -> torch.Tensor:
    """The positions to commit, bool, a subset of ``open``: those that score ``threshold`` or more, and always the best.

    Args:
        score: larger is surer, such as ``probability`` or ``negative_entropy``.
        open: positions that may be committed. A row with none commits none.
        least: that many of the best are committed, however low they score (as many as are open).
        relaxed, width: positions at most ``width`` away from an anchor need only this score (LocalLeap).
        anchors: bool; by default the open positions that reach ``threshold``.
        penalty: taken off the score per position of distance from the first open one (WeDLM).
        places: the position ``(n,)`` of every column, for the distance; by default they are neighbours.
        contiguous: commit only the run of positions that starts at the first open one (Lexical Unit Decoding); then the
            ``least`` are the first ones, not the best.
    """
    column = torch.arange(score.shape[-1], device=score.device)
    if penalty:
        place = column if places is None else places
        score = score - penalty * (place - place[open.int().argmax(-1, keepdim=True)])
    taken = open & (score >= threshold)
    if relaxed is not None:
        near = dilate(taken if anchors is None else anchors, width)
        taken = taken | (open & near & (score >= relaxed))
    if contiguous:
        taken = taken & ((open & ~taken).cumsum(-1) == 0)
        score = -column.to(score.dtype).expand_as(score)
    return taken | (open & (ranks(score, open) < least))


def ranks(score: torch.Tensor, open: torch.Tensor) -> torch.Tensor:
    """Place of every position in its row, 0 for the best open one; equal scores go from left to right."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, (~open).gather(-1, order).int().argsort(dim=-1, stable=True))  # closed ones come last
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def dilate(marked: torch.Tensor, width: int) -> torch.Tensor:
    """Positions at most ``width`` away from a marked one, bool."""
    pooled = torch.nn.functional.max_pool1d(marked.float()[:, None], 2 * width + 1, stride=1, padding=width)
    return pooled[:, 0] > 0
