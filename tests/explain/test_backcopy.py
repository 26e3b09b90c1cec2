"""The toy task and what a small transformer shows on it."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.errors import LaconicError
from laconic.explain.backcopy import (
    BOS,
    BigramBackcopy,
    Trained,
    loss_with_sink_forced,
    relu_attention,
    relu_weights,
    train,
)

TEXT = "a rose is a rose is a rose, said the lady who had lost her other roses in the sea. " * 3


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    from laconic.evaluation.haystack import reference_text

    text = "".join(c for c in reference_text()[:60_000].lower() if c.isalpha() or c in " .\n")
    return {how: train(text, attention=how, steps=260, length=64, rows=32) for how in ("softmax", "relu")}


def test_after_a_trigger_comes_the_character_before_it() -> None:
    task = BigramBackcopy(TEXT, triggers=2)
    ids = task.batch(16, 60)
    assert (ids[:, 0] == BOS).all() and (ids[:, 1:] != BOS).all()
    assert not task.triggers[ids[:, 1]].any(), "the first character is no trigger"
    rows, places = task.triggers[ids[:, :-1]].nonzero(as_tuple=True)
    assert len(rows) > 50 and (ids[rows, places + 1] == ids[rows, places - 1]).all()
    rows, places = (~task.triggers[ids[:, :-1]]).nonzero(as_tuple=True)
    assert (task.bigram[ids[rows, places], ids[rows, places + 1]] > 0).all()


def test_the_oracle_is_the_entropy_of_the_table() -> None:
    task = BigramBackcopy("abababac" * 50, triggers=0)
    ids = task.batch(64, 200)
    a, b, c = 1, 2, 3
    assert task.bigram[b, a] == 1 and task.bigram[c, a] == 1 and task.bigram[a, b] == pytest.approx(0.75)
    at_a = float((ids[:, :-1] == a).float().mean())
    start = -(0.5 * math.log(0.5) + 0.375 * math.log(0.375) + 0.125 * math.log(0.125)) / ids.shape[1]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert task.oracle(ids) == pytest.approx(at_a * entropy + start, rel=0.05)
    with pytest.raises(LaconicError, match="too plain"):
        BigramBackcopy("ab", triggers=2)


def test_relu_weights_do_not_sum_to_one_and_see_nothing_ahead() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 8, generator=g) for _ in range(3))
    weights = relu_weights(query, key)
    for i in range(5):
        for j in range(5):
            expected = max(0.0, float(query[i] @ key[j]) / math.sqrt(8)) / (i + 1) if j <= i else 0.0
            assert weights[i, j] == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(relu_attention(query, key, value), weights @ value)


def test_softmax_grows_a_sink_and_relu_does_not(trained: dict[str, Trained]) -> None:
    soft, relu = trained["softmax"], trained["relu"]
    assert soft.copy_loss < 0.6 and soft.bigram_loss < 0.2, "it has learned the task"
    assert soft.sink > 0.4 and soft.copy_sink < 0.05
    assert relu.sink < 0.05
    assert relu.value_ratio > 1.4 * soft.value_ratio, "the sink's value is drained"


def test_a_dormant_head_is_not_missed_and_an_active_one_is(trained: dict[str, Trained]) -> None:
    before, forced = loss_with_sink_forced(trained["softmax"], on_triggers=False)
    assert abs(forced - before) < 0.1
    before, forced = loss_with_sink_forced(trained["softmax"], on_triggers=True)
    assert forced > before + 1


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(LaconicError, match="use softmax or relu"):
        train(TEXT, attention="linear", steps=1)
