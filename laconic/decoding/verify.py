"""Verifiers: which drafted tokens stay, and which token follows them. Pure functions on trees and rows of probabilities.

All rows of a batch are verified at once, level by level, without asking the device in between.

| verifier | what comes out | what it asks of the draft |
|---|---|---|
| ``match`` with argmaxes | the greedy tokens | nothing |
| ``match`` with one sample of p per node | tokens of the law p | nothing |
| ``rejection`` | tokens of the law p | children drawn without replacement from ``laws`` |
| ``k_seq`` | tokens of the law p | independent drafts from ``laws`` |
| ``typical`` | likely tokens, of another law | nothing |
| ``trust`` | whatever was drafted | that it drafts only what it is sure of |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laconic.decoding.tree import NONE, DraftTree

LITTLE = 1e-12  # mass below which a remainder is rounding


@dataclass(frozen=True)
class Verdict:
    """What a verifier says about each row.

    Attributes:
        path: int64 ``(batch, depth + 1)``: the accepted nodes from the root on, -1 behind the last.
        token: int64 ``(batch,)``: the token that follows the last accepted one.
    """

    path: torch.Tensor
    token: torch.Tensor

    @property
    def accepted(self) -> torch.Tensor:
        """int64 ``(batch,)``: accepted draft tokens, the root apart."""
        return (self.path >= 0).sum(-1) - 1


def draw(rows: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One sample of each row of probabilities ``(..., vocabulary)``, which need not sum to 1."""
    below = rows.cumsum(-1, dtype=torch.float64)  # inverts the law: one random number a row, and zeros never win
    at = torch.rand(below[..., -1:].shape, dtype=torch.float64, device=rows.device, generator=generator) * below[..., -1:]
    return torch.searchsorted(below, at, right=True).squeeze(-1).clamp(max=rows.shape[-1] - 1)


def draw_distinct(rows: torch.Tensor, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """``count`` samples of each row without replacement, ``(..., count)``, in the order of drawing.

    Where fewer tokens have any probability, the others follow them.
    """
    if count == 1:
        return draw(rows, generator).unsqueeze(-1)
    noise = torch.empty_like(rows).exponential_(generator=generator)
    return (rows / noise).topk(count, dim=-1).indices


def match(tree: DraftTree, chosen: torch.Tensor) -> Verdict:
    """Follows what the target model chose at each node while that is a child, to the deepest node that can be reached.

    With argmaxes it gives the greedy text. With one sample of p per node it is exact in distribution for any draft, however
    it came about: what is emitted are the samples themselves.

    Args:
        chosen: int64 ``(batch, nodes)``: the token that the model puts after each node.
    """
    shape = tree.shape
    if shape.nodes == 1:  # nothing was drafted
        return Verdict(torch.zeros_like(chosen), chosen[:, 0])
    above = shape.parents.clamp(min=0)
    right = (tree.tokens == chosen.gather(1, above)) & (shape.parents >= 0)
    right[:, 0] = True
    reached = ~(shape.ancestors & ~right[:, None, :]).any(-1) & shape.real
    end = shape.depths.masked_fill(~reached, NONE).argmax(-1)
    return Verdict(shape.paths(end), chosen.gather(1, end[:, None])[:, 0])


def trust(tree: DraftTree, chosen: torch.Tensor) -> Verdict:
    """Accepts the deepest path of the draft unread, the first of equals, and what the model chose behind it. Lossy."""
    end = tree.shape.depths.argmax(-1)
    return Verdict(tree.shape.paths(end), chosen.gather(1, end[:, None])[:, 0])


def rejection(tree: DraftTree, p: torch.Tensor, generator: torch.Generator | None = None) -> Verdict:
    """Recursive rejection of children that were drawn without replacement (Sequoia, 2024; DySpec, 2024).

    A chain is speculative sampling (Leviathan et al. 2023). Children are tried in order: one is accepted with probability
    min(1, p / q); when it is not, p becomes what is left of p above q, and q loses the token. Exact in distribution. A child
    that the draft model cannot have drawn, for q had run out, is passed over.

    Args:
        p: ``(batch, nodes, vocabulary)``: the law of the target model after each node. The arithmetic is float64.
    """
    shape, node = tree.shape, torch.zeros_like(tree.tokens[:, 0])
    every = torch.arange(len(node), device=node.device)
    going, token = torch.ones_like(node, dtype=torch.bool), torch.zeros_like(node)
    for _ in range(shape.depth + 1):
        target, draft = p[every, node].double(), tree.laws[every, node].double()
        open_, onward = going.clone(), node
        for rank in range(shape.children.shape[2]):
            child = shape.children[every, node, rank]
            here = tree.tokens.gather(1, child.clamp(min=0)[:, None])
            tried = open_ & (child >= 0) & (draft.gather(1, here)[:, 0] > 0)
            chance = torch.rand(len(node), dtype=torch.float64, device=p.device, generator=generator)
            rest = (target - draft).clamp(min=0)
            mass = rest.sum(-1)
            accepts = (chance * draft.gather(1, here)[:, 0] < target.gather(1, here)[:, 0]) | (mass < LITTLE)
            onward = torch.where(tried & accepts, child, onward)
            open_ = open_ & ~(tried & accepts)
            rejected = (tried & ~accepts)[:, None]
            target = torch.where(rejected, rest / mass.clamp(min=LITTLE)[:, None], target)
            without = draft.scatter(1, here, 0.0)
            draft = torch.where(rejected, without / without.sum(-1, keepdim=True).clamp(min=LITTLE), draft)
        token = torch.where(open_, draw(target, generator), token)
        going = going & ~open_
        node = onward
        if node.device.type == "cpu" and not bool(going.any()):
            break
    return Verdict(shape.paths(node), token)


def typical(
    tree: DraftTree, p: torch.Tensor, chosen: torch.Tensor, *, most: float = 0.09, scale: float = 0.3
) -> Verdict:
    """Accepts what the model finds likely enough: p above min(``most``, ``scale`` x exp(-entropy)) (Medusa, 2024). Lossy.

    Of the longest accepted paths the likeliest; then the token that the model chose there.

    Args:
        p: ``(batch, nodes, vocabulary)``; chosen: int64 ``(batch, nodes)``, as for ``match``.
    """
    shape = tree.shape
    above = shape.parents.clamp(min=0)
    logs = p.float().clamp(min=1e-30).log()
    bound = (scale * (p * logs).sum(-1).exp()).clamp(max=most).gather(1, above)
    every = torch.arange(len(p), device=p.device)[:, None]
    own = logs[every, above, tree.tokens]
    right = (own.exp() > bound) & (shape.parents >= 0)
    right[:, 0] = True
    reached = ~(shape.ancestors & ~right[:, None, :]).any(-1) & shape.real
    total = (shape.ancestors.to(own.dtype) @ own.masked_fill(shape.parents < 0, 0.0)[..., None])[..., 0]
    depth = shape.depths.masked_fill(~reached, NONE)
    end = total.masked_fill(depth < depth.amax(-1, keepdim=True), float("-inf")).argmax(-1)
    return Verdict(shape.paths(end), chosen.gather(1, end[:, None])[:, 0])


def k_seq(tree: DraftTree, p: torch.Tensor, generator: torch.Generator | None = None) -> Verdict:
    """Selection among independent drafts with replacement (SpecTr, 2023). Exact in distribution.

    The drafts that agree with what is accepted offer their next tokens in turn; one is accepted with probability
    min(1, p / (rho q)), where ``rho`` makes up for the number of chances; when none is, the token is drawn from what is left of p
    above rho q.

    Args:
        p: as for ``rejection``. ``tree.drafts`` says which nodes belong to which draft.
    """
    shape, drafts = tree.shape, tree.drafts
    batch, count, length = drafts.shape
    every = torch.arange(batch, device=p.device)
    node = torch.zeros_like(tree.tokens[:, 0])
    going, token = torch.ones_like(node, dtype=torch.bool), torch.zeros_like(node)
    alive = torch.ones(batch, count, dtype=torch.bool, device=p.device)
    for place in range(length + 1):
        at = drafts[:, :, place] if place < length else torch.full_like(drafts[:, :, 0], NONE)
        alive = alive & (at >= 0)
        offered = tree.tokens.gather(1, at.clamp(min=0))
        target, draft = p[every, node].double(), tree.laws[every, node].double()
        rho = division_factor(target, draft, alive.sum(-1))
        chance = torch.rand(batch, count, dtype=torch.float64, device=p.device, generator=generator)
        accepts = alive & (chance * rho[:, None] * draft.gather(1, offered) < target.gather(1, offered))
        hit, first = accepts.any(-1), accepts.int().argmax(-1)
        rest = (target - rho[:, None] * draft).clamp(min=0)
        offers = alive.any(-1, keepdim=True)
        rest = torch.where(offers & (rest.sum(-1, keepdim=True) >= LITTLE), rest, target)
        token = torch.where(going & ~hit, draw(rest, generator), token)
        going = going & hit
        node = torch.where(going, at.gather(1, first[:, None])[:, 0], node)
        alive = alive & going[:, None] & (offered == offered.gather(1, first[:, None]))
        if node.device.type == "cpu" and not bool(going.any()):
            break
    return Verdict(shape.paths(node), token)


def division_factor(p: torch.Tensor, q: torch.Tensor, count: torch.Tensor, rounds: int = 50) -> torch.Tensor:
    """The smallest ``rho`` in [1, count] with which ``count`` independent draws from q can be checked, float64 ``(batch,)``.

    That is where 1 - (1 - beta)^count = rho beta, with beta = sum min(q, p / rho). Every larger one is valid too, a smaller one
    is not: bisection gives the upper end.

    Args:
        p, q: float64 ``(batch, vocabulary)``; count: int64 ``(batch,)``.
    """
    count = count.clamp(min=1).to(p.dtype)
    low, high = torch.ones_like(count), count.clone()

    def excess(rho: torch.Tensor) -> torch.Tensor:
        beta = torch.minimum(q, p / rho[:, None]).sum(-1)
        return -torch.expm1(count * torch.log1p(-beta.clamp(max=1.0))) - rho * beta

    enough = excess(low) <= 0  # one draw, equal laws, or laws that share nothing
    for _ in range(rounds):
        middle = (low + high) / 2
        above = excess(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(enough, torch.ones_like(high), high)
