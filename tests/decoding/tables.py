"""Drafters over a table in place of a draft model: the law of the next token depends on the newest one only."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from laconic.decoding.base import DraftMethod
from laconic.decoding.draft_model import ModelDrafter
from laconic.decoding.sampling import Sampling
from laconic.decoding.tree import DraftTree


def draft(
    kind: type[ModelDrafter], method: DraftMethod, q: torch.Tensor, *, rows: int = 1, room: int = 99, temperature: float = 1.0,
    seed: int = 0,
) -> DraftTree:  # fmt: skip
    """The trees that ``kind`` makes for rows of texts whose newest token is 0.

    Args:
        q: (vocabulary, vocabulary): the law after each token.
    """

    class Table(kind):
        def __init__(self) -> None:
            self.method = method
            self.setting = SimpleNamespace(
                sampling=Sampling(temperature=temperature), generator=torch.Generator().manual_seed(seed), vocabulary=len(q)
            )
            self.network = SimpleNamespace(device=torch.device("cpu"))
            self.text = SimpleNamespace(rows=[[0]] * rows, done=[False] * rows)
            self._tokens, self._parents = torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), -1)

        def grow(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
            assert bool((parents < self._tokens.shape[1]).all())
            self._tokens, self._parents = torch.cat([self._tokens, tokens], 1), torch.cat([self._parents, parents], 1)
            return q.log()[tokens]

    return Table().draft(q.log()[torch.zeros(rows, 1, dtype=torch.int64)], room)
