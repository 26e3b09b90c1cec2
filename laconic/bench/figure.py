"""What a benchmark returns, and how it takes times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from laconic.evaluation.memory import PeakMemory

Say = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """The outcome of one benchmark.

    Attributes:
        ours, reference: the two measured costs, in ``unit``; smaller is better.
        target: the least ``ratio`` of the two that counts as reached. Where the demand is a limit on ``ours`` alone, it
            is ``reference / limit``, so that a ratio at the target and a cost at the limit are the same thing.
        unit: such as ``"ms"``.
        conditions: further demands by name, and whether each is met.
        detail: everything else worth knowing.
    """

    ours: float
    reference: float
    target: float
    unit: str
    conditions: dict[str, bool] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times better than the reference."""
        return self.reference / self.ours

    @property
    def met(self) -> bool:
        return self.ratio >= self.target and all(self.conditions.values())


def interleave(
    steps: Mapping[str, Callable[[int], object]],
    *,
    repeats: int,
    warmup: int = 1,
    inside: Mapping[str, AbstractContextManager[Any]] | None = None,
    say: Say | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every step in every repetition: ``{name: [s, ...]}``, warm-up left out.

    The steps take turns within each repetition, so that whatever else the machine does reaches all of them alike.

    Args:
        steps: called with the number of the repetition, from 0, warm-up included. What a step returns is freed outside
            the time taken.
        inside: by name, what a step runs inside of; entering and leaving it takes no part in the time.
        say: takes a line after every repetition.
        clock: ``time.process_time`` takes the processor's time in place of the wall's, where other programs run.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + repeats):
        for name, step in steps.items():
            with (inside or {}).get(name, nullcontext()):
                start = clock()
                result = step(i)
                elapsed = clock() - start
            del result
            if i >= warmup:
                times[name].append(elapsed)
        if say is not None and i >= warmup:
            say(", ".join(f"{name} {1e3 * times[name][-1]:.1f} ms" for name in steps))
    return times


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of every step, in ms."""
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def peak(step: Callable[[int], Any]) -> tuple[Any, int, str]:
    """Result, peak bytes above what was in use, and how they were taken; ``step`` has run before, so no compiler counts."""
    with PeakMemory() as memory:
        result = step(0)
    return result, memory.bytes, memory.source
