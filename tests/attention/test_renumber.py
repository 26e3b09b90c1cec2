"""positions=compact of evicting methods: what stays is a text without gaps, by hand from keys before RoPE."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import vlm
from attend import SCALE, Run, held, random_qkv, record, top, turn_by
from tiny import WINDOW, build, generate, prompt, shared

import laconic
from laconic.attention.engine import Policy
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


@pytest.mark.parametrize(
    "recipe",
    [
        "h2o(recent=3, positions=compact):10",
        "streaming(sinks=2, positions=compact):8",
        "tokenselect(sinks=2, recent=3, refresh=2, positions=compact):8",  # reads a part, and evicts nothing
    ],
)
def test_every_layer_renumbers_by_its_own_table(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local and a global layer of one model, whose frequencies differ: the output of steps, by hand from raw keys."""
    model, calls, reads, far = build("gemma3", sharpen=2.0), record(monkeypatch), [], [0.0, 0.0]
    select = Policy._select
    monkeypatch.setattr(Policy, "_select", lambda *given: reads.append(select(*given)) or reads[-1])
    with laconic.apply(model, recipe):
        generate(model, prompt(2, 40, pads=PADS), 5)
    steps = [(seen, read) for seen, read in zip(calls, reads, strict=True) if seen.call.decoding]
    assert len(steps) == 8
    for seen, read in steps:
        index = seen.layer.index
        assert (read is not None) == recipe.startswith("tokenselect")
        for row in (0, 1):
            own = int(seen.positions[row].max())
            for head in range(4):
                at = seen.positions[row, head // 2]
                held = at >= (0 if index else max(0, own - WINDOW + 1))
                slots = held.nonzero()[:, 0] if read is None else read.indices[row, 0]
                assert len(slots) < own + 1 and bool(held[slots].all())
                place, where = torch.arange(len(slots)), at[slots]
                for table in (0, 1):
                    keys = turn_by(model, table, seen.keys[row, head // 2, slots], place - where)
                    query = turn_by(model, table, seen.call.query[row, head], place[-1:] - own)
                    by_hand = ((query @ keys.T * seen.call.scale).softmax(-1) @ seen.values[row, head // 2, slots])[0]
                    if table == index:
                        torch.testing.assert_close(seen.output[row, head, 0], by_hand, atol=1e-4, rtol=1e-4)
                    else:
                        far[index] = max(far[index], float((seen.output[row, head, 0] - by_hand).abs().max()))
    assert min(far) > 1e-3  # by the other layer's table it would be something else


@pytest.mark.parametrize("family", [family for family in vlm.FAMILIES if not family.startswith("qwen")])
def test_behind_eyes_the_full_budget_is_dense_and_a_small_one_is_kept(family: str) -> None:
    """Gemma 3 sees with two tables, and its picture tokens see each other."""
    model, x = vlm.build(family), vlm.inputs(family, (1, 2))
    real = x["attention_mask"].bool()
    with torch.no_grad(), laconic.apply(model, "dense"):
        expected = model(**x).logits[real]
    for method in ("streaming(positions=compact)", "tokenselect(positions=compact)", "expected_attention"):
        with torch.no_grad(), laconic.apply(model, f"{method}:4096"):
            torch.testing.assert_close(model(**x).logits[real], expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad(), laconic.apply(model, f"{method}:22") as handle:
            model.generate(**x, max_new_tokens=3, do_sample=False)
            assert handle.latest.request.figures[1]["kept"] <= 22  # a layer without a window, behind which nothing is counted


def test_pictures_that_were_renumbered_are_not_renumbered_again() -> None:
    """Their positions do not say any more how far a key was turned."""
    model, x = vlm.build("llava"), vlm.inputs("llava", (1,))
    for recipe in ("streaming(positions=compact):24", "expected_attention:24"):
        with laconic.apply(model, f"uniform:8 + {recipe}"), torch.no_grad():
            model(**x)
        with laconic.apply(model, f"uniform(positions=compact):8 + {recipe}"), pytest.raises(laconic.LaconicError, match="keep"):
            model(**x)


def test_what_cannot_follow_is_refused() -> None:
    model, x = vlm.build("qwen2_vl"), vlm.inputs("qwen2_vl", (1,))
    for method in ("h2o", "tokenselect", "longheads(chunk=4, ", "streaming"):
        recipe = f"{method}positions=compact):14" if "(" in method else f"{method}(positions=compact):24"
        with laconic.apply(model, recipe), pytest.raises(laconic.LaconicError, match="leave positions=keep here"):
            model(**x)
    for other in ("tokenselect:8", "razor_attention:60%", "expected_attention:50%"):
        recipe = f"h2o(positions=compact):20 + {other}"
        with pytest.raises(laconic.LaconicError, match="renumbers"), laconic.apply(shared(), recipe):
            pass
    with pytest.raises(laconic.LaconicError, match="positions must be"):
        laconic.get("streaming", positions="rank", budget="8")
