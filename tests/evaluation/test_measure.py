"""One cell: forced decoding, the method's own text, the split of the prompt, and memory."""

from __future__ import annotations

import pytest
import torch

from laconic.errors import LaconicError
from laconic.evaluation import measure
from laconic.evaluation.examples import Example
from laconic.evaluation.memory import PeakMemory


def example(prompt: str, answer: str | None = "x", question: str | None = None, limit: int = 6) -> Example:
    return Example(prompt, answer, None, question, limit, meta={"length": len(prompt)})


@pytest.fixture
def runner(tiny) -> measure.Runner:
    return measure.Runner(*tiny)


def stock_logits(model: torch.nn.Module, ids: list[int], count: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -count:].log_softmax(-1)


def test_greedy_run_equals_generate_and_a_full_forward(tiny, runner) -> None:
    model, tokenizer = tiny
    (item,) = measure.prepare([example("The quick brown fox", limit=12)], tokenizer)
    trace = runner.run(item)
    ids = torch.tensor([item.ids])
    stock = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert trace.forced == trace.own == stock[0, len(item.ids) :].tolist()
    full = stock_logits(model, item.ids + trace.forced[:-1], len(trace.forced))
    assert torch.allclose(trace.log_probs, full, atol=1e-4)
    assert len(trace.steps_s) == len(trace.forced) - 1 and trace.prefill_s > 0  # the prefill predicts the first


def test_forced_run_follows_the_given_tokens_and_own_text_is_the_free_one(tiny, runner) -> None:
    """Forced along other tokens, the own text must be what the model says without any force."""
    model, tokenizer = tiny
    (item,) = measure.prepare([example("The quick brown fox", limit=8)], tokenizer)
    free = runner.run(item).forced
    item.forced = [*free[:3], (free[3] + 1) % 258, *free[4:]]
    assert runner.run(item, lean=True).own == free[:4]
    trace = runner.run(item)
    assert trace.forced == item.forced and trace.own == free
    full = stock_logits(model, item.ids + item.forced[:-1], 8)
    assert torch.allclose(trace.log_probs, full, atol=1e-4)


def test_generation_stops_at_the_end_mark(tiny, runner) -> None:
    (item,) = measure.prepare([example("The quick brown fox", limit=8)], tiny[1])
    free = runner.run(item).forced
    runner.stop = {free[2]}
    stopped = runner.run(item)
    assert stopped.forced == free[: free.index(free[2]) + 1]
    assert runner.text(stopped.forced) == tiny[1].decode(stopped.forced[:-1])


def test_question_after_prefills_the_context_only(tiny, runner) -> None:
    prompt = "Some context. What is it?"
    (seen,) = measure.prepare([example(prompt, question=" What is it?")], tiny[1])
    (after,) = measure.prepare([example(prompt, question=" What is it?")], tiny[1], question="after")
    (without,) = measure.prepare([example(prompt)], tiny[1], question="after")
    assert seen.prefill == without.prefill == len(prompt) and after.prefill == len("Some context.")
    first, second = runner.run(seen), runner.run(after)
    assert first.forced == second.forced and torch.allclose(first.log_probs, second.log_probs, atol=1e-4)
    assert len(second.steps_s) == len(first.steps_s) + len(" What is it?")


def test_perplexity_scores_the_second_half_of_the_text(tiny, runner) -> None:
    model, tokenizer = tiny
    (item,) = measure.prepare([example("abcdefghijklmnop", None, limit=5)], tokenizer, perplexity=True)
    ids = tokenizer("abcdefghijklmnop")["input_ids"]
    assert item.ids == ids[:8] and item.forced == ids[8:13]
    trace = runner.run(item)
    measure.keep_reference(item, trace, 1)
    row = measure.judge(runner, item, trace, "perplexity")
    with torch.no_grad():
        logits = model(torch.tensor([ids[:13]])).logits[0].log_softmax(-1)
    expected = -sum(float(logits[i - 1, ids[i]]) for i in range(8, 13))
    assert row["nll"] == pytest.approx(expected, abs=1e-3) and row["scored"] == 5 and row["correct"] is None


def test_short_prompts(tiny, runner) -> None:
    (item,) = measure.prepare([example("a")], tiny[1])
    assert item.prefill == 1 and len(runner.run(item).forced) == 6
    with pytest.raises(LaconicError, match="Example 2 has 0 tokens"):
        measure.prepare([example("a"), example("")], tiny[1])


def test_reference_in_half_precision_is_still_a_distribution(tiny, runner, monkeypatch) -> None:
    monkeypatch.setattr(measure, "REFERENCE_BYTES", 0)
    (item,) = measure.prepare([example("The quick brown fox")], tiny[1])
    trace = runner.run(item)
    measure.keep_reference(item, trace, 1)
    assert item.dense.dtype == torch.float16
    row = measure.judge(runner, item, trace, "contains")
    assert row["fidelity"] == 1.0 and 0 <= row["kl"] < 1e-4


def test_nan_is_refused(tiny, runner, monkeypatch) -> None:
    (item,) = measure.prepare([example("The quick brown fox")], tiny[1])
    monkeypatch.setattr(runner, "forward", lambda tokens, cache, inputs=None: (torch.full((258,), torch.nan), None, 0.0))
    with pytest.raises(LaconicError, match="not numbers"):
        measure.keep_reference(item, runner.run(item), 1)


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_sees_memory_that_is_gone_at_the_end(sampled: bool, monkeypatch) -> None:
    if sampled:
        monkeypatch.setattr("laconic.evaluation.memory._reset_high_water", lambda: False)
    for _ in range(2):  # the second time the heap already has room, which must not hide the use
        with PeakMemory() as peak:
            work = torch.ones(16 << 20, dtype=torch.uint8)
            for _ in range(5):
                work.add_(1)
            del work
        assert 15 << 20 <= peak.bytes < 40 << 20
    assert ("sampled" in peak.source) == sampled
