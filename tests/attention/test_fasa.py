from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attend import SCALE, Run, random_qkv, top
from tiny import build, prompt

from laconic.attention.fasa import FASA, pair_dimensions
from laconic.profiles import Profile


@pytest.fixture
def profile(tmp_path: Path):
    def write(ranking: list[list[list[int]]]) -> str:
        path = tmp_path / f"{abs(hash(json.dumps(ranking)))}.json"
        Profile("fasa", {}, 0, "", {"rope": "half", "ranking": ranking}).save(path)
        return str(path)

    return write


def test_pairs_are_dimensions_that_turn_together_and_add_up_to_all() -> None:
    assert pair_dimensions(torch.tensor([0, 3]), 8, "half").tolist() == [0, 3, 4, 7]
    assert pair_dimensions(torch.tensor([0, 3]), 8, "interleaved").tolist() == [0, 6, 1, 7]
    query, key = torch.randn(8), torch.randn(8)
    for layout in ("half", "interleaved"):
        parts = [pair_dimensions(torch.tensor([i]), 8, layout) for i in range(4)]
        torch.testing.assert_close(sum(query[d] @ key[d] for d in parts), query @ key)


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_tokens_are_chosen_by_the_dominant_pairs_of_each_head(profile, pairs: int) -> None:
    sinks, recent, budget, pads = 2, 3, 9, (0, 7)
    ranking = [[[2, 0, 1, 3], [1, 3, 2, 0]]]
    qkv = random_qkv(44)
    run = Run(f"fasa(pairs={pairs}, profile={profile(ranking)}, sinks={sinks}, recent={recent}):{budget}", qkv, 40, pads=pads)
    for seen, output in run:
        if seen == 40:
            continue
        for row, pad in enumerate(pads):
            for kv_head in range(2):
                dims = pair_dimensions(torch.tensor(ranking[0][kv_head][:pairs]), 8, "half")
                votes = torch.zeros(seen - pad)
                inner = slice(pad + sinks, seen - recent)
                for head in (2 * kv_head, 2 * kv_head + 1):
                    logits = qkv[1][row, kv_head, inner][:, dims] @ qkv[0][row, head, seen - 1][dims] * SCALE
                    votes[sinks : seen - recent - pad] += logits.softmax(0)
                ends = {*range(sinks), *range(seen - pad - recent, seen - pad)}
                best = top({p: float(votes[p]) for p in range(seen - pad) if p not in ends}, budget - len(ends))
                slots = [p + pad for p in sorted(ends | set(best))]
                for head in (2 * kv_head, 2 * kv_head + 1):
                    keys, values = qkv[1][row, kv_head, slots], qkv[2][row, kv_head, slots]
                    expected = (keys @ qkv[0][row, head, seen - 1] * SCALE).softmax(0) @ values
                    torch.testing.assert_close(output[row, head, 0], expected, atol=1e-5, rtol=1e-4)


def test_the_copies_are_counted_and_follow_evictions(profile) -> None:
    path, qkv = profile([[[0, 1, 2, 3], [3, 2, 1, 0]]]), random_qkv(40)
    run = Run(f"knorm(sinks=1, recent=2):20 + fasa(pairs=2, profile={path}, sinks=1, recent=2):8", qkv, 36)
    for _ in run:
        few = run.layer.tracks["fasa"].view()
        for head, ranked in ((0, [0, 1]), (1, [3, 2])):
            dims = pair_dimensions(torch.tensor(ranked), 8, "half")
            assert torch.equal(few[:, head], run.layer.keys[:, head][..., dims])
    assert run.layer.bytes_kept == sum(t.numel() * 4 for t in (run.layer.keys, run.layer.values, few))
    assert run.layer.request.figures[0]["bytes_read"] < 2 * 2 * 8 * 16 * 4 + 2 * 2 * 21 * 4 * 4 + 3 * run.layer.keys.numel() * 4


def test_calibration_finds_the_pair_that_decides() -> None:
    model = build(sharpen=2.0)
    with torch.no_grad():
        for layer in model.model.layers:  # only pair 1 of each head is left in queries, so only it can matter
            weight = layer.self_attn.q_proj.weight.view(4, 8, -1)
            weight[:, [0, 2, 3, 4, 6, 7]] *= 1e-3
    tables = FASA.calibrate(model, list(prompt(2, 60)["input_ids"]))
    assert tables["rope"] == "half"
    for layer, agreement in zip(tables["ranking"], tables["agreement"], strict=True):
        for head, values in zip(layer, agreement, strict=True):
            assert head[0] == 1 and sorted(head) == [0, 1, 2, 3]
            assert values[1] > 0.98 and all(0 <= v <= 1 for v in values)
