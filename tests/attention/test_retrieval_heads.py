"""RazorAttention and DuoAttention: heads of their own lengths, and one entry for what is gone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attend import SCALE, Run, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, generate, prompt, shared

import laconic
from laconic import LaconicError, kernels
from laconic.attention.duo_attention import DuoAttention
from laconic.attention.razor_attention import RazorAttention, best_heads, copy_scores
from laconic.attention.streaming import Streaming
from laconic.cache import Rest
from laconic.evaluation.tasks import load_task
from laconic.kernels.ragged import Ragged

HEADS = {"induction": [[0.9, 0.1]], "echo": [[0.0, 0.1]], "gates": [[0.9, 0.1]]}


@pytest.fixture
def first_head_retrieves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.profiles.find_profile", lambda method, path, model: HEADS)


def by_hand(run: Run, row: int, head: int, n: int, dropped: range, mean: bool) -> torch.Tensor:
    """Output of the newest of ``n`` tokens: dense, but for the ``dropped``, which are gone or one mean entry."""
    query, keys, values = run.query[row, head, n - 1], run.keys[row, head // 2, :n], run.values[row, head // 2, :n]
    left = [i for i in range(n) if i not in dropped and i >= int(run.pads[row])]
    logits, held = keys[left] @ query * SCALE, values[left]
    if mean and len(dropped):
        logits = torch.cat([logits, (keys[dropped].mean(0) @ query * SCALE + math.log(len(dropped)))[None]])
        held = torch.cat([held, values[dropped].mean(0, keepdim=True)])
    return logits.softmax(0) @ held


@pytest.mark.usefixtures("first_head_retrieves")
@pytest.mark.parametrize("name", ["razor_attention(induction=0.5, echo=0, ", "duo_attention("])
@pytest.mark.parametrize("pads", [(0, 0), (0, 9)])
def test_the_definition_over_prompt_and_steps(name: str, pads: tuple[int, int]) -> None:
    """Head 0 keeps all; head 1 keeps what the budget leaves, and stays at that while an answer is written."""
    run = Run(f"{name}sinks=2, recent=3):60%", random_qkv(40), 30, pads=pads)
    for seen, output in run:
        for row, pad in enumerate(pads):
            length = 30 - pad
            room = 2 * math.ceil(0.6 * length - 1e-9) - length  # of the second of two heads
            # the prompt is attended to as a whole; what it and the steps dropped is gone for the next step
            before = range(pad + 2, max(pad + 2, seen - 1 - (room - 2))) if seen > 30 else range(0)
            expected = [by_hand(run, row, h, seen, before if h >= 2 else range(0), "razor" in name) for h in range(4)]
            torch.testing.assert_close(output[row, :, -1], torch.stack(expected), atol=1e-5, rtol=1e-5)
            held = [[p for p in head if p >= 0] for head in run.layer.positions[row].tolist()]
            real = seen - pad
            assert held == [list(range(real)), [*range(2), *range(real - (room - 2), real)]]
    assert isinstance(run.layer.keys, Ragged)
    assert run.layer.keys.numel() == int((run.layer.positions >= 0).sum()) * run.keys.shape[-1]


@pytest.mark.usefixtures("first_head_retrieves")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), prompt=st.integers(8, 30), steps=st.integers(1, 12))
def test_equal_dropped_entries_are_exactly_dense(seed: int, prompt: int, steps: int) -> None:
    qkv = random_qkv(prompt + steps, seed=seed)
    for t in qkv[1:]:
        t[:, :, 1:] = t[:, :, 1:2].clone()  # whatever a head drops is the same key and value
    recipe = "razor_attention(sinks=1, recent=1, induction=0, echo=0):4"
    for (_, ours), (_, dense) in zip(Run(recipe, qkv, prompt), Run("dense", qkv, prompt), strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("first_head_retrieves")
def test_the_number_of_dropped_entries_counts() -> None:
    """Without the logarithm of their number the entry that stands for them weighs too little."""
    qkv = random_qkv(30)
    for t in qkv[1:]:
        t[:, :, 1:] = t[:, :, 1:2].clone()
    run, dense = (Run(r, qkv, 29) for r in ("razor_attention(sinks=1, recent=1, induction=0, echo=0):4", "dense"))
    run.piece(0, 29), dense.piece(0, 29)
    assert float(run.layer.rest.count.min()) == 25
    rest = run.layer.rest
    run.layer.rest = Rest(rest.key_sum / 25, rest.value_sum / 25, torch.ones(2, 2, 1))
    assert not torch.allclose(run.piece(29, 30), dense.piece(29, 30), atol=1e-4)


@pytest.mark.usefixtures("first_head_retrieves")
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_second_piece_of_prompt_sees_what_stands_for_the_first(softcap: float | None) -> None:
    """As one step at a time would: the same entries, and the mean of what the first piece dropped."""
    qkv = random_qkv(40, seed=3)
    recipe = "razor_attention(sinks=1, recent=20, induction=0, echo=0):24"
    whole, single = (Run(recipe, qkv, 36, softcap=softcap, pads=(0, 4)) for _ in range(2))
    whole.piece(0, 36), single.piece(0, 36)
    got = whole.piece(36, 37)
    torch.testing.assert_close(got, single.piece(36, 37), atol=1e-5, rtol=1e-5)
    pair = Run(recipe, qkv, 36, softcap=softcap, pads=(0, 4))
    pair.piece(0, 36)
    torch.testing.assert_close(pair.piece(36, 38)[:, :, :1], got, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("first_head_retrieves")
def test_the_rest_follows_beams_and_forks() -> None:
    run = Run("razor_attention(sinks=1, recent=2, induction=0, echo=0):5", random_qkv(20), 12)
    run.piece(0, 12)
    before = run.layer.rest
    twin = run.layer.copy(run.layer.request)
    run.layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(run.layer.rest.key_sum, before.key_sum.flip(0)) and twin.rest is before
    assert run.layer.bytes_kept - before.bytes == run.layer.keys.numel() * 8


def test_without_profile_heads_it_is_streaming() -> None:
    """No retrieval head and no compensation: the first and newest tokens, as streaming keeps them."""
    assert Streaming(budget=laconic.Budget(amount=8)).sinks == DuoAttention().sinks
    retrieval_tables = {"gates": [[0.5, 0.5]]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laconic.profiles.find_profile", lambda *_: retrieval_tables)
        qkv = random_qkv(40)
        runs = [Run(r, qkv, 30) for r in ("duo_attention(heads=0, recent=2):12", "streaming(recent=2):12")]
        for (_, ours), (_, theirs) in zip(*runs, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_steps_move_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a head that stays at its length moves its first tokens, not its cache."""
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: HEADS)
    run = Run("duo_attention(sinks=2, recent=16):60%", random_qkv(300), 200)
    moves = []
    run.piece(0, 200)
    original = run.layer._keys._move
    monkeypatch.setattr(run.layer._keys, "_move", lambda *a, **k: (moves.append(1), original(*a, **k)))
    for i in range(200, 300):
        run.piece(i, i + 1)
    assert len(moves) <= 2
    held = [[p for p in head if p >= 0] for head in run.layer.positions[0].tolist()]
    assert len(held[1]) == 40 and held[1][:2] == [0, 1] and held[1][-1] == 299 and len(held[0]) == 300


@pytest.mark.usefixtures("first_head_retrieves")
def test_memory_is_given_back_also_where_steps_do_all_the_cutting() -> None:
    """Nothing to cut in the prompt; or a cache that appears at once, as one taken over from transformers does."""
    run = Run("duo_attention(sinks=2, recent=8):60%", random_qkv(700), 60)
    for seen, _ in run:
        held = int((run.layer.positions >= 0).sum()) * run.keys.shape[-1]
        assert run.layer.keys.numel() - held <= 4 * 90 * run.keys.shape[-1], seen
    assert isinstance(run.layer.keys, Ragged)
    late = Run("duo_attention(sinks=2, recent=8):60%", random_qkv(400), 399)
    late.layer.request.positions = torch.arange(399).expand(2, -1)
    late.layer.update(late.keys[:, :, :399], late.values[:, :, :399])
    late.piece(399, 400)
    assert isinstance(late.layer.keys, Ragged) and late.layer.keys.numel() == 2 * 480 * 8
    assert late.layer.positions[0, 1][late.layer.positions[0, 1] >= 0].tolist() == [0, 1, *range(322, 400)]


def test_layers_without_retrieval_heads_do_not_grow() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laconic.profiles.find_profile", lambda *_: {"gates": [[0.5, 0.5]]})
        run = Run("duo_attention(heads=0, sinks=2, recent=4):10", random_qkv(400), 20)
        for _ in run:
            assert run.layer.n <= 10 + 64 + 1
    assert run.layer.positions[run.layer.positions >= 0].view(2, 2, 10)[0, 0].tolist() == [0, 1, *range(392, 400)]


def test_best_heads_are_a_share_of_the_whole_model() -> None:
    scores = [[0.1, 0.9, 0.3], [0.3, 0.2, 0.0]]
    assert best_heads(scores, 0.0).sum() == 0 and best_heads(scores, 1.0).all()
    assert best_heads(scores, 0.5).tolist() == [[False, True, True], [True, False, False]]
    assert best_heads(scores, 1 / 3).tolist() == [[False, True, True], [False, False, False]]  # ties to the lowest


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 4))
def test_copy_scores_against_the_whole_map(seed: int, count: int, copies: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 1 + count * copies
    query, keys = torch.randn(2, n, 6, generator=generator)
    weights = (query @ keys.T).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    pairs = [(i, i - r * count) for i in range(1 + count, n) for r in range(1, copies) if i - r * count >= 1]
    expected = [sum(float(weights[i, j + after]) for i, j in pairs) / len(pairs) for after in (1, 0)]
    assert copy_scores(query, keys, count).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_profile_depends_on_nothing_but_the_seed() -> None:
    model = build(max_position_embeddings=128)
    texts = [torch.arange(1, 90)]
    first, again, other = (RazorAttention.calibrate(model, texts, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert torch.tensor(first["induction"]).shape == torch.tensor(first["echo"]).shape == (2, 2)


def test_gates_leave_the_model_as_it_was_and_close_what_is_not_needed() -> None:
    model = build(max_position_embeddings=512)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    texts = [prompt(1, 300, seed=i)["input_ids"][0] for i in range(2)]
    gates = torch.tensor(DuoAttention.calibrate(model, texts, [torch.tensor([3, 4])] * 2)["gates"])
    assert gates.shape == (2, 2) and bool((gates >= 0).all()) and bool((gates <= 1).all()) and bool((gates < 1).any())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


@pytest.mark.parametrize("name", ["razor_attention", "duo_attention"])
def test_the_built_in_model_answers_with_a_third_of_its_cache(name: str) -> None:
    model, tokenizer = laconic.load("needle")
    task = load_task("needle", tokenizer, lengths=[1024], samples=2, seed=5)
    for example in task.examples:
        inputs = tokenizer(example.prompt, return_tensors="pt")
        with laconic.apply(model, f"{name}:35%") as handle:
            out = generate(model, inputs, 6, return_dict_in_generate=True)
        answer = example.answer if isinstance(example.answer, str) else example.answer[0]
        assert answer in tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :])
        n = inputs["input_ids"].shape[1]
        whole = 2 * 6 * n * 64 * 4
        assert handle.stats()["bytes_kept"] <= 0.38 * whole


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("razor_attention(induction=0.5):10%", "cannot hold 2 of 4 heads at full length and 20 tokens of each other"),
        ("duo_attention:5%", "cannot hold 0 of 4 heads at full length"),
        ("razor_attention(induction=2):10%", "shares of the heads"),
        ("duo_attention(heads=1.5):10%", "heads is a share"),
        ("razor_attention:pyramid:10%", "give it without a shape"),
        ("razor_attention(profile=no.json):10%", "laconic profile razor_attention --model MODEL"),
        ("razor_attention:50% + act", "act changes weights of entries, and razor_attention has one for many"),
    ],
)
def test_bad_input_is_one_sentence(recipe: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: dict[str, Any] = {"induction": [[0.9, 0.1]] * 2, "echo": [[0.9, 0.1]] * 2, "gates": [[0.9, 0.1]] * 2}
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: tables)
    with pytest.raises(LaconicError, match=sentence), laconic.apply(shared(), recipe):
        shared()(**prompt(1, 100))


def test_a_model_without_a_profile_is_told_how_to_make_one() -> None:
    sentence = "laconic profile duo_attention --model MODEL"
    with pytest.raises(LaconicError, match=sentence), laconic.apply(shared(), "duo_attention:40"):
        shared()(**prompt(1, 100))


def test_the_merge_is_that_of_the_kernels() -> None:
    """What stands for evicted entries is one more partial attention."""
    run = Run("razor_attention(sinks=1, recent=2, induction=0, echo=0):5", random_qkv(14), 13)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laconic.profiles.find_profile", lambda *_: HEADS)
        run.piece(0, 13)
        rest = run.layer.rest
        got = run.piece(13, 14)
    query = run.query[:, :, 13]
    held = [torch.cat([t[:, :, :1], t[:, :, 9:14]], 2) for t in (run.keys, run.values)]
    part, lse = kernels.decode_attention(query, *held, scale=SCALE)
    key, value, bias = rest.entry(torch.float32)
    one, logit = kernels.decode_attention(query, key, value, scale=SCALE)
    merged, _ = kernels.merge_attention([part, one], [lse, logit + bias[..., 0].repeat_interleave(2, 1)])
    torch.testing.assert_close(got[:, :, 0], merged, atol=1e-5, rtol=1e-5)
