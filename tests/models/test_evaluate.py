"""The figures of a model card, on a model whose answers are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from laconic.evaluation.examples import Example, Task
from laconic.models import evaluate


def test_accuracy_counts_what_generate_writes(tiny) -> None:
    model, tokenizer = tiny
    ids = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=1)
    written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert evaluate.answer(model, tokenizer, "The quick brown fox", 6) == written
    examples = [Example("The quick brown fox", answer, max_new_tokens=6) for answer in (written, "something else")]
    assert evaluate.accuracy(model, tokenizer, Task("t", "exact", examples)) == 0.5


def test_perplexity_is_of_the_second_half(tiny) -> None:
    model, tokenizer = tiny
    text = "It was a bright cold day in April, and the clocks were striking."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    half = ids.shape[1] // 2
    chosen = [float(log_probs[i - 1, ids[0, i]]) for i in range(half, ids.shape[1])]
    value = evaluate.perplexity(model, tokenizer, Task("t", "perplexity", [Example(text), Example(text)]))
    assert value == pytest.approx(math.exp(-sum(chosen) / len(chosen)), rel=1e-4)


def test_command_prints_a_table_or_json(tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", tiny_path, "--samples", "1", "--lengths", "1024"]
    assert evaluate.main([*command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table) == list(evaluate.TASKS) and table["perplexity"]["1024"] > 1
    assert evaluate.main(["--model", "/no/such/model"]) == 2
    error = capsys.readouterr().err
    assert "no model folder /no/such/model" in error and error.count("\n") == 1


def test_markdown() -> None:
    text = evaluate.markdown({"needle": {1024: 1.0, 2048: 0.985}, "perplexity": {1024: 9.514, 2048: 8.0}})
    assert text.splitlines() == [
        "| task | 1,024 tokens | 2,048 tokens |",
        "|---|---|---|",
        "| needle | 100.0% | 98.5% |",
        "| perplexity | 9.51 | 8.00 |",
    ]
