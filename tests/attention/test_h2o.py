from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from attend import Run, attention, held, probabilities, random_qkv, top

GROUP = {"mean": lambda a, b: (a + b) / 2, "max": max, "sum": lambda a, b: a + b}


class ByHand:
    """H2O as the paper says it, one row and KV head at a time: dictionaries of positions."""

    def __init__(self, run: Run, row: int, head: int, pad: int, reduce: str) -> None:
        self.run, self.row, self.head, self.pad, self.reduce = run, row, head, pad, reduce
        self.kept: list[int] = []
        self.total: dict[int, float] = defaultdict(float)

    def read(self, end: int, new: int) -> None:
        """The last ``new`` of ``end`` tokens come in together: each sees what is held and those before it."""
        old = list(self.kept)
        for_heads = [defaultdict(float), defaultdict(float)]
        for at in range(end - self.pad - new, end - self.pad):
            entries = [*old, *range(end - self.pad - new, at + 1)]
            for i in (0, 1):
                query = self.run.query[self.row, 2 * self.head + i, at + self.pad]
                p = probabilities(query, self.run.keys[self.row, self.head], [e + self.pad for e in entries])
                for entry, value in zip(entries, p.tolist(), strict=True):
                    for_heads[i][entry] += value
        for entry in for_heads[0]:
            self.total[entry] += GROUP[self.reduce](for_heads[0][entry], for_heads[1][entry])
        self.kept = [*old, *range(end - self.pad - new, end - self.pad)]

    def evict(self, budget: int, recent: int, normalise: bool) -> None:
        if len(self.kept) <= budget:
            return
        newest, rest = self.kept[-recent:], self.kept[: len(self.kept) - recent]
        now = self.kept[-1]
        worth = {e: self.total[e] / (now + 1 - e if normalise else 1) for e in rest}
        self.kept = top(worth, budget - recent) + newest


@pytest.mark.parametrize(("reduce", "normalise"), [("mean", False), ("max", False), ("sum", True)])
@pytest.mark.parametrize(("budget", "share"), [(10, 0.5), (7, 0.0), (9, 1.0)])
def test_sums_and_kept_sets_are_those_of_the_paper(reduce: str, normalise: bool, budget: int, share: float) -> None:
    pads, prompt = (0, 6), 22
    recent = max(1, int(budget * share))
    recipe = f"h2o(reduce={reduce}, normalise={normalise}, recent_share={share}):{budget}"
    run = Run(recipe, random_qkv(36), prompt, pads=pads)
    hands = [[ByHand(run, row, head, pad, reduce) for head in (0, 1)] for row, pad in enumerate(pads)]
    for seen, output in run:
        assert run.layer.n == budget  # never more after a step
        track = run.layer.tracks["h2o"].view()
        for row, pad in enumerate(pads):
            for head in (0, 1):
                hand = hands[row][head]
                hand.read(seen, seen - pad if seen == prompt else 1)
                entries = [e + pad for e in hand.kept]
                for h in (2 * head, 2 * head + 1):  # the output is computed before the eviction
                    by_hand = attention(run, row, h, seen - 1, entries)
                    torch.testing.assert_close(output[row, h, -1], by_hand, atol=1e-5, rtol=1e-5)
                hand.evict(budget, recent, normalise)
                assert held(run)[row][head] == hand.kept
                sums = torch.tensor([hand.total[e] for e in hand.kept])
                torch.testing.assert_close(track[row, head], sums, atol=1e-5, rtol=1e-5)


def test_several_new_tokens_at_once_add_their_rows() -> None:
    run = Run("h2o:8", random_qkv(30, batch=1), 15)
    hands = [ByHand(run, 0, head, 0, "mean") for head in (0, 1)]
    for begin, end in ((0, 15), (15, 21), (21, 22), (22, 30)):
        run.piece(begin, end)
        for head, hand in enumerate(hands):
            hand.read(end, end - begin)
            hand.evict(8, 4, False)
            assert held(run)[0][head] == hand.kept
            sums = torch.tensor([hand.total[e] for e in hand.kept])
            torch.testing.assert_close(run.layer.tracks["h2o"].view()[0, head], sums, atol=1e-5, rtol=1e-5)


def test_a_budget_that_holds_all_is_dense() -> None:
    qkv = random_qkv(30)
    for (_, a), (_, b) in zip(Run("h2o:30", qkv, 20), Run("dense", qkv, 20), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_fact_nobody_attended_to_is_lost() -> None:
    """The known weakness: the needle gets no attention before the question, whatever the question asks."""
    query, keys, values = random_qkv(40, batch=1, kv_heads=1, heads=1)
    query[..., 0], keys[..., 0] = 0, 0
    keys[0, 0, 10, :] = 0
    keys[0, 0, 10, 0] = -50  # every query before the question looks away from it
    query[0, 0, :, 0] = 1
    run = Run("h2o:8", [query, keys, values], 30)
    run.piece(0, 30)
    assert 10 not in held(run)[0][0]
