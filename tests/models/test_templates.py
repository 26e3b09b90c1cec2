"""The questions of the diffusion models: the answers are right, a tenth is never learned, and rows are what training expects."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from laconic.errors import LaconicError
from laconic.models.templates import KINDS, LETTERS, WORDS, Documents, is_held_out, questions
from laconic.models.text_data import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS) + " 1 2 3 4 5 = ; ,\n"] * 5)


def solve(kind: str, asked: str) -> str:
    """The answer, worked out from the text of the question alone."""
    before, _, after = (part.strip() for part in asked.partition(";"))
    words = before.split()
    match kind:
        case "copy":
            return asked
        case "reverse":
            return " ".join(words[::-1])
        case "sort":
            return " ".join(sorted(words))
        case "sum":
            return str(int(words[0]) + int(words[2]))
        case "lookup":
            return dict(pair.split(" is ") for pair in before.split(", "))[after]
        case "spell":
            return " , ".join(" ".join(word) for word in words)
        case "count":
            return " ".join(map(str, range(int(words[0]), int(words[2]) + 1)))
        case "many":
            return str(words.count(after))
        case "repeat":
            return " ".join([before] * int(after.split()[0]))
    raise AssertionError(kind)


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_right(held_out):
    found = list(islice(questions(1, held_out=held_out), 40 * len(KINDS)))
    assert [q.kind for q in found[: len(KINDS)]] == list(KINDS)
    for q in found:
        assert q.prompt.startswith(f"{q.kind}: ") and q.prompt.endswith(" =")
        assert q.answer == " " + solve(q.kind, q.prompt.removeprefix(f"{q.kind}: ").removesuffix(" =")), q.prompt
        assert is_held_out(q.prompt) is held_out


def test_a_seed_gives_the_same_questions_and_another_one_others():
    first, again, other = (list(islice(questions(seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_held_out_ones_are_a_tenth():
    asked = [f"sum: {a} + {b} =" for a in range(50) for b in range(50)]
    assert 0.08 < np.mean([is_held_out(prompt) for prompt in asked]) < 0.12


def test_words_are_distinct_and_letters_are_single():
    assert len(set(WORDS)) == len(WORDS) > 100 and len(LETTERS) == 26


def test_rows_of_documents(tokenizer):
    ids, answers, begins = Documents(tokenizer, 5).take(40, 96)
    assert ids.shape == answers.shape == (40, 96) and answers.dtype == bool
    again, *_ = Documents(tokenizer, 5).take(40, 96)
    np.testing.assert_array_equal(ids, again)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    alone = 0
    for row, free, begin in zip(ids, answers, begins, strict=True):
        assert row[0] == bos and not free[0] and set(row[free]).isdisjoint({bos})
        starts = [int(i) for i in np.flatnonzero(row == bos)]
        alone += len(starts) == 1
        for start, stop in zip(starts, [*starts[1:], 96], strict=True):
            assert set(begin[start:stop]) == {start}
            length = int((~free[start:stop]).sum())
            assert not free[start : start + length].any() and free[start + length : stop].all(), "a question, then an answer"
            text = [int(i) for i in row[start + length : stop]]
            size = text.index(end)
            assert set(text[size:]) == {end}, "nothing but padding behind the answer"
            kind, asked = tokenizer.decode(row[start + 1 : start + length]).split(": ", 1)
            assert tokenizer.decode(text[:size]) == " " + solve(kind, asked.removesuffix(" ="))
    assert alone >= 5, "some rows are one answer and its padding"


def test_rows_that_hold_no_question_are_refused(tokenizer):
    with pytest.raises(LaconicError, match="row of 4 tokens: make rows longer"):
        Documents(tokenizer, 0).take(1, 4)
