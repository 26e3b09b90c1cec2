"""Where a text changes: a small network that finds the borders between stretches of keys that are attended to alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, pad

from laconic.primitives.scores import capped
from laconic.profiles import weights_from_json

WINDOW = 4  # keys on each side of a gap that are looked at
HEADS, HIDDEN = 4, 128  # of the network
RATIO = 2.0  # a border: one side draws so many times the attention of the other
POSITIVE = 1.3  # weight of borders, which are rare, in training
EPOCHS, RATE = 20, 1e-3
PLACES = 1024  # gaps that are looked at together
ROWS = 256  # rows of the attention map that are looked at together


class BoundaryPredictor(nn.Module):
    """Says for every token but the last whether a stretch ends after it, from the keys on both sides.

    The 2 x ``WINDOW`` keys around a gap, all KV heads side by side, attend to each other once; the means of the two halves are
    compared by a perceptron with one hidden layer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.compare = nn.Sequential(nn.Linear(4 * dim + 1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """``(n, dim)`` to logits ``(n,)``: of a border between a token and the next."""
        around = pad(keys, (0, 0, WINDOW - 1, WINDOW)).unfold(0, 2 * WINDOW, 1).transpose(1, 2)  # (n, 2 * WINDOW, dim)
        return torch.cat([self._compare(part) for part in around.split(PLACES)])

    def _compare(self, around: torch.Tensor) -> torch.Tensor:
        normed = self.norm(around)
        mixed = self.attention(normed, normed, normed, need_weights=False)[0]
        left, right = mixed[:, :WINDOW].mean(1), mixed[:, WINDOW:].mean(1)
        alike = cosine_similarity(left, right, dim=-1)[:, None]
        return self.compare(torch.cat([left, right, (left - right).abs(), left * right, alike], dim=-1))[:, 0]

    @classmethod
    def of(cls, tables: dict[str, Any]) -> BoundaryPredictor:
        """One with the weights that ``weights_to_json`` gave."""
        state = weights_from_json(tables)
        predictor = cls(state["norm.weight"].shape[0])
        predictor.load_state_dict(state)
        return predictor.eval().requires_grad_(False)


def border_labels(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None = None) -> torch.Tensor:
    """Where one side of a gap draws ``RATIO`` times the attention of the other: 1 or 0, and NaN at the ends, float32 ``(n,)``.

    The attention is the mean over heads, from all rows that see both sides: those from ``WINDOW`` after the gap on. Rows are
    looked at in blocks; there is no n x n map.

    Args:
        query: ``(heads, n, head_dim)``; keys: ``(kv_heads, n, head_dim)``.
    """
    n, group = query.shape[1], query.shape[0] // keys.shape[0]
    past, future = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    gap = torch.arange(n)
    for begin in range(0, n, ROWS):
        rows = torch.arange(begin, min(begin + ROWS, n))
        total = torch.zeros(len(rows), n + WINDOW, dtype=torch.float64)
        for head in range(query.shape[0]):
            logits = capped(query[head, rows].float() @ keys[head // group].float().T * scale, softcap)
            total[:, :n] += logits.masked_fill(gap > rows[:, None], float("-inf")).softmax(-1)
        sums = pad(total.cumsum(-1), (WINDOW, 0))  # sums[:, i + WINDOW] is the sum up to column i
        at = gap + WINDOW
        sees = gap + WINDOW <= rows[:, None]
        past += ((sums[:, at] - sums[:, at - WINDOW]) * sees).sum(0)
        future += ((sums[:, at + WINDOW] - sums[:, at]) * sees).sum(0)
    high, low = torch.maximum(past, future) + 1e-6, torch.minimum(past, future) + 1e-6
    labels = (high / low >= RATIO).float()
    labels[: 2 * WINDOW] = labels[n - 2 * WINDOW :] = float("nan")
    return labels


def train_predictor(examples: list[tuple[torch.Tensor, torch.Tensor]], seed: int) -> BoundaryPredictor:
    """Learns from pairs of keys ``(n, dim)`` and labels ``(n,)``; easy places count little (focal loss, 2017)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = BoundaryPredictor(examples[0][0].shape[1])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=RATE)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for keys, labels in examples:
                known = ~labels.isnan()
                logits, target = predictor(keys)[known], labels[known]
                loss = binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(POSITIVE), reduction="none")
                right = torch.where(target > 0, logits.sigmoid(), 1 - logits.sigmoid())
                optimizer.zero_grad()
                ((1 - right) ** 2 * loss).mean().backward()
                optimizer.step()
    return predictor.eval().requires_grad_(False)


def choose_borders(logits: torch.Tensor, threshold: float, apart: int, most: int, last: int) -> torch.Tensor:
    """Where stretches begin and end: int64, strictly ascending, from 0 to n.

    One border lies at ``last`` in any case. Gaps with a logit above ``threshold`` before it follow, the highest first, unless
    one within ``apart`` tokens has been taken; ``most`` at the most.
    """
    n = len(logits)
    taken = np.zeros(n + 1, bool)
    taken[min(max(last, 0), n)] = True
    left = most - 1
    candidates = logits[: max(last - 1, 0)]
    for gap in candidates.argsort(descending=True, stable=True).tolist():
        if left <= 0 or candidates[gap] <= threshold:
            break
        begin = gap + 1  # a border after a token starts a stretch at the next
        if not taken[max(0, begin - apart) : begin + apart + 1].any():
            taken[begin] = True
            left -= 1
    taken[0] = taken[n] = True
    return torch.from_numpy(np.flatnonzero(taken))
