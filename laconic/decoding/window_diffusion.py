"""Window-Diffusion: computes the first few masks, attends to a wider window, and leaves the far ones out until they are near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.decoding.canvas import Index, Prediction, Run
from laconic.decoding.diffusion import DiffusionMethod
from laconic.decoding.positions import select
from laconic.method import parameter
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class WindowDiffusion(DiffusionMethod):
    """Every ``refresh`` steps keys and values are computed anew; in between only the ``active`` first masks and what they became.

    A phase begins with a refresh: all decoded positions and the next masks are computed and stored, the most confident ones are
    committed, and the window, decoded positions and the next ``window`` masks, is fixed. Its other steps compute the first
    ``active`` masks and the tokens that were decoded in the phase, attend to the window, and commit the most confident of those
    masks. Masks behind the window do not exist for a phase. Rows per step: active + decoded in the phase.
    """

    id: ClassVar[str] = "window_diffusion"
    paper: ClassVar[str] = (
        "Window-Diffusion: Accelerating Diffusion Language Model Inference with Windowed Token Pruning and Caching (2026)"
    )
    batches: ClassVar[bool] = False

    window: int = parameter(64, "masks that are attended to", least=1)
    active: int = parameter(16, "masks that are computed at a step", least=1, search=(8, 32))
    refresh: int = parameter(32, "steps of a phase; 1 refreshes always", least=1, search=(8, 16))
    per_step: int = parameter(1, "positions that each step commits", least=1)
    score: str = parameter("probability", "what is most confident: probability, or entropy", search=("entropy",))
    scope: str = parameter("window", "what a refresh computes and may commit: window, or the whole canvas", search=("canvas",))
    linger: bool = parameter(True, "tokens that a refresh commits are computed in all steps of the phase, not in one only")
    early_stop: bool = parameter(True, "the canvas is cut behind an end token", search=())

    def check(self) -> None:
        self.require(self.score in ("probability", "entropy"), f"there is no score '{self.score}': use probability or entropy.")
        self.require(self.scope in ("window", "canvas"), f"there is no scope '{self.scope}': use window or canvas.")
        self.require(
            self.per_step <= self.active, f"per_step={self.per_step} exceeds active={self.active}: commit what is computed."
        )
        least = self.active + self.per_step * max(0, self.refresh - 2)
        self.require(
            self.window >= least or self.refresh == 1,
            f"with active={self.active}, refresh={self.refresh} and per_step={self.per_step} masks leave a window of "
            f"{self.window} while they are computed: give window={least} or more.",
        )

    def decode(self, run: Run) -> None:
        while bool(run.open.any()):
            self._phase(run)

    def _phase(self, run: Run) -> None:
        """A refresh and the steps up to the next one."""
        masked = run.open[0].clone()
        self._refresh(run)
        left, window = run.open[0].clone(), _view(self._first(run, self.window))
        for step in range(self.refresh - 1):
            masks = run.open[0].nonzero()[: self.active, 0]
            if not len(masks):
                return
            since = masked if self.linger or step == 0 else left
            settled = (since[: run.length] & ~run.open[0]).nonzero()[:, 0]
            active = torch.cat([settled, masks]).sort().values
            self._commit(run, run.predict(active, _within(window, run.length), masks))

    def _refresh(self, run: Run) -> None:
        """Computes and stores what the phase may attend to, and what the refresh's own commits make room for."""
        wanted = run.length if self.scope == "canvas" else self.window + self.per_step
        stored = self._first(run, wanted)
        self._commit(run, run.predict(stored, _view(stored), stored[run.open[0, stored]]))

    def _first(self, run: Run, count: int) -> torch.Tensor:
        """The decoded positions and the first ``count`` masks, ascending."""
        rank = run.open[0].cumsum(0)
        return (~run.open[0] | (rank <= count)).nonzero()[:, 0]

    def _commit(self, run: Run, seen: Prediction) -> None:
        score = seen.probability if self.score == "probability" else seen.certainty
        run.commit(seen, select(score, seen.open, least=self.per_step))
        ends = run.ended()[0].nonzero()[:, 0] if self.early_stop else ()
        if len(ends):
            run.cut(run.start + int(ends[0]) + 1)


def _view(positions: torch.Tensor) -> Index:
    """A slice where the positions have no gap, so that keys are read in place."""
    return slice(0, len(positions)) if int(positions[-1]) + 1 == len(positions) else positions


def _within(window: Index, length: int) -> Index:
    """What a cut of the canvas has left of the window."""
    if isinstance(window, slice):
        return slice(0, min(window.stop, length))
    return window[window < length]
