"""Gaps that later tokens have closed: what a request remembers where positions are compact."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GAPS = "vision.gaps"  # where a request remembers them


@dataclass(frozen=True)
class Gaps:
    """Positions at which tokens were dropped, int64 ``(batch, d)``, -1 for none. A token stands in front of its own position by
    as many as there are before it."""

    positions: torch.Tensor

    def before(self, positions: torch.Tensor) -> Gaps:
        """Those in front of the tokens at ``positions`` (batch, new), -1 for padding: of a cropped text only what is left."""
        last = torch.iinfo(positions.dtype).max
        first = positions.masked_fill(positions < 0, last).amin(-1, keepdim=True).to(self.positions.device)
        return Gaps(self.positions.masked_fill(self.positions >= first, -1))

    @property
    def sizes(self) -> torch.Tensor:
        """How many there are, int64 ``(batch,)``."""
        return (self.positions >= 0).sum(-1)

    def and_then(self, positions: torch.Tensor) -> Gaps:
        """With those of one more forward."""
        return Gaps(torch.cat([self.positions, positions.to(self.positions.device)], dim=-1))

    def rows(self, index: torch.Tensor) -> Gaps:
        """As a reordered batch has them."""
        return Gaps(self.positions.index_select(0, index.to(self.positions.device)))

    def cropped(self, left: int) -> Gaps:
        """When only the first ``left`` tokens are left: all, until ``before`` is told where the text goes on."""
        return self
