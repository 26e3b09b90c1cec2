"""Training documents: exact length, answers that can be found, text labels that are the text."""

from __future__ import annotations

import numpy as np
import pytest

from laconic.models.names import code_names
from laconic.models.needle_data import IGNORED, DocumentMaker
from laconic.models.needle_tokenizer import train_tokenizer

TEXT = "It was a bright day. The clocks were striking thirteen, and nobody minded.\n" * 3000


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], pieces=400)


@pytest.fixture(scope="module")
def maker(tokenizer) -> DocumentMaker:
    corpus = np.array(tokenizer(TEXT, add_special_tokens=False)["input_ids"], dtype=np.uint16)
    return DocumentMaker(tokenizer, corpus, seed=1)


@pytest.mark.parametrize("length", [16, 32, 64, 128, 256, 1024])
def test_every_supervised_name_can_be_found_in_the_document(maker: DocumentMaker, length: int) -> None:
    names = set(maker.names.tolist())
    asked = 0
    for _ in range(20):
        ids, answers, text = maker.document(length)
        assert len(ids) == len(answers) == len(text) == length
        for i, (label, read) in enumerate(zip(answers, text, strict=True)):
            assert read in (IGNORED, ids[i]) and label in (IGNORED, ids[i])
            if label in names:
                asked += 1
                before = ids[: i - 1]
                # A look-up: the name before the answer's place stood earlier, directly before the answer.
                assert any(a == ids[i - 1] and b == label for a, b in zip(before, ids[1:i], strict=False))
    assert asked >= 40


def test_positions_jump_forward_up_to_the_span(maker: DocumentMaker) -> None:
    batch = maker.batch(4, 128, span=1000)
    assert (np.diff(batch.positions, axis=1) >= 1).all()
    assert batch.positions.max() < 1000 and (batch.positions[:, -1] > 127).all()


def test_same_seed_same_documents(tokenizer, maker: DocumentMaker) -> None:
    a, b = (DocumentMaker(tokenizer, maker.corpus, seed=5).batch(2, 256) for _ in range(2))
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.answers, b.answers)


def test_names_are_distinct_single_tokens(tokenizer) -> None:
    names = code_names(1024)
    assert len(set(names)) == 1024 and {len(name) for name in names} == {6}
    ids = tokenizer([" " + name for name in code_names()], add_special_tokens=False)["input_ids"]
    assert all(len(i) == 1 for i in ids)
    with pytest.raises(ValueError, match="1024"):
        code_names(1025)
