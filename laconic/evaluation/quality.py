"""How much of the dense quality a recipe keeps, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000


def share_kept(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Share of the dense quality that a row of results keeps: the figure that ``best``, the page and ``tune`` go by.

    Quality is the task's (for perplexity, lower is better), or the fidelity where the task has no answers. Where the dense
    model gets nothing right there is nothing to keep: 1. What was not measured keeps 0.
    """
    name = "fidelity" if dense.get("quality") is None else "quality"
    mine, reference = row.get(name), dense.get(name, 1.0)
    if mine is None:
        return 0.0
    if name == "fidelity":
        return mine
    if dense.get("quality_name") == "perplexity":
        return reference / mine
    return mine / reference if reference else 1.0


@dataclass(frozen=True)
class Pairs:
    """A recipe and the dense model, prompt by prompt.

    ``mine``, ``dense``: what each prompt scored (0..1), or its negative log-likelihood where ``scored`` counts the tokens of
    each. ``dense`` may go on where ``mine`` stops: the prompts that were not run.
    """

    mine: np.ndarray
    dense: np.ndarray
    scored: np.ndarray | None = None

    @classmethod
    def of(cls, mine: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]]) -> Pairs:
        """From the cells of two rows; with answers those are compared, else fidelity, or perplexity where it was scored."""
        if "nll" in dense[0]:
            columns = [[cell["nll"] for cell in mine], [cell["nll"] for cell in dense], [cell["scored"] for cell in dense]]
            return cls(*map(np.array, columns))
        answered = [i for i, cell in enumerate(dense) if cell["correct"] is not None]
        if not answered:
            return cls(np.array([cell["fidelity"] for cell in mine]), np.ones(len(dense)))
        run = [mine[i]["correct"] for i in answered if i < len(mine)]
        return cls(np.array(run, dtype=float), np.array([dense[i]["correct"] for i in answered], dtype=float))

    @property
    def share(self) -> float:
        """Share of the dense quality that is kept on the prompts that were run."""
        return float(self._share(self.mine, *self._run()))

    @property
    def at_best(self) -> float:
        """Share kept on all prompts if the recipe does on those not run yet what the dense model does on them."""
        rest = self.dense[len(self.mine) :]
        return float(self._share(np.concatenate([self.mine, rest]), self.dense, self.scored))

    @property
    def guess(self) -> float:
        """Share to be expected on all prompts, from the few that were run before it was clear that it is too low."""
        if self.scored is not None:
            return min(self.share, self.at_best) if len(self.mine) else self.at_best
        few = (self.mine.sum() + 1) / (self.dense[: len(self.mine)].sum() + 1)
        return min(float(few), self.at_best)

    def interval(self, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
        """Confidence interval of the share kept, over prompts: the wider end of a paired bootstrap and of Wilson's interval.

        The bootstrap knows that both answered the same prompts, but where all prompts agree it sees no spread at all. Wilson's
        interval does not fall into that trap; scores between 0 and 1 vary at most as much as the coin that it is made for.
        """
        if len(self.mine) < 2:
            return (0.0, 1.0) if self.scored is not None else self._wilson(level)
        low, high = self._bootstrap(level, seed)
        if self.scored is None:
            wilson = self._wilson(level)
            low, high = min(low, wilson[0]), max(high, wilson[1])
        return low, high

    def _run(self) -> tuple[np.ndarray, np.ndarray | None]:
        count = len(self.mine)
        return self.dense[:count], None if self.scored is None else self.scored[:count]

    def _share(
        self, mine: np.ndarray, dense: np.ndarray, scored: np.ndarray | None = None, axis: int = -1
    ) -> np.ndarray:
        """Over the last axis. A sample in which dense has nothing right says nothing: it keeps all."""
        total, reference = mine.sum(axis), dense.sum(axis)
        if scored is not None:
            return np.exp((reference - total) / scored.sum(axis))  # the quotient of the perplexities
        return np.where(reference > 0, total / np.where(reference > 0, reference, 1), 1.0)

    def _bootstrap(self, level: float, seed: int) -> tuple[float, float]:
        """Percentiles, taken so far out (Hesterberg, 2015) that few prompts give an interval as wide as Student's."""
        from scipy.stats import bootstrap, norm, t

        count = len(self.mine)
        far = t.ppf((1 + level) / 2, count - 1) * math.sqrt(count / (count - 1))
        level = min(1 - 1e-9, 1 - 2 * float(norm.sf(far)))
        dense, scored = self._run()
        columns = [self.mine, dense] if scored is None else [self.mine, dense, scored]
        found = bootstrap(
            columns, self._share, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=level,
            method="percentile", rng=np.random.default_rng(seed),
        )  # fmt: skip
        return float(found.confidence_interval.low), float(found.confidence_interval.high)

    def _wilson(self, level: float) -> tuple[float, float]:
        """Wilson's interval of the share, over the prompts that the dense model gets right."""
        from scipy.stats import norm

        count, z = float(self._run()[0].sum()), float(norm.ppf((1 + level) / 2))
        if not count:
            return 0.0, 1.0
        share = min(1.0, self.share)
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
        return max(0.0, middle - half), min(1.0, middle + half)


def prompts_needed(keep: float, level: float = LEVEL) -> int | None:
    """Prompts, all of them kept, from which on Wilson's interval lies above ``keep``; None when no number shows it."""
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    return math.ceil(z * z * keep / (1 - keep)) if keep < 1 else None
