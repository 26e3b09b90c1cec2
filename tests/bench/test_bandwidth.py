"""The measured limit must come from real reads."""

from __future__ import annotations

from laconic.bench.bandwidth import PIECES, ReadStep, read_bandwidth


def test_a_step_reads_every_word() -> None:
    step = ReadStep(1 << 20)
    assert step.bytes == 1 << 20
    assert step() == step.bytes / 4  # every word is 1
    step._words[PIECES // 2, 3] = 5
    assert step() == step.bytes / 4 + 4


def test_bandwidth_is_that_of_memory() -> None:
    assert 1e8 < read_bandwidth(repeats=2, size=1 << 24) < 1e13
