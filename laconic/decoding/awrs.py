"""AWRS: a constraint enforced by testing only the tokens that are drawn, with weights that undo the bias.

A draw visits tokens in the order of sampling without replacement until one is ok. An estimator gives it an unbiased weight:
over all draws, the mean of weight x [token is t] is p(t) for every t that is ok, and 0 for every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.decoding.constraints import Constraint, State
from laconic.decoding.particles import Draw, ParticleMethod
from laconic.method import parameter
from laconic.registry import register

FIRST = 16  # tokens that are put in order at once; more are needed rarely
STEEP = math.log(2 / 3)  # from this log probability of the likeliest token on, the geometric estimator varies less
Order = Iterator[tuple[int, float]]


@register
@dataclass(frozen=True, kw_only=True)
class AWRS(ParticleMethod):
    """Enforces any yes/no constraint on the next token with few checks, and weighs particles so that none is too likely.

    With weights, particles follow the model's own law given that the whole text satisfies the constraint; without
    (``proper_weights=false``) they have the law of masking. It pays where a check is dear: Python predicates, interpreters,
    parsers of large languages. The libraries of grammars give whole masks for little: see ``masking``.
    """

    id: ClassVar[str] = "awrs"
    paper: ClassVar[str] = "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling (2025)"

    max_accepts: int = parameter(2, "accepted draws of the geometric estimator; above 2 it is always used", least=2)
    max_rejects: int = parameter(0, "rejected draws after which a particle gives up, at least 2; 0 for any number", least=0)
    prune: bool = parameter(True, "leave out tokens that no text under the constraint has, unchecked")
    tail: float = parameter(1e-5, "a particle gives up when all but this probability was rejected", least=0.0)

    def check(self) -> None:
        self.require(self.max_rejects != 1, "max_rejects=1 allows no estimate: give 2 or more, or 0 for any number.")

    def draw(
        self, logs: torch.Tensor, states: Sequence[State], constraint: Constraint, generator: torch.Generator
    ) -> list[Draw]:  # fmt: skip
        if self.prune:
            logs = logs.masked_fill(~constraint.possible(logs.shape[-1]), float("-inf"))
        total = logs.logsumexp(-1, keepdim=True)
        logs = logs - total.clamp(min=torch.finfo(logs.dtype).min)
        orders, steep = visits(logs, generator), (logs.amax(-1) >= STEEP).tolist()
        drawn = []
        for row, state in enumerate(states):
            if not self.proper_weights:
                draw = first(orders[row], state.ok, max_rejects=self._limit, tail=self.tail)
            elif steep[row] or self.max_accepts > 2:
                again = Redraw(logs[row], orders[row], generator)
                draw = geometric(again, state.ok, max_accepts=self.max_accepts, max_rejects=self._limit, tail=self.tail)
            else:
                draw = recursive(orders[row], state.ok, max_rejects=self._limit, tail=self.tail)
            drawn.append(draw.plus(float(total[row])) if self.proper_weights else draw)
        return drawn

    @property
    def _limit(self) -> float:
        return self.max_rejects or math.inf


def visits(logs: torch.Tensor, generator: torch.Generator | None = None) -> list[Order]:
    """For each row of log probabilities ``(rows, vocabulary)`` its tokens and theirs, in the order of sampling without
    replacement (Gumbel keys). Tokens of no probability are not visited."""
    noise = torch.empty_like(logs).exponential_(generator=generator).clamp(min=torch.finfo(logs.dtype).tiny)
    keys = logs - noise.log()
    count = min(FIRST, logs.shape[-1])
    top = keys.topk(count, dim=-1).indices
    tokens, values = top.tolist(), logs.gather(-1, top).tolist()
    return [_visit(logs[row], keys[row], tokens[row], values[row]) for row in range(len(logs))]


def _visit(logs: torch.Tensor, keys: torch.Tensor, tokens: list[int], values: list[float]) -> Order:
    at = 0
    while True:
        for token, value in zip(tokens[at:], values[at:], strict=True):
            if value == -math.inf:
                return
            yield token, value
        at = len(tokens)
        if at == len(logs):
            return
        top = keys.topk(min(8 * at, len(logs))).indices
        tokens, values = top.tolist(), logs[top].tolist()


class Redraw:
    """Fresh orders of the same law without the tokens that were rejected."""

    def __init__(self, logs: torch.Tensor, order: Order, generator: torch.Generator | None = None) -> None:
        self.logs, self.order, self.generator = logs, order, generator

    def __call__(self, rejected: list[int]) -> Order:
        if self.order is not None:
            order, self.order = self.order, None
            return order
        logs = self.logs.clone()
        logs[rejected] = float("-inf")
        return visits(logs[None], self.generator)[0]

    def phantoms(self, rejected: float) -> int:
        """How often a draw from the whole law, in which ``rejected`` is the probability of rejected tokens, meets one of those
        before it meets another."""
        chance = float(torch.rand((), dtype=torch.float64, generator=self.generator))
        return int(math.log1p(-chance) / math.log(rejected)) if 0 < rejected < 1 else 0


def first(order: Order, ok: Callable[[int], bool], *, max_rejects: float = math.inf, tail: float = 0.0) -> Draw:
    """The first token that is ok: the law of masking, without a weight."""
    rejected = rejects = checks = 0
    for token, log in order:
        checks += 1
        if ok(token):
            return Draw(token, 0.0, checks)
        rejects, rejected = rejects + 1, rejected + math.exp(log)
        if rejects >= max_rejects or rejected >= 1 - tail:
            break
    return Draw(None, -math.inf, checks)


def recursive(order: Order, ok: Callable[[int], bool], *, max_rejects: float = math.inf, tail: float = 0.0) -> Draw:
    """The first token that is ok; its weight looks one token further.

    With q the probability of the visited token among those left: accepted, it weighs 1 if the next one is ok too and else q;
    rejected, it leaves 1 - q of the weight that the others give.
    """
    rejected, factor, rejects, checks = 0.0, 0.0, 0, 0
    visited = next(order, None)
    while visited is not None:
        (token, log), following = visited, next(order, None)
        left = 1 - rejected
        share = min(1.0, math.exp(log) / left) if following is not None and left > 0 else 1.0
        checks += 1
        if ok(token):
            if following is None or rejects + 1 >= max_rejects:
                return Draw(token, factor, checks)
            return Draw(token, factor + (0.0 if ok(following[0]) else math.log(share)), checks + 1)
        rejects, rejected = rejects + 1, rejected + math.exp(log)
        if share >= 1 or rejects >= max_rejects or rejected >= 1 - tail:
            break
        factor += math.log1p(-share)
        visited = following
    return Draw(None, -math.inf, checks)


def geometric(
    redraw: Redraw, ok: Callable[[int], bool], *, max_accepts: int = 2, max_rejects: float = math.inf, tail: float = 0.0
) -> Draw:
    """The first token that is ok, weighed by inverse sampling (Haldane, 1945): draws with replacement go on until
    ``max_accepts`` were accepted or ``max_rejects`` rejected. Tokens that were rejected before are not drawn again, but counted
    as ``phantoms``."""
    accepted: list[int] = []
    rejected: list[int] = []
    mass, rejects, checks = 0.0, 0, 0
    while len(accepted) < max_accepts and rejects < max_rejects and (accepted or mass < 1 - tail):
        found = None
        for token, log in redraw(rejected):
            rejects += redraw.phantoms(mass)
            if rejects >= max_rejects:
                break
            known = token in accepted
            checks += not known
            if known or ok(token):
                found = token
                break
            rejected.append(token)
            rejects, mass = rejects + 1, mass + math.exp(log)
            if rejects >= max_rejects or (not accepted and mass >= 1 - tail):
                break
        if found is None:
            break
        accepted.append(found)
    if not accepted:
        return Draw(None, -math.inf, checks)
    draws = len(accepted) + min(rejects, max_rejects) - 1
    return Draw(accepted[0], math.log(min(max_accepts - 1, len(accepted)) / draws), checks)
