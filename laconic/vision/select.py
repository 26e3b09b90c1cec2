"""Which tokens of one picture stay. All give int64 tokens in ascending order, ties to the lower."""

from __future__ import annotations

from collections.abc import Callable

import torch

from laconic.primitives.greedy import CoverageRule, DeterminantRule, MaxRule, Rule, SumRule, greedy, most_isolated
from laconic.vision.picture import Picture

ALIKE = 1e-4  # values that differ by less than this share of their mean are all the same


def top(scores: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """The ``k`` best of the tokens ``among`` (c,) by ``scores`` (n,)."""
    order = scores.float()[among].argsort(descending=True, stable=True)
    return among[order[:k]].sort().values


def candidates(picture: Picture) -> torch.Tensor:
    """The tokens that compete, boolean ``(n,)``: all but separators."""
    return ~picture.layout.separators.to(picture.features.device)


def spread(among: torch.Tensor, k: int) -> torch.Tensor:
    """``k`` of the tokens ``among`` (c,) at even distances: number floor((i + 0.5) c / k) for i from 0 to k - 1."""
    at = torch.arange(k, device=among.device, dtype=torch.float64)
    return among[((at + 0.5) * len(among) / k).long()]


def scaled(values: torch.Tensor) -> torch.Tensor:
    """Values scaled to 0..1; 0 everywhere where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def at_random(picture: Picture, k: int, among: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """``k`` of the tokens ``among``, each set as likely as any other, with numbers of its own for every picture of a prompt."""
    return top(drawn(seed, picture.number, len(picture.layout)).to(among.device), k, among)


def drawn(seed: int, number: int, n: int) -> torch.Tensor:
    """A random number for each of ``n`` tokens of one picture, float ``(n,)``: of the seed and the picture's number."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


def pick(
    rows: torch.Tensor, k: int, rule: Rule, among: torch.Tensor, first: int | torch.Tensor | None = None
) -> torch.Tensor:
    """``k`` of the tokens ``among`` (c,), one by one by the rule on what it reads of each (n, d), beginning with ``first``."""
    seed = None if first is None else torch.as_tensor(first, device=rows.device).view(1)
    valid = torch.zeros(1, len(rows), dtype=torch.bool, device=rows.device)
    valid[0, among] = True
    return greedy(rows[None], torch.tensor([k], device=rows.device), rule, seed=seed, valid=valid)[0]


def farthest(picture: Picture, worth: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """Farthest from each other, the most isolated first (DivPrune, 2025). Worth has no say."""
    valid = torch.zeros(1, len(worth), dtype=torch.bool, device=worth.device)
    valid[0, among] = True
    return pick(picture.features, k, MaxRule(), among, most_isolated(picture.features[None], valid))


def relevant(picture: Picture, worth: torch.Tensor, k: int, among: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """Worth less likeness to what is kept: maximal marginal relevance (Carbonell and Goldstein, 1998; IDPruner, 2026)."""
    weight = spread_out(worth, among)
    rule = MaxRule(weight=1 - share, offset=share * weight[None])
    return pick(picture.features, k, rule, among, best(weight, among))


def different(picture: Picture, worth: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """Worth times the distance to what is kept (ZOO-Prune, 2025)."""
    return pick(picture.features, k, MaxRule(weight=spread_out(worth, among)[None]), among)


def unlike(picture: Picture, worth: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """Least like all that is kept together, the best first (ToDRE, 2025)."""
    return pick(picture.features, k, SumRule(), among, best(worth, among))


def covering(picture: Picture, worth: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """Worth times what is newly covered, by cosine, of the picture's tokens (SCOPE, 2025)."""
    unit = torch.nn.functional.normalize(picture.features.float(), dim=-1)
    return pick(unit @ unit[among].t(), k, CoverageRule(weight=spread_out(worth, among)[None]), among)


def determinant(picture: Picture, worth: torch.Tensor, k: int, among: torch.Tensor) -> torch.Tensor:
    """The most probable set of a determinantal point process with this worth (CDPruner, 2025)."""
    return pick(picture.features, k, DeterminantRule(weight=spread_out(worth, among)[None]), among)


def best(worth: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The best of the tokens ``among``."""
    return among[worth[among].argmax()]


def spread_out(worth: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Worth scaled to 0..1 over the tokens ``among``, 0 elsewhere; 1 where all are alike but for rounding."""
    values = worth[among].float()
    alike = float(values.max() - values.min()) <= ALIKE * float(values.abs().mean())
    return torch.zeros_like(worth, dtype=torch.float32).index_put((among,), torch.ones_like(values) if alike else scaled(values))


SELECTIONS: dict[str, Callable[[Picture, torch.Tensor, int, torch.Tensor], torch.Tensor]] = {
    "best": lambda picture, worth, k, among: top(worth, k, among),
    "even": lambda picture, worth, k, among: spread(among, k),
    "random": lambda picture, worth, k, among: at_random(picture, k, among),
    "farthest": farthest,
    "unlike": unlike,
    "relevant": relevant,
    "different": different,
    "covering": covering,
    "determinant": determinant,
}
