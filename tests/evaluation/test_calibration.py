"""Texts and answers that profiles are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from laconic.errors import LaconicError
from laconic.evaluation.calibration import calibration_texts, text_samples


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return laconic.load("needle")[1]


class WithBos:
    """A tokenizer that puts token 1 before a text; every character is a token."""

    bos_token_id = 1

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[1, *map(ord, text)]])}


def test_stretches_are_spread_and_begin_as_texts_do(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(100, 200))), encoding="utf-8")
    first, second, third = text_samples(WithBos(), path, 20, 3)
    assert first.tolist() == [1, *range(100, 119)]
    assert second[0] == third[0] == 1 and len(second) == len(third) == 20
    assert 119 < second[1] < third[1] and third[1:].diff().eq(1).all()
    with pytest.raises(LaconicError, match="has 101 tokens only"):
        text_samples(WithBos(), path, 102, 1)


def test_answers_go_on_from_their_prompts(tokenizer: Any) -> None:
    texts, answers = calibration_texts(tokenizer, None, "needle", 256, 4, seed=1)
    assert len(texts) == len(answers) == 4 and max(map(len, texts)) < 260
    for text, answer in zip(texts, answers, strict=True):
        assert tokenizer.decode(answer).strip() in tokenizer.decode(text), "the needle stands in the text"
        assert len(answer) == 2
    others, _ = calibration_texts(tokenizer, None, "needle", 256, 4, seed=2)
    assert not torch.equal(texts[0], others[0])


def test_without_answers_or_with_patterns_there_are_only_texts(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "Once upon a time"}))
    for task in ("threads", str(path)):
        texts, answers = calibration_texts(tokenizer, None, task, 256, 1, seed=1)
        assert len(texts) == 1 and answers is None
