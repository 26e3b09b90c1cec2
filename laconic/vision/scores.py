"""What a picture's tokens are worth, by name: methods that take any score choose from these."""

from __future__ import annotations

from collections.abc import Callable

import torch

from laconic.vision.encoder import Want
from laconic.vision.picture import Picture


def scaled(values: torch.Tensor) -> torch.Tensor:
    """Values scaled to 0..1; 0 everywhere where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


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


SCORES: dict[str, Callable[[Picture], torch.Tensor]] = {
    "salience": lambda picture: picture.salience(-2),
    "received": lambda picture: picture.received(-2),
    "novelty": novelty,
    "norm": norm,
    "text": text,
}


def wants_of(name: str) -> set[Want]:
    """What the encoder's attention is asked for so that a score can be given."""
    return {"salience": {Want("salience", -2)}, "received": {Want("received", -2)}}.get(name, set())
