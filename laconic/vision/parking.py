"""Picture tokens that wait: what a conversation needs so that its next turn can choose again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from laconic.models.pictures import Seen

PARKED = "vision.parked"  # where a request remembers it


@dataclass(frozen=True)
class Parked:
    """A conversation about pictures so far: enough to compute it anew from other tokens of theirs, without the encoder.

    Attributes:
        ids: int64 ``(batch, n)``: its tokens, those of the pictures among them.
        positions: int64 ``(batch, n)``: their positions, -1 for padding.
        places: ``(batch, n, axes)``: what the rotary embedding is given.
        features: per picture ``(tokens, dim)``, as the language model would get them all.
        kept: per picture int64 ``(k,)``: the tokens that it was given.
        seen: what the encoder said of the pictures.
        deep: what deeper layers add to picture tokens, where the model has that.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    features: list[torch.Tensor]
    kept: list[torch.Tensor]
    seen: list[Seen]
    deep: list[torch.Tensor] | None

    def rows(self, index: torch.Tensor) -> Parked:
        """As a reordered batch has it: rows of a beam search show the same pictures."""
        ids, positions, places = (t.index_select(0, index.to(t.device)) for t in (self.ids, self.positions, self.places))
        return replace(self, ids=ids, positions=positions, places=places)

    def cropped(self, left: int) -> Parked | None:
        """When only the first ``left`` tokens of the conversation are left; None where a picture is not whole any more."""
        tokens = torch.tensor([seen.token for seen in self.seen], device=self.ids.device)
        if bool(torch.isin(self.ids[:, left:], tokens).any()):
            return None
        return replace(self, ids=self.ids[:, :left], positions=self.positions[:, :left], places=self.places[:, :left])

    def and_then(self, ids: torch.Tensor, positions: torch.Tensor, places: torch.Tensor) -> Parked:
        """With the tokens of one more forward; words may come with one position for all axes."""
        places = places.expand(-1, -1, self.places.shape[-1])
        grown = (torch.cat(pair, dim=1) for pair in ((self.ids, ids), (self.positions, positions), (self.places, places)))
        return replace(self, **dict(zip(("ids", "positions", "places"), grown, strict=True)))


def by_row(places: torch.Tensor) -> torch.Tensor:
    """Positions for the rotary embedding, ``(batch, n)`` or ``(axes, batch, n)``, as ``(batch, n, axes)``."""
    return places[..., None] if places.dim() == 2 else places.movedim(0, -1)


def by_axis(places: torch.Tensor) -> torch.Tensor:
    """What ``by_row`` was given."""
    return places[..., 0] if places.shape[-1] == 1 else places.movedim(-1, 0)
