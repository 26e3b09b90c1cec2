"""Outcome and timing of benchmarks."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest

from laconic.bench.figure import Figure, interleave, milliseconds


@pytest.mark.parametrize(
    ("ours", "conditions", "met"),
    [(10.0, {}, True), (12.5, {}, True), (12.6, {}, False), (1.0, {"memory": False, "output": True}, False)],
)
def test_a_figure_is_met_by_its_ratio_and_all_its_conditions(ours: float, conditions: dict, met: bool) -> None:
    figure = Figure(ours=ours, reference=100.0, target=8.0, unit="ms", conditions=conditions)
    assert figure.ratio == pytest.approx(100.0 / ours)
    assert figure.met is met


def test_steps_take_turns_and_warmup_is_left_out() -> None:
    calls: list[tuple[str, int]] = []
    lines: list[str] = []
    steps = {name: lambda i, name=name: calls.append((name, i)) for name in ("stock", "ours")}
    times = interleave(steps, repeats=2, warmup=1, say=lines.append)
    assert calls == [(name, i) for i in range(3) for name in ("stock", "ours")]
    assert {name: len(values) for name, values in times.items()} == {"stock": 2, "ours": 2}
    assert len(lines) == 2 and "stock" in lines[0] and "ours" in lines[0]


def test_what_a_step_runs_inside_of_is_not_timed() -> None:
    entered: list[str] = []

    @contextmanager
    def slow():
        entered.append("in")
        time.sleep(0.05)
        yield
        time.sleep(0.05)
        entered.append("out")

    class Reusable:
        def __enter__(self) -> None:
            self.block = slow()
            self.block.__enter__()

        def __exit__(self, *error: object) -> None:
            self.block.__exit__(*error)

    times = interleave(
        {"a": lambda i: time.sleep(0.01), "b": lambda i: None}, repeats=2, warmup=0, inside={"a": Reusable()}
    )
    assert entered == ["in", "out"] * 2
    assert all(0.01 <= value < 0.05 for value in times["a"])


def test_times_are_read_from_the_clock_that_is_given() -> None:
    now = [0.0]
    steps = {"a": lambda i: now.append(now[-1] + 2 + i), "b": lambda i: now.append(now[-1] + 5)}
    assert interleave(steps, repeats=2, warmup=0, clock=lambda: now[-1]) == {"a": [2.0, 3.0], "b": [5.0, 5.0]}


def test_milliseconds_are_medians() -> None:
    assert milliseconds({"a": [0.003, 0.001, 0.1]}) == {"a": pytest.approx(3.0)}
