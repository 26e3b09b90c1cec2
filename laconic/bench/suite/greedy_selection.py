"""Choosing 10 % of the tokens of an image greedily, against the formulas written down in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from laconic.bench.figure import Figure, Say, interleave, milliseconds
from laconic.evaluation.memory import PeakMemory
from laconic.primitives.greedy import (
    CoverageRule,
    DeterminantRule,
    DistanceRule,
    MaxRule,
    SumRule,
    greedy_order,
    most_isolated,
)

GOAL = ">= 10x faster than DivPrune as its authors wrote it, with the same tokens picked by every rule"
RATIO, SHARE, WORDS = 10.0, 0.1, 16
NEVER = float("-inf")


@dataclass(frozen=True)
class Case:
    """Tokens to pick from. Random directions, in which nothing stands out, are the hard case for skipping comparisons.

    Attributes:
        features: ``(n, d)``; importance: ``(n,)`` in 0..1; covers: ``(words + n, n)``, rows to be covered, as in MMTok.
        count: how many tokens to pick; pivot: the first one where a method is given one.
    """

    features: torch.Tensor
    importance: torch.Tensor
    covers: torch.Tensor
    count: int
    pivot: int = 7

    @classmethod
    def made_up(cls, tokens: int, width: int, clusters: int = 0) -> Case:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(tokens, width, generator=generator)
        if clusters:  # neighbours are alike, and all share a direction
            centre = torch.randint(0, clusters, (tokens,), generator=generator).sort().values
            features = 0.7 * features + (torch.randn(clusters, width, generator=generator) + 2 * features[0])[centre]
        return cls.of(features, torch.rand(tokens, generator=generator), generator)

    @classmethod
    def of(cls, features: torch.Tensor, importance: torch.Tensor, generator: torch.Generator) -> Case:
        """A tenth of these tokens is to be picked; the words that they are to cover are made up."""
        tokens, width = features.shape
        units = torch.nn.functional.normalize(features, dim=-1)
        words = torch.nn.functional.normalize(torch.randn(WORDS, width, generator=generator), dim=-1)
        text, image = (words @ units.T / 0.02).softmax(-1) / WORDS, (units @ units.T / 0.2).softmax(-1) / tokens
        return cls(features, importance, torch.cat([text, 0.5 * image]), round(SHARE * tokens))


def run(quick: bool, say: Say) -> Figure:
    """Median of interleaved choices of 10 % of 2,880 tokens of width 1,024 (five crops of 576), one row."""
    tokens, width = (120, 32) if quick else (2880, 1024)
    repeats = 2 if quick else 3
    case, alike = Case.made_up(tokens, width), Case.made_up(tokens, width, clusters=max(2, tokens // 14))
    steps: dict[str, Callable[[int], object]] = {}
    picks: dict[str, tuple[list[int], list[int]]] = {}
    for name, (ours, formulas) in RULES.items():
        picks[name] = ours(case), formulas(case)
        steps |= {name: lambda _, f=ours: f(case), f"{name} formulas": lambda _, f=formulas: f(case)}
    steps["divprune running minimum"] = lambda _: farthest_first(case, DISTANCES["cosine"](case), None)
    steps["divprune first pick"] = lambda _: most_isolated(case.features[None])
    steps["divprune of clusters"] = lambda _: RULES["divprune"][0](alike)
    steps["cosine matrix"] = lambda _: cosines(case)
    ms = milliseconds(interleave(steps, repeats=repeats, say=say))
    with PeakMemory() as memory:
        RULES["divprune"][0](case)
    return Figure(
        ours=ms["divprune"],
        reference=ms["divprune formulas"],
        target=RATIO,
        unit="ms",
        conditions={f"same_picks_{name}": found == expected for name, (found, expected) in picks.items()},
        detail={
            "tokens": tokens, "width": width, "picked": case.count, "dtype": "float32", "repeats": repeats, "ms": ms,
            "ratios": {name: ms[f"{name} formulas"] / ms[name] for name in RULES},
            "ratio_of_clusters": ms["divprune formulas"] / ms["divprune of clusters"],
            "ratio_to_running_minimum": ms["divprune running minimum"] / ms["divprune"],
            "time_over_that_of_the_cosine_matrix": {name: ms[name] / ms["cosine matrix"] for name in RULES},
            "peak_bytes": memory.bytes, "cosine_matrix_bytes": 4 * tokens**2,
        },
    )  # fmt: skip


def cosines(case: Case) -> torch.Tensor:
    units = case.features / case.features.norm(dim=1, keepdim=True)
    return units @ units.T


DISTANCES: dict[str, Callable[[Case], torch.Tensor]] = {
    "cosine": lambda case: 1 - cosines(case),
    "euclidean": lambda case: torch.cdist(case.features, case.features),
}


def divprune(case: Case) -> list[int]:
    """As released (DivPrune, 2025): the minimum over all rows picked so far, anew after every pick."""
    distance = DISTANCES["cosine"](case)
    picked = torch.empty(case.count, dtype=torch.long)
    for i in range(case.count):
        if i == 0:
            scores = torch.topk(distance, 2, dim=0, largest=False).values[1]
        else:
            scores = torch.min(torch.index_select(distance, 0, picked[:i]), dim=0).values
        picked[i] = torch.argmax(scores)
    return picked.tolist()


def farthest_first(case: Case, distance: torch.Tensor, first: int | None) -> list[int]:
    """The same with a running minimum; ``first`` None is the token whose nearest other one is farthest."""
    if first is None:
        first = int(torch.topk(distance, 2, dim=0, largest=False).values[1].argmax())
    picked, nearest = [first], distance[first].clone()
    while len(picked) < case.count:
        nearest[picked[-1]] = NEVER
        picked.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[picked[-1]])
    return picked


def marginal_relevance(case: Case) -> list[int]:
    """IDPruner (2026), lambda = 1/2."""
    similarity = cosines(case)
    free = torch.zeros(len(similarity))
    picked = [int(case.importance.argmax())]
    largest = similarity[picked[0]].clone()
    while len(picked) < case.count:
        free[picked[-1]] = NEVER
        picked.append(int((0.5 * case.importance - 0.5 * largest + free).argmax()))
        largest = torch.maximum(largest, similarity[picked[-1]])
    return picked


def max_sum(case: Case) -> list[int]:
    """ToDRE v2 (2025)."""
    similarity = cosines(case)
    picked, total = [case.pivot], torch.zeros(len(similarity))
    while len(picked) < case.count:
        total += similarity[picked[-1]]
        total[picked[-1]] = float("inf")
        picked.append(int(total.argmin()))
    return picked


def coverage(case: Case) -> list[int]:
    """MMTok (2025)."""
    picked: list[int] = []
    cover, free = torch.zeros(len(case.covers)), torch.zeros(case.covers.shape[1])
    while len(picked) < case.count:
        picked.append(int(((case.covers - cover[:, None]).relu().sum(0) + free).argmax()))
        free[picked[-1]] = NEVER
        cover = torch.maximum(cover, case.covers[:, picked[-1]])
    return picked


def determinant(case: Case) -> list[int]:
    """Algorithm 1 of Chen, Zhang and Zhou (2018)."""
    kernel = case.importance[:, None] * cosines(case) * case.importance
    columns, left = torch.zeros(case.count, len(kernel)), kernel.diagonal().clone()
    picked: list[int] = []
    for i in range(case.count):
        picked.append(int(left.argmax()))
        j = picked[-1]
        columns[i] = (kernel[j] - columns[:i, j] @ columns[:i]) / left[j].sqrt()
        left -= columns[i].square()
        left[j] = NEVER
    return picked


def _ours(rule: Callable[[Case], MaxRule | SumRule | DistanceRule | DeterminantRule], seed: str) -> Callable[[Case], list[int]]:
    def pick(case: Case) -> list[int]:
        features = case.features[None]
        first = {"pivot": lambda: torch.tensor([case.pivot]), "isolated": lambda: most_isolated(features), "": lambda: None}
        return greedy_order(features, torch.tensor([case.count]), rule(case), seed=first[seed]())[0].tolist()

    return pick


def _our_coverage(case: Case) -> list[int]:
    return greedy_order(case.covers.T[None], torch.tensor([case.count]), CoverageRule())[0].tolist()


RULES: dict[str, tuple[Callable[[Case], list[int]], Callable[[Case], list[int]]]] = {
    "divprune": (_ours(lambda case: MaxRule(), "isolated"), divprune),
    "k_center": (
        _ours(lambda case: DistanceRule(), "pivot"),
        lambda case: farthest_first(case, DISTANCES["euclidean"](case), case.pivot),
    ),
    "mmr": (_ours(lambda case: MaxRule(offset=0.5 * case.importance, weight=0.5), ""), marginal_relevance),
    "max_sum": (_ours(lambda case: SumRule(), "pivot"), max_sum),
    "coverage": (_our_coverage, coverage),
    "determinant": (_ours(lambda case: DeterminantRule(weight=case.importance), ""), determinant),
}
