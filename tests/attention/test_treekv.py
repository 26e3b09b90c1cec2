from __future__ import annotations

import itertools

import pytest
from attend import Run, held, probabilities, random_qkv


def kept_by_structure(budget: int, tokens: int, *, sinks: int = 0, recent: int = 1) -> list[int]:
    """Token by token from the first on: what stays where the older of a pair always goes."""
    run = Run(
        f"treekv(structure=true, sinks={sinks}, recent={recent}, recent_share=0):{budget}",
        random_qkv(tokens, batch=1, heads=1, kv_heads=1), 1,
    )  # fmt: skip
    for _ in run:
        assert run.layer.n <= budget
    return held(run)[0][0]


@pytest.mark.parametrize("size", [8, 16])
def test_gaps_are_powers_of_two_that_do_not_grow_towards_the_present(size: int) -> None:
    for sweeps in (6, 9):  # at the border of a sweep: the tree has just been passed once more
        kept = kept_by_structure(size + 1, size + 1 + sweeps * size)
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert all(gap & (gap - 1) == 0 for gap in gaps) and gaps == sorted(gaps, reverse=True), gaps
        assert kept[-1] - kept[0] >= size


def test_the_worse_of_one_pair_goes_at_each_step() -> None:
    """Against the same done by hand, per row and head, with the attention of every step."""
    sinks, budget, pads, prompt, total = 2, 12, (0, 5), 12, 40
    qkv = random_qkv(total)
    run = Run(f"treekv(sinks={sinks}, recent=4, recent_share=0, block=50):{budget}", qkv, 1, pads=pads)
    state: dict[tuple[int, int], dict] = {
        (row, head): {"held": [], "sum": {}, "steps": {}, "at": 0} for row in range(2) for head in range(2)
    }
    for seen, _ in run:
        for (row, head), own in state.items():
            pad = pads[row]
            if seen <= pad:
                continue
            newest = seen - 1
            own["held"].append(newest)
            weights = sum(
                probabilities(qkv[0][row, h, newest], qkv[1][row, head], own["held"]) for h in (2 * head, 2 * head + 1)
            ) / 2
            for slot, weight in zip(own["held"], weights.tolist(), strict=True):
                own["sum"][slot] = own["sum"].get(slot, 0.0) + weight
                own["steps"][slot] = own["steps"].get(slot, 0) + 1
            if len(own["held"]) > budget:
                tree = len(own["held"]) - sinks - 4 - 1
                at = sinks + own["at"] % tree
                left, right = own["held"][at], own["held"][at + 1]
                mean = {s: own["sum"][s] / own["steps"][s] for s in (left, right)}
                own["held"].remove(right if mean[left] > mean[right] else left)
                own["at"] = (at - sinks + 1) % tree
            assert held(run)[row][head] == [slot - pad for slot in own["held"]]
    assert prompt < total and held(run)[0][0] != held(run)[0][1]


def test_a_prompt_is_cut_by_whole_blocks_and_what_is_looked_at_stays() -> None:
    query, keys, values = random_qkv(200, batch=1)
    query[:, :, -8:] = 3 * keys[:, :, 60:61].repeat_interleave(2, 1)  # the last block asks for token 60
    run = Run("treekv(sinks=2, recent=10, recent_share=0, block=8):44", [query, keys, values], 200)
    run.piece(0, 200)
    for head in held(run)[0]:
        assert head[:2] == [0, 1] and head[-10:] == list(range(190, 200)) and len(head) <= 44
        inner = head[2:-10]
        assert len(inner) == 32 and 60 in inner
        starts = inner[::8]
        assert inner == [s + i for s in starts for i in range(8)] and all((190 - s) % 8 == 0 for s in starts)


def test_older_tokens_are_kept_more_sparsely_than_newer_ones() -> None:
    kept = kept_by_structure(33, 600, sinks=2, recent=4)
    middle = [p for p in kept if 2 <= p < 596]
    newer = sum(p > 600 - 100 for p in middle)
    assert newer > len(middle) / 2 and min(middle) < 500
