"""Token Sparse Attention against the definition."""

from __future__ import annotations

import pytest
import torch
from attend import SCALE, Run, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, prompt, shared

import laconic
from laconic import LaconicError
from laconic.attention.token_sparse_attention import TokenSparseAttention, attend_among

ALL = "layers=all"


def received(query: torch.Tensor, keys: torch.Tensor, window: int, kernel: int) -> torch.Tensor:
    """Attention (heads, n - window) that the last rows pay to the tokens before them, mean of existing neighbours."""
    heads, n, _ = query.shape
    logits = torch.einsum("hqd,hkd->hqk", query, keys.repeat_interleave(heads // len(keys), 0)) * SCALE
    weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    sums = weights[:, n - window :, : n - window].sum(1)
    half = kernel // 2
    return torch.stack([sums[:, max(0, i - half) : i + half + 1].mean(1) for i in range(n - window)], 1)


def by_hand(qkv: list[torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """Among the kept tokens (heads, n) only; zeros elsewhere."""
    query, keys, values = qkv
    output = torch.zeros_like(query)
    for head in range(len(query)):
        for i in keep[head].nonzero()[:, 0].tolist():
            mine = keep[head, : i + 1].nonzero()[:, 0]
            logits = keys[head // 2, mine] @ query[head, i] * SCALE
            output[head, i] = logits.softmax(0) @ values[head // 2, mine]
    return output


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(16, 40), st.floats(0.0, 0.6), st.sampled_from([1, 3, 7]), st.booleans())
def test_the_definition(seed: int, n: int, coverage: float, kernel: int, budget: bool) -> None:
    qkv, window, pads = random_qkv(n, seed=seed), 4, (0, n // 4)
    text = f"token_sparse_attention({ALL}, window={window}, kernel={kernel}, least=2, coverage={coverage})"
    run = Run(text + (":60%" if budget else ""), qkv, n, pads=pads)
    output = run.piece(0, n)
    shares = []
    for row, pad in enumerate(pads):
        part, length = [t[row, :, pad:] for t in qkv], n - pad
        scores, prefix = received(*part[:2], window, kernel), length - window
        if budget:
            count = min(prefix, laconic.Budget.parse("60%").tokens(length) - window)
        else:
            mean = scores.mean(0).sort().values.tolist()
            removed, total = 0, 0.0
            for share in mean:
                total += share
                removed += total < coverage * sum(mean)
            count = prefix if removed == 0 else max(min(2, prefix), prefix - removed - 1)
        keep = torch.zeros(4, length, dtype=torch.bool)
        keep[:, prefix:] = True
        for head in range(4):
            keep[head, scores[head].topk(count).indices] = True
        torch.testing.assert_close(output[row, :, pad:], by_hand(part, keep), atol=1e-5, rtol=1e-5)
        assert not output[row, :, :pad].any()
        kept = count + window
        shares.append(kept * (kept + 1) / (length * (length + 1)))
    assert run.layer.request.figures[0]["pairs"] == pytest.approx(sum(shares) / 2)


def test_nothing_removed_is_dense_and_more_removed_is_less_kept() -> None:
    qkv = random_qkv(60)
    dense = Run("dense", qkv, 60).piece(0, 60)
    torch.testing.assert_close(Run(f"token_sparse_attention({ALL}, window=4, least=1, coverage=0)", qkv, 60).piece(0, 60), dense)
    kept = []
    for coverage in (0.0, 0.01, 0.05, 0.2, 0.5, 0.9):
        run = Run(f"token_sparse_attention({ALL}, window=4, least=1, coverage={coverage})", qkv, 60)
        run.piece(0, 60)
        kept.append(run.layer.request.figures[0]["pairs"])
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.2 < 1.0 == kept[0]


def test_scattering_what_was_gathered_changes_nothing() -> None:
    query, keys, values = (t[0] for t in random_qkv(20))
    everything = torch.arange(20).expand(4, -1)
    dense = Run("dense", random_qkv(20), 20).piece(0, 20)[0]
    torch.testing.assert_close(attend_among(query, keys, values, everything, SCALE), dense, atol=1e-5, rtol=1e-5)


def test_left_out_rows_are_the_residual_and_come_back_in_the_next_layer() -> None:
    model = build(num_hidden_layers=2)
    inputs = prompt(1, 60)
    recipe = "token_sparse_attention(window=4, least=1):20%"  # the upper half: layer 1
    outputs = []
    hooks = [layer.self_attn.register_forward_hook(lambda *a: outputs.append(a[-1][0])) for layer in model.model.layers]
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        model(**inputs, past_key_values=handle.cache())
        pairs = [figure["pairs"] for figure in handle._cache.request.figures.values()]
        assert all(layer.n == 60 for layer in handle._cache.layers)
    for hook in hooks:
        hook.remove()
    zero = [int((out[0].abs().sum(-1) == 0).sum()) for out in outputs]
    assert zero[0] == 0 and zero[1] > 10 and pairs[0] == 1.0 and pairs[1] == pytest.approx(12 * 13 / (60 * 61))


def test_steps_and_later_pieces_are_dense() -> None:
    qkv = random_qkv(40)
    runs = [Run(r, qkv, 30) for r in (f"token_sparse_attention({ALL}, window=4, least=1, coverage=0.5)", "dense")]
    for run in runs:
        run.piece(0, 30)
    for begin, end in ((30, 31), (31, 36), (36, 40)):
        ours, dense = (run.piece(begin, end) for run in runs)
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


def test_layers_by_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(num_hidden_layers=3)
    texts = [prompt(1, 50, seed=i)["input_ids"][0] for i in range(2)]
    drift = TokenSparseAttention.calibrate(model, texts)["drift"]
    with torch.no_grad():
        states = model(texts[0][None], output_hidden_states=True).hidden_states
    first = float(((states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)).mean())
    again = TokenSparseAttention.calibrate(model, texts[:1])["drift"]
    assert len(drift) == 3 and again[0] == pytest.approx(first, abs=1e-4)
    monkeypatch.setattr("laconic.profiles.find_profile", lambda *_: {"drift": [0.3, 0.1, 0.2]})
    with laconic.apply(model, "token_sparse_attention(layers=drift, window=4, least=1):20%") as handle, torch.no_grad():
        model(**prompt(1, 50))
        pairs = [figure["pairs"] for figure in handle._cache.request.figures.values()]
    assert [share < 1 for share in pairs] == [False, True, False]


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("token_sparse_attention(layers=some)", "layers must be one of upper, drift, all"),
        ("token_sparse_attention(kernel=4)", "kernel=4 is even"),
        ("token_sparse_attention(coverage=1)", "coverage is a share"),
        ("token_sparse_attention(layers=drift, window=4)", "token_sparse_attention needs a profile of this model"),
        ("token_sparse_attention(window=40):10%", "cannot hold the last 40: lower window"),
        ("token_sparse_attention + dhsa(borders=fixed)", "both compute a part of the prompt"),
    ],
)
def test_bad_input_is_one_sentence(recipe: str, sentence: str) -> None:
    with pytest.raises(LaconicError, match=sentence), laconic.apply(shared(), recipe):
        shared()(**prompt(1, 200))
