"""The measured limit must come from real reads."""

from __future__ import annotations

import torch

from laconic.bench.bandwidth import PIECES, ReadStep


def test_a_step_reads_every_word() -> None:
    words = torch.ones(4 * PIECES, 16)
    step = ReadStep(words, torch.zeros(PIECES))
    assert step.bytes == words.nbytes + 4 * PIECES
    assert step() == words.numel()
    words[PIECES, 3] = 5
    assert step() == words.numel() + 4


def test_what_lies_between_the_rows_of_a_view_is_read_and_counted() -> None:
    buffer = torch.ones(2, 3 * PIECES)
    step = ReadStep(buffer[:, : 2 * PIECES])
    assert step.bytes == 5 * PIECES * 4
    assert step() == 5 * PIECES
