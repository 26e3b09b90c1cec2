"""What a method is expected to show at small scale, and what came out when that was measured."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

BETTER_HIGH = ("quality", "fidelity")  # of the other figures, less is better


@dataclass(frozen=True)
class Claim:
    """The method is better than a rival in one figure, on one task, at one budget.

    Attributes:
        rival: a method id, which gets the same budget, or a recipe with its own, or ``dense``.
        figure: a column of a comparison: quality, fidelity, kl, bytes_read, bytes_kept, dropped_mass, pairs, ...
        by: how much better at least: a difference for quality and fidelity, a factor for the others.
        budget, task, lengths, samples, question: as in ``laconic.compare``.
    """

    rival: str
    figure: str = "quality"
    by: float = 0.0
    budget: str = "10%"
    task: str = "needle"
    lengths: tuple[int, ...] = (4096,)
    samples: int = 20
    question: str = "seen"

    @property
    def setting(self) -> tuple[Any, ...]:
        """What claims must share to be measured in one comparison."""
        return (self.task, self.lengths, self.samples, self.question)

    def __str__(self) -> str:
        name, high = self.figure.replace("_", " "), self.figure in BETTER_HIGH
        much = "" if self.by in (0, 1) else f" + {self.by:g}" if high else f" / {self.by:g}"
        late = ", chosen before the question" if self.question == "after" else ""
        where = f" of {', '.join(f'{n:,}' for n in self.lengths)} tokens" if self.lengths else ""
        return f"{name} at {'least' if high else 'most'} {self.rival}'s{much}, at {self.budget} on {self.task}{where}{late}"

    def holds(self, value: float | None, rival: float | None) -> bool:
        """Whether the measured figures bear the claim out."""
        if value is None or rival is None:
            return False
        if self.figure in BETTER_HIGH:
            return value >= rival + self.by - 1e-9
        return value <= rival / (self.by or 1.0) + 1e-12


@functools.cache
def outcomes() -> dict[str, list[dict[str, Any]]]:
    """The recorded outcomes per method id, as ``laconic compare --suite cards`` wrote them."""
    found: dict[str, list[dict[str, Any]]] = {}
    file = resources.files("laconic.evaluation") / "outcomes.jsonl"
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["method"], []).append(row)
    return found


def outcome_sentence(row: dict[str, Any]) -> str:
    """``holds: quality not below random's ... (0.95 against 0.10)``."""
    values = " against ".join("–" if v is None else f"{v:.3g}" for v in (row["value"], row["rival_value"]))
    return f"{'holds' if row['holds'] else 'does not hold'}: {row['claim']} ({values})"
