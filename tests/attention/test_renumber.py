"""positions=compact of evicting methods: what stays is a text without gaps, by hand from keys before RoPE."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from attend import SCALE, Run, held, random_qkv, top
from tiny import build, generate, prompt, shared

import laconic
from laconic.attention.rope import Rope

ROPE = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]))
PADS = (0, 9)


class Text:
    """Random queries and keys before RoPE, and what a model would hand over of them."""

    def __init__(self, length: int) -> None:
        self.query, self.keys, self.values = random_qkv(length)
        at = (torch.arange(length) - torch.tensor(PADS)[:, None]).clamp(min=0)[:, None]
        self.given = [ROPE.rotate(self.query, at), ROPE.rotate(self.keys, at), self.values]

    def weights(self, row: int, head: int, entries: list[int], at: int) -> torch.Tensor:
        """Of ``entries``, true positions, for the query at ``at``, which is the last of them."""
        slots = [e + PADS[row] for e in entries]
        place = torch.arange(len(entries))
        keys = ROPE.rotate(self.keys[row, head // 2, slots], place)
        query = ROPE.rotate(self.query[row, head, at + PADS[row]][None], place[-1:])
        return (query @ keys.T * SCALE).softmax(-1)[0]


@pytest.mark.parametrize(
    "recipe",
    [
        "h2o(positions=compact):10",
        "streaming(sinks=2, positions=compact):8",
        "adakv(h2o(positions=compact, recent_share=0.3)):10",  # heads that keep different numbers of entries
        "streaming(sinks=1, positions=compact):16 + h2o(positions=compact):9",
    ],
)
def test_attention_is_that_of_a_text_without_gaps(recipe: str) -> None:
    text = Text(44)
    run = Run(recipe, text.given, 30, pads=PADS, rope=ROPE)
    before = None
    for seen, output in run:
        if before is not None:
            for row, pad in enumerate(PADS):
                for head in range(4):
                    entries = [*before[row][head // 2], seen - 1 - pad]
                    assert len(entries) < seen - pad
                    slots = [e + pad for e in entries]
                    by_hand = text.weights(row, head, entries, seen - 1 - pad) @ text.values[row, head // 2, slots]
                    torch.testing.assert_close(output[row, head, -1], by_hand, atol=1e-4, rtol=1e-4)
        before = held(run)
        assert run.layer.turned is None


def test_h2o_adds_up_what_entries_receive_where_they_stand() -> None:
    text = Text(40)
    run = Run("h2o(positions=compact):10", text.given, 25, pads=PADS, rope=ROPE)
    totals = {(row, head): defaultdict(float) for row in (0, 1) for head in (0, 1)}
    kept: dict[tuple[int, int], list[int]] = {key: [] for key in totals}
    for seen, _ in run:
        for (row, head), total in totals.items():
            last = seen - PADS[row] - 1
            for at in range(last + 1) if seen == 25 else [last]:
                entries = [*kept[row, head], at] if seen > 25 else list(range(at + 1))
                for query_head in (2 * head, 2 * head + 1):
                    for entry, weight in zip(entries, text.weights(row, query_head, entries, at).tolist(), strict=True):
                        total[entry] += weight / 2
            newest, rest = entries[-5:], entries[:-5]
            kept[row, head] = top({e: total[e] for e in rest}, 5) + newest
            assert held(run)[row][head] == kept[row, head]


def test_a_prompt_in_pieces_and_steps_stay_within_the_budget_of_positions() -> None:
    """Where a model was trained on short texts only: no distance is ever longer than budget and piece."""
    model, inputs = build(sharpen=2.0), prompt(2, 60, pads=(0, 13))
    for recipe in ("h2o(positions=compact):100", "streaming(positions=compact):100"):
        with laconic.apply(model, "dense"):
            expected = generate(model, inputs, 6)
        with laconic.apply(model, recipe):  # nothing is dropped: nothing changes
            assert torch.equal(generate(model, inputs, 6, prefill_chunk_size=16), expected)
    with laconic.apply(model, "streaming(positions=compact):20") as handle:
        generate(model, inputs, 6, prefill_chunk_size=16)
        assert handle.stats()["kept"] <= 20


def test_what_cannot_follow_is_refused() -> None:
    with laconic.apply(shared("gemma3"), "h2o(positions=compact):24"), pytest.raises(laconic.LaconicError, match="rotary"):
        generate(shared("gemma3"), prompt(1, 40), 2)
    for other in ("tokenselect:8", "razor_attention:60%", "expected_attention:50%"):
        recipe = f"h2o(positions=compact):20 + {other}"
        with pytest.raises(laconic.LaconicError, match="renumbers"), laconic.apply(shared(), recipe):
            pass
    with pytest.raises(laconic.LaconicError, match="positions must be"):
        laconic.get("streaming", positions="rank", budget="8")
