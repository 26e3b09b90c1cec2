"""What a picture's tokens are worth, by name: methods that take any score choose from these."""

from __future__ import annotations

from collections.abc import Callable

import torch

from laconic.vision.encoder import Want
from laconic.vision.picture import Picture


def novelty(picture: Picture) -> torch.Tensor:
    """Minus the cosine with the mean of all tokens (GlobalCom2, 2025)."""
    unit = torch.nn.functional.normalize(picture.features.float(), dim=-1)
    mean = torch.nn.functional.normalize(picture.features.float()[picture.cells].mean(0), dim=-1)
    return -(unit @ mean)


def norm(picture: Picture) -> torch.Tensor:
    """The length of the projected features."""
    return picture.features.float().norm(dim=-1)


def text(picture: Picture) -> torch.Tensor:
    """The largest cosine with a word of the prompt (the table of embeddings, not the context)."""
    unit = torch.nn.functional.normalize(picture.features.float(), dim=-1)
    words = torch.nn.functional.normalize(picture.text.float(), dim=-1)
    return (unit @ words.t()).amax(-1)


def even(picture: Picture) -> torch.Tensor:
    """1 for every token: the selection alone decides."""
    return torch.ones(len(picture.layout), device=picture.features.device)


SCORES: dict[str, Callable[[Picture], torch.Tensor]] = {
    "salience": lambda picture: picture.salience(-2),
    "received": lambda picture: picture.received(-2),
    "novelty": novelty,
    "norm": norm,
    "text": text,
    "none": even,
}


def wants_of(name: str) -> set[Want]:
    """What the encoder's attention is asked for so that a score can be given."""
    return {"salience": {Want("salience", -2)}, "received": {Want("received", -2)}}.get(name, set())
