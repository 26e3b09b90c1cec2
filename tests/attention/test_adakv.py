from __future__ import annotations

import itertools

import pytest
import torch
from attend import SCALE, Run, held, random_qkv
from hypothesis import given
from hypothesis import strategies as st
from tiny import generate, prompt, shared

import laconic
from laconic import Recipe, registry
from laconic.attention import engine
from laconic.attention.base import ReadMethod
from laconic.errors import LaconicError
from laconic.kernels.ragged import Ragged
from laconic.primitives.select import keep_top_of_all_heads


@given(st.integers(0, 10**6), st.integers(6, 20), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_best_of_all_heads_stay(seed: int, quota: int, floor: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, 30, generator=g) * torch.tensor([1.0, 3.0, 0.2])[:, None]
    starts = torch.tensor([[0], [8]]).expand(2, 3)
    picked = keep_top_of_all_heads(scores, torch.tensor([quota, quota - 2]), starts, sinks=1, recent=2, floor=floor)
    for row, (k, first) in enumerate([(quota, 0), (quota - 2, 8)]):
        worth = scores[row].clone()
        worth[:, :first] = -1
        worth[:, first] = worth[:, -2:] = 99
        worth[:, -2:] = 99
        sure = {(h, int(i)) for h in range(3) for i in worth[h].topk(-int(-floor * k // 1)).indices}
        others = sorted((float(worth[h, i]), h, i) for h in range(3) for i in range(first, 30) if (h, i) not in sure)[::-1]
        sure |= {(h, i) for _, h, i in others[: max(0, 3 * k - len(sure))]}
        found = {(h, i) for h in range(3) for i in picked[row, h].tolist() if i >= 0}
        assert found == sure
        for h in range(3):
            slots = picked[row, h].tolist()
            assert slots == sorted(slots)


def test_it_is_the_other_method_where_every_head_keeps_its_share() -> None:
    qkv = random_qkv(50)
    for inner in ("knorm(sinks=2, recent=3)", "snapkv(window=4, kernel=3)", "h2o", "tova(per_head=true)"):
        runs = [Run(recipe, qkv, 40, pads=(0, 9)) for recipe in (f"adakv({inner}, floor=1):12", f"{inner}:12")]
        for (_, one), (_, other) in zip(*runs, strict=True):
            torch.testing.assert_close(one, other)
        assert held(runs[0]) == held(runs[1])


def test_heads_get_what_their_scores_earn_and_the_total_is_the_budget() -> None:
    query, keys, values = random_qkv(60, batch=1)
    keys[0, 0] *= 0.05  # head 0 attends to everything alike, head 1 to a few tokens
    keys[0, 1] *= 6
    run = Run("adakv(snapkv(window=4, kernel=1), floor=0.1):20", [query, keys, values], 60)
    run.piece(0, 60)
    sizes = [len(head) for head in held(run)[0]]
    assert sum(sizes) == 40 and sizes[0] != sizes[1] and min(sizes) >= 4
    assert run.layer.n == max(sizes), "a layer is as long as its longest head"


def test_recipes_nest_and_come_back() -> None:
    for text in ("adakv:10%", "adakv(snapkv(window=16, kernel=3), floor=0.5):10%", "adakv(knorm):64 + tokenselect:32"):
        recipe = Recipe.parse(text)
        assert Recipe.parse(str(recipe)) == recipe
    method = Recipe.parse("adakv(snapkv(window=16), floor=0.5):10%").methods[0]
    assert method.of == "snapkv(window=16)" and method.inner.window == 16 and str(method.inner.budget) == "10%"
    assert laconic.get("adakv", of="knorm", budget="10%") == Recipe.parse("adakv(knorm):10%").methods[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("adakv(recycled_attention):10%", "recycled_attention has no scores of entries"),
        ("adakv(adakv(knorm)):10%", "adakv has no scores"),
        ("adakv(knorm:10%)", "without a budget"),
        ("adakv(knorm + h2o):10%", "of names one method"),
        ("adakv(knrm):10%", "knorm"),
        ("adakv(knorm, h2o):10%", "gives of twice"),
        ("snapkv(knorm):10%", "is not a parameter"),
        ("adakv(snapkv(window=4):10%", "is not a method"),
        ("adakv(floor=2)", "up to 1"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(LaconicError, match=sentence) as error:
        Recipe.parse(text)
    assert "\n" not in str(error.value)


def test_each_head_is_stored_in_its_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are those of the budget, not of the longest head; what comes out is what padded heads would give."""
    model, inputs = shared(), prompt(2, 74, seed=5, pads=(0, 20))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    every = {row["id"]: registry.find(row["id"]) for row in registry.methods()}
    readers = [name for name, cls in every.items() if issubclass(cls, ReadMethod) and cls.needs == "nothing"]
    for reader in [None, *readers]:
        recipe = "adakv(keydiff(sinks=1, recent=1), floor=0.1):16" + (f" + {reader}(sinks=1, recent=3):8" if reader else "")
        outputs = []
        for saves in (0.01, 2.0):
            monkeypatch.setattr("laconic.cache.SAVES", saves)
            with laconic.apply(model, recipe) as handle, torch.no_grad():
                cache, out = handle.cache(), []
                for begin, end in itertools.pairwise([0, 70, 71, 72, 73, 74]):
                    out.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
                outputs.append(torch.cat(out, 1)[mask.bool()])
                layer = cache.layers[0]
                assert isinstance(layer.keys, Ragged) == (saves < 1)
                if saves < 1 and reader is None:  # two rows and two KV heads of 16 entries on average
                    assert layer.keys.numel() + layer.values.numel() == 2 * (2 * 2 * 16) * layer.keys.shape[-1]
                    assert layer.n > 16 and layer.entries == handle.stats()["kept"] == 16
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pads", [(0, 0), (0, 14)])
@pytest.mark.parametrize("inner", ["tokenselect(sinks=2, recent=3)", "hisa(block=4, oversample=9, sinks=2, recent=3)"])
def test_heads_share_what_a_step_reads(inner: str, pads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The best votes of all heads of a row together, the floor and the protected ones apart; hisa here scores every token."""
    qkv, read = random_qkv(50, seed=4), []
    original = engine.kernels.selected_attention
    monkeypatch.setattr(engine.kernels, "selected_attention", lambda *a, **k: (read.append(a[3]), original(*a, **k))[1])
    run = Run(f"adakv({inner}, floor=0.25):12", qkv, 49, pads=pads)
    run.piece(0, 49)
    run.piece(49, 50)
    assert run.layer.n == 50  # nothing is forgotten
    for row, pad in enumerate(pads):
        best = {}
        for head in range(2):
            logits = torch.einsum("hd,nd->hn", qkv[0][row, 2 * head : 2 * head + 2, 49], qkv[1][row, head]) * SCALE
            free = range(pad + 2, 47)
            votes = logits[:, free].softmax(-1).sum(0)
            ranked = sorted(zip(votes.tolist(), free, strict=True), reverse=True)
            best[head] = ranked
        sure = {head: {pad, pad + 1, 47, 48, 49} for head in best}  # five of the twelve; the floor is three
        rest = sorted(((v, head, slot) for head, ranked in best.items() for v, slot in ranked), reverse=True)
        for _, head, slot in rest[: 24 - 10]:
            sure[head].add(slot)
        got = {head: {s for s in read[-1][row, head].tolist() if s >= 0} for head in best}
        assert got == sure
    kept = run.layer.request.figures[0]["kept"]
    assert kept == 12


def test_a_reader_over_shared_heads_over_an_evictor_runs() -> None:
    """The composition of the three: what stays by heads, what a step reads by heads of what stays."""
    model = shared()
    with laconic.apply(model, "adakv(keydiff):40 + adakv(quest(page=4, sinks=1, recent=2)):12") as handle:
        generate(model, prompt(2, 74, pads=(0, 20)), 5)
        assert handle.stats()["kept"] <= 12
