"""What the held-out prompts say of a tuned recipe, in figures and in one sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from laconic.evaluation.quality import LEVEL, Pairs, prompts_needed

OUTCOMES = {
    "dense": "nothing cheaper than dense is good enough",
    "shown": "the whole interval lies above the asked share",
    "holds": "the share is as high as asked, the interval is too wide to rule out less",
    "fails": "the share is lower than asked",
}


@dataclass(frozen=True)
class Verdict:
    """``outcome``: a key of ``OUTCOMES``. ``kept``, ``low``, ``high``: share of the dense quality kept on the held-out
    prompts, and its confidence interval over them."""

    outcome: str
    sentence: str
    keep: float
    kept: float
    low: float
    high: float
    level: float
    prompts: int

    @property
    def holds(self) -> bool:
        return self.outcome != "fails"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def check(row: dict[str, Any], dense: dict[str, Any], *, keep: float, looks: int, seed: int) -> Verdict:
    """The verdict on a row of the held-out half. ``looks``: recipes that were measured on this half so far."""
    pairs = Pairs.of(row["cells"], dense["cells"])
    prompts, what = len(pairs.mine), "fidelity" if dense["quality"] is None else "quality"
    if row["recipe"] == "dense":
        sentence = f"No recipe that was tried keeps {percent(keep)} of the dense {what} at a lower cost: dense stays."
        return Verdict("dense", sentence, keep, 1.0, 1.0, 1.0, LEVEL, prompts)
    kept, (low, high) = pairs.share, pairs.interval(seed=seed)
    outcome = "fails" if kept < keep - 1e-9 else "shown" if low >= keep else "holds"
    found = (
        f"on {prompts} prompts that the search has not seen, it keeps {percent(kept)} of the dense {what} "
        f"({percent(LEVEL)} interval {percent(low)} to {percent(high)})"
    )
    if outcome == "fails":
        sentence = f"Does not hold: {found}, less than the {percent(keep)} asked for. Give more --samples, or a lower --keep."
    elif outcome == "shown":
        sentence = f"Holds: {found}."
    else:
        sentence = f"Holds as far as can be told: {found}. {_missing(pairs, keep)}"
    if looks > 1:
        sentence += f" It is recipe number {looks} measured on these prompts, so the interval is a little too kind."
    return Verdict(outcome, sentence, keep, kept, low, high, LEVEL, prompts)


def _missing(pairs: Pairs, keep: float) -> str:
    """How many prompts would do, where that is known."""
    needed = None if pairs.scored is not None else prompts_needed(keep)
    if needed is None:
        return f"These prompts are too few to rule out less than {percent(keep)}."
    return f"To rule out less than {percent(keep)} takes some {needed} held-out prompts without a loss, --samples {2 * needed}."


def percent(share: float) -> str:
    """99.5%, 100%, with no more digits than needed; never 100% for less."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        text = "99.9"
    return text.removesuffix(".0") + "%"
