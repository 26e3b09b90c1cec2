"""DHSA and the network that finds its borders, against the definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attend import SCALE, Run, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, prompt, shared

import laconic
from laconic import LaconicError
from laconic.attention import dhsa
from laconic.attention.boundaries import RATIO, WINDOW, BoundaryPredictor, border_labels, choose_borders, train_predictor
from laconic.attention.dhsa import DHSA
from laconic.profiles import make_profile, weights_to_json

FIXED = "borders=fixed"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 60), st.sampled_from([None, 2.0]))
def test_labels_against_the_whole_map(seed: int, n: int, softcap: float | None) -> None:
    query, keys, _ = (t[0] * 2 for t in random_qkv(n, batch=1, seed=seed))
    logits = torch.einsum("hqd,hkd->hqk", query, keys.repeat_interleave(2, 0)).double() * SCALE
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1).sum(0)
    labels = border_labels(query, keys, SCALE, softcap)
    assert labels[: 2 * WINDOW].isnan().all() and labels[n - 2 * WINDOW :].isnan().all()
    for gap in range(2 * WINDOW, n - 2 * WINDOW):
        rows = weights[gap + WINDOW :]
        past, future = (float(rows[:, a:b].sum()) for a, b in ((gap - WINDOW + 1, gap + 1), (gap + 1, gap + 1 + WINDOW)))
        ratio = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
        if abs(ratio - RATIO) > 1e-3:
            assert float(labels[gap]) == (ratio >= RATIO), gap


def test_the_network_sees_a_window_around_each_gap_and_comes_back_from_json() -> None:
    torch.manual_seed(0)
    predictor, keys = BoundaryPredictor(8).eval(), torch.randn(30, 8)
    logits = predictor(keys)
    far = keys.clone()
    far[[*range(20 - WINDOW + 1), *range(20 + WINDOW + 1, 30)]] *= -2
    assert torch.equal(predictor(far)[20], logits[20]) and not torch.allclose(predictor(far)[3], logits[3])
    again = BoundaryPredictor.of(weights_to_json(predictor))
    torch.testing.assert_close(again(keys), logits, atol=2e-3, rtol=2e-3)


def test_training_learns_where_keys_change() -> None:
    """Stretches of keys around one of a few centres; labels are the true borders."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=generator)

    def text() -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.randint(9, 30, (14,), generator=generator)
        keys = torch.cat([centres[i % 6] + 0.2 * torch.randn(int(m), 16, generator=generator) for i, m in enumerate(lengths)])
        labels = torch.zeros(len(keys))
        labels[lengths.cumsum(0)[:-1] - 1] = 1
        return keys, labels

    predictor = train_predictor([text() for _ in range(8)], seed=0)
    keys, labels = text()
    found = predictor(keys)
    true = (labels > 0).nonzero()[:, 0]
    best = found.topk(len(true)).indices
    near = [(best - gap).abs().min() <= 1 for gap in true]
    assert sum(near) >= 0.8 * len(true)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 80), st.integers(0, 9), st.integers(1, 20), st.floats(-1, 1))
def test_borders_ascend_apart_from_the_first_to_the_last(seed: int, n: int, apart: int, most: int, threshold: float) -> None:
    logits = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    last = n - n // 5
    borders = choose_borders(logits, threshold, apart, most, last)
    assert borders[0] == 0 and borders[-1] == n and bool((borders.diff() > 0).all())
    inner = [b for b in borders.tolist() if b not in (0, n, last)]
    assert len(inner) <= most - 1 and all(b < last and logits[b - 1] > threshold for b in inner)
    chosen = sorted([*inner, last])
    assert all(b - a > apart for a, b in itertools.pairwise(chosen))
    if most > n:  # nothing that could have been taken was left out
        for gap in range(last - 1):
            if logits[gap] > threshold and gap + 1 not in chosen:
                assert any(abs(gap + 1 - b) <= apart for b in chosen)


def by_hand(query: torch.Tensor, keys: torch.Tensor, borders: list[int], block: range, quota: int, method: DHSA) -> set[int]:
    """The tokens that a block of queries reads."""
    end = block.stop
    if end <= quota:
        return set(range(end))
    must = {*range(method.first), *range(end - method.local, end)}
    scores = []
    for a, b in itertools.pairwise(borders):
        rep_q = query[:, block].mean(1) * math.sqrt(len(block))  # (heads, d)
        rep_k = keys[:, a:b].mean(1) * math.sqrt(b - a)
        grouped = rep_q.view(keys.shape[0], -1, keys.shape[2]).mean(1)
        product = (grouped * rep_k).sum() if method.reduce == "sum" else rep_q.mean(0) @ rep_k.mean(0)
        scores += [float(product)] * (b - a)
    rest = sorted((i for i in range(end) if i not in must), key=lambda i: (-scores[i], i))
    return must | set(rest[: quota - len(must)])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 40), st.sampled_from(["sum", "mean"]), st.integers(12, 30))
def test_what_a_block_reads_against_the_definition(seed: int, n: int, reduce: str, quota: int) -> None:
    query, keys, _ = (t[0] for t in random_qkv(n, batch=1, seed=seed))
    method = DHSA(borders="fixed", block=4, first=2, local=5, instruction=3, reduce=reduce)
    borders = sorted({0, n, *torch.randint(1, n, (5,), generator=torch.Generator().manual_seed(seed)).tolist()})
    blocks = list(method.blocks(query, keys, torch.tensor(borders), quota))
    assert [b[:2] for b in blocks][-1] == (n - 3, n) and blocks[-1][2].flatten().tolist() == list(range(n))
    assert blocks[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
    for begin, end, slots in blocks[:-1]:
        read = slots.flatten().tolist()
        assert read == sorted(set(read))  # nothing is counted twice
        assert set(read) == by_hand(query, keys, borders, range(begin, end), quota, method), (begin, end)


def test_a_stretch_of_equal_keys_counts_by_the_root_of_its_length() -> None:
    key = torch.randn(6)
    pooled = dhsa._pooled(torch.cat([key.expand(9, 6), 3 * key.expand(4, 6)]), torch.tensor([0, 9, 13]))
    torch.testing.assert_close(pooled, torch.stack([3 * key, 6 * key]))


@pytest.mark.parametrize("pads", [(0, 0), (0, 11)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_outputs_of_a_padded_batch(pads: tuple[int, int], softcap: float | None) -> None:
    """Each row attends to what its blocks read, and to nothing after it; the share of pairs is counted."""
    n, quota = 48, 14
    qkv = random_qkv(n, seed=2)
    method = DHSA(borders="fixed", block=4, first=2, local=5, instruction=3, length=6, budget=laconic.Budget(amount=quota))
    run = Run(str(method), qkv, n, pads=pads, softcap=softcap)
    output, shares = run.piece(0, n), []
    for row, pad in enumerate(pads):
        query, keys, values = (t[row, :, pad:] for t in qkv)
        length, count, pairs = n - pad, 0, 0
        borders = [*range(0, length, 6), length]
        for begin in [*range(0, length - 3, 4), length - 3]:
            block = range(begin, min(begin + 4, length - 3)) if begin < length - 3 else range(length - 3, length)
            full = begin >= length - 3
            read = set(range(length)) if full else by_hand(query, keys, borders, block, quota, method)
            for i in block:
                mine = sorted(j for j in read if j <= i)
                count, pairs = count + len(mine), pairs + i + 1
                for head in range(4):
                    logits = keys[head // 2, mine] @ query[head, i] * SCALE
                    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                    expected = logits.softmax(0) @ values[head // 2, mine]
                    torch.testing.assert_close(output[row, head, pad + i], expected, atol=1e-5, rtol=1e-5)
        shares.append(count / pairs)
        assert not output[row, :, :pad].any()
    assert run.layer.request.figures[0]["pairs"] == pytest.approx(sum(shares) / 2)
    assert run.layer.n == n  # the cache is whole


def test_steps_and_later_pieces_are_dense() -> None:
    qkv = random_qkv(40)
    runs = [Run(r, qkv, 30) for r in (f"dhsa({FIXED}, block=4, first=1, local=4):8", "dense")]
    for run in runs:
        run.piece(0, 30)
    for begin, end in ((30, 31), (31, 36), (36, 40)):
        ours, dense = (run.piece(begin, end) for run in runs)
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


def test_borders_are_found_once_and_shared_by_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(max_position_embeddings=512)
    texts = [prompt(1, 120, seed=i)["input_ids"][0] for i in range(2)]
    made = make_profile("dhsa", model, texts, seed=0)
    assert {"weights", "borders", "found", "right"} == made.tables.keys() and 0 <= made.tables["borders"] < 1
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: made.tables)
    calls = []
    original = dhsa.choose_borders
    monkeypatch.setattr(dhsa, "choose_borders", lambda *a: calls.append(a) or original(*a))
    with laconic.apply(model, "dhsa(block=8, first=4, local=8, instruction=8):40") as handle, torch.no_grad():
        first = model(**prompt(2, 150, pads=(0, 30))).logits
        again = model(**prompt(2, 150, pads=(0, 30))).logits
        alone = model(prompt(2, 150, pads=(0, 30))["input_ids"][1:, 30:]).logits
    assert len(calls) == 2 + 2 + 1  # once per row and prompt
    assert torch.equal(first, again) and handle.stats()["pairs"] < 0.7
    torch.testing.assert_close(first[1, 30:], alone[0], atol=1e-3, rtol=1e-3)


def test_the_built_in_model_answers_with_an_eighth_of_the_pairs() -> None:
    from laconic.evaluation.tasks import load_task

    model, tokenizer = laconic.load("needle")
    example = load_task("needle", tokenizer, lengths=[2048], samples=1, seed=3).examples[0]
    inputs = tokenizer(example.prompt, return_tensors="pt")
    with laconic.apply(model, "dhsa(first=32, local=64):12.5%") as handle, torch.no_grad():
        cache = handle.cache()
        model(**inputs, past_key_values=cache, logits_to_keep=1)
        assert handle.stats()["pairs"] < 0.35
    with laconic.apply(model, "dhsa(first=32, local=64):12.5%"):
        out = model.generate(**inputs, max_new_tokens=6)
    assert example.answer in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("dhsa(local=32)", "hides its own key"),
        ("dhsa(borders=no)", "borders must be one of predicted, fixed"),
        ("dhsa(reduce=max)", "reduce must be one of sum, mean"),
        ("dhsa(profile=no.json)", "laconic profile dhsa --model MODEL"),
        ("dhsa:64", "dhsa needs a profile of this model"),
        (f"dhsa({FIXED}):64", "a budget of 64 tokens cannot hold"),
    ],
)
def test_bad_input_is_one_sentence(recipe: str, sentence: str) -> None:
    with pytest.raises(LaconicError, match=sentence), laconic.apply(shared(), recipe):
        shared()(**prompt(1, 300))
