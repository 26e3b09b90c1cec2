"""How TCA-Attention thins a text out, block by block, as it comes in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from laconic.attention.base import Call
from laconic.attention.prefill import FOREVER, ROWS
from laconic.buffers import find, take
from laconic.cache import KVLayer
from laconic.primitives.allocate import largest_remainder
from laconic.primitives.scores import capped
from laconic.primitives.select import marked

if TYPE_CHECKING:
    from laconic.attention.tca_attention import TCAAttention

ORDER, SPREAD = "tca_attention.order", "tca_attention.spread"
WAITS, DROPPED = -1, 1 << 20  # the order of a token whose block is not thinned yet, and of one that goes
BLOCKS = 64  # that are weighed, or compared with all, at a time


@dataclass(frozen=True)
class Plan:
    """What the profile says: of ``layer``, the share of blocks of each size, ``(kv_heads, sizes)``; and the density of every
    head of the model, ``(layers, kv_heads)``."""

    layer: int
    shares: torch.Tensor
    density: torch.Tensor


def sizes(block: int) -> torch.Tensor:
    """How many tokens a block may keep: 1, 2, 4, ... and all of them."""
    return torch.tensor([*(2**i for i in range(math.ceil(math.log2(block)))), block])


def configurations(block: int) -> list[tuple[float, float]]:
    """Pairs of mu and sigma; mu is counted down from the whole block, in powers of two. The last one keeps everything."""
    deepest = math.log2(block)
    return [(0.0 - deepest * i / 9, sigma) for i in range(9, -1, -1) for sigma in (0.5, 1.0, 2.0)] + [(0.0, 0.0)]


def distributions(pairs: Sequence[Sequence[float]], block: int) -> torch.Tensor:
    """Share of the blocks that keep k tokens, in proportion to exp(-(log2(k / block) - mu)^2 / (2 sigma^2)): float64
    ``(pairs, sizes)``; a sigma of 0 is the limit."""
    mu, sigma = torch.tensor([list(pair) for pair in pairs], dtype=torch.float64).T[..., None]
    distance = (sizes(block).double() / block).log2() - mu
    return (-(distance**2) / (2 * sigma.clamp(min=1e-3) ** 2)).softmax(-1)


def ranked_counts(shares: torch.Tensor, blocks: torch.Tensor, place: torch.Tensor, block: int) -> torch.Tensor:
    """Tokens that the block at ``place`` (heads, any, k) of ``blocks`` (any,) keeps, the first most: int64 ``(heads, any, k)``.

    ``shares`` (heads, sizes): of the blocks, that keep so many; by largest remainders.
    """
    total = blocks.expand(len(shares), -1)
    weights = shares.flip(-1)[:, None].expand(-1, total.shape[1], -1)
    number = largest_remainder(weights, total, total[..., None].expand(weights.shape))
    return sizes(block).to(shares.device).flip(0)[torch.searchsorted(number.cumsum(-1), place.contiguous(), right=True)]


def blocks_done(layer: KVLayer, block: int) -> torch.Tensor:
    """How many first blocks of each row are thinned, ``(batch,)``, by what the tracks say of the entries."""
    at, waits = layer.positions[:, 0], layer.tracks[ORDER].view()[:, 0] == WAITS
    thinned = torch.where(waits, -1, at).amax(-1)
    return torch.where(thinned < 0, 0, torch.minimum(thinned + 1, layer.lengths) // block)


@dataclass
class Pool:
    """Entries behind the window that a limit leaves, per KV head, -1 in front in ``slots`` where a head has fewer.

    Attributes:
        slots, order, number: ``(kv_heads, any)``: where they stand, their rank in their block, and its number.
    """

    slots: torch.Tensor
    order: torch.Tensor
    number: torch.Tensor

    def add(self, slots: torch.Tensor, order: torch.Tensor, number: int) -> None:
        """The entries of a block, ``(kv_heads, block)``."""
        self.slots, self.order = torch.cat([self.slots, slots], 1), torch.cat([self.order, order], 1)
        self.number = torch.cat([self.number, torch.full_like(slots, number)], 1)

    def keep(self, stays: torch.Tensor) -> torch.Tensor:
        """Leaves those that are marked, ``(kv_heads, any)``; the slots of the others, the rest -1."""
        lost = self.slots.masked_fill(stays, -1)
        index = marked(stays)
        slots, self.order, self.number = (t.gather(1, index.clamp(min=0)) for t in (self.slots, self.order, self.number))
        self.slots = slots.masked_fill(index < 0, -1)
        return lost


@dataclass
class Stream:
    """One row's text as it comes in: until when its tokens see which entries behind the window, per KV head.

    Attributes:
        at: ``(kv_heads, n)``: the position of each slot. first, length: tokens before this call and after it.
        queries: ``(heads, any, head_dim)``: those of the newest tokens, of this call and some before it.
        order: ``(kv_heads, n)``: rank of each entry in its block; ``WAITS`` before it has one, ``DROPPED`` when it goes.
        spread: ``(kv_heads, n)``: how little redundant its block is.
        gone: ``(kv_heads, n)``: the first position whose query sees it no longer.
        done: blocks that are behind the window.
    """

    method: TCAAttention
    layer: KVLayer
    call: Call
    row: int
    limit: int | None
    plan: Plan
    at: torch.Tensor
    first: int
    length: int
    queries: torch.Tensor
    order: torch.Tensor
    spread: torch.Tensor
    gone: torch.Tensor
    done: int
    probed: int = 0  # pairs of query and key that were computed to weigh tokens, per query head

    @classmethod
    def of(
        cls, method: TCAAttention, layer: KVLayer, call: Call, row: int, limit: int | None, plan: Plan, queries: torch.Tensor
    ) -> Stream:
        """The text of ``row`` up to this call, and ``queries`` (heads, any, head_dim) up to its newest token."""
        at = layer.positions[row].contiguous()
        length, new, done = int(layer.lengths[row]), call.query.shape[2], int(layer.memory[f"{method.id}.done"][row])
        order, spread = (layer.tracks[name].view()[row].clone() for name in (ORDER, SPREAD))
        gone = torch.where(order == DROPPED, 0, FOREVER).to(at)
        queries = queries[:, -max(length, 1) :]
        first = length - min(new, length)
        return cls(method, layer, call, row, limit, plan, at, first, length, queries, order, spread, gone, done)

    def pieces(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """For ``sparse_prefill_attention``: blocks of rows, and what is seen by any row of each."""
        shift = self.call.query.shape[2] - self.length
        for begin in range(self.first, self.length, ROWS):
            end = min(begin + ROWS, self.length)
            seen = (self.at >= 0) & (self.at < end) & (self.gone > begin)
            if self.call.window is not None:
                seen = seen & (self.at > begin - self.call.window)
            yield begin + shift, end + shift, marked(seen)[None]

    def thin(self) -> None:
        """Thins out what leaves the window in this call: by the configurations, or further if there is a limit."""
        until, before = self._due(), self._spread_before()
        parts = [self._weigh(self.done + i, until[i : i + BLOCKS]) for i in range(0, max(1, len(until)), BLOCKS)]
        slots, order, spread = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        pool = self._pool()
        real, (head, block, _) = slots >= 0, (slots >= 0).nonzero(as_tuple=True)
        self.order[head, slots[real]], self.spread[head, slots[real]] = order[real].int(), spread[head, block]
        if self.limit is None:
            lost = real & (order >= self._counts(torch.cat([before, spread], 1), until)[..., None])
            self._drop(slots.masked_fill(~lost, -1).flatten(1), until.repeat_interleave(self.method.block))
        else:
            self._fit(pool, torch.cat([before, spread], 1), slots, order, until)
        self.done += len(until)
        if self.call.window is not None:  # what no later query can see
            self.order[(self.order != WAITS) & (self.at < self.length - self.call.window)] = DROPPED

    def _due(self) -> torch.Tensor:
        """Of every block that leaves the window in this call, the position from which on it is thinned: int64 ``(blocks,)``.

        One that is overdue, for it was there before the method, comes a token after the one before it.
        """
        method, device = self.method, self.at.device
        number = torch.arange(self.done, max(self.done, (self.length - method.recent) // method.block), device=device)
        until = torch.maximum((number + 1) * method.block + method.recent, self.first + 1 + number - self.done)
        return until[until <= self.length]

    def _spread_before(self) -> torch.Tensor:
        """``(kv_heads, done)``: how little redundant the blocks are that were thinned before, -1 where nothing is left."""
        table = torch.full((len(self.at), self.done + 1), float(WAITS), device=self.at.device)
        number = torch.where(self._left(), self.at // self.method.block, self.done)
        return table.scatter_(1, number, self.spread)[:, : self.done]

    def _pool(self) -> Pool:
        """The entries behind the window that earlier calls have left."""
        index = marked(self._left())
        order, at = (t.gather(1, index.clamp(min=0)) for t in (self.order, self.at))
        return Pool(index, order.long(), at.clamp(min=0) // self.method.block)

    def _left(self) -> torch.Tensor:
        """Marks them, ``(kv_heads, n)``."""
        return (self.order != DROPPED) & (self.at >= self.method.sinks) & (self.at < self.done * self.method.block)

    def _weigh(self, begin: int, until: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The blocks from number ``begin`` on that leave the window at ``until`` (blocks,).

        Returns:
            ``(kv_heads, blocks, block)``: their slots, -1 for sinks; the rank of each in its block by the mean weight that the
            newest queries give it there. ``(kv_heads, blocks)``: how little redundant each block is.
        """
        method, blocks = self.method, len(until)
        wanted = torch.arange(begin * method.block, (begin + blocks) * method.block, device=self.at.device)
        wanted = wanted.masked_fill(wanted < method.sinks, -1)
        slots = find(self.at[None], wanted[None, None])[0]
        keys = take(self.layer.keys[self.row : self.row + 1], slots[None])[0].float().unflatten(1, (blocks, method.block))
        slots = slots.unflatten(1, (blocks, method.block))
        queries, known = self._probes(begin, until)
        self.probed += int((known.sum(-1) * (wanted >= 0).view(blocks, method.block).sum(-1)).sum())
        logits = capped(queries.flatten(2, 3) @ keys.transpose(-1, -2) * self.call.scale, self.call.softcap)
        weight = logits.masked_fill(slots[:, :, None] < 0, float("-inf")).softmax(-1).nan_to_num(0.0)
        weight = weight.unflatten(2, queries.shape[2:4]).mean(2)  # (kv_heads, blocks, queries, block)
        weight = (weight * known[..., None]).sum(2) / known.sum(-1, keepdim=True)
        rank = weight.masked_fill(slots < 0, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        spread = effective_count(weight) if method.redundancy == "entropy" else key_spread(keys, slots >= 0)
        return slots, rank, spread.masked_fill((slots < 0).all(-1), float(WAITS))

    def _probes(self, begin: int, until: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The newest queries before ``until`` (blocks,), ``(kv_heads, blocks, group, count, head_dim)``; and which are any, bool
        ``(blocks, count)``.

        None of them lies before the end of its block, so that each sees all of it.
        """
        method, held = self.method, self.queries.shape[1]
        ends = (torch.arange(begin, begin + len(until), device=until.device) + 1) * method.block
        count = method.queries
        if method.probe == "last":
            count, until = 1, torch.minimum(until, ends.clamp(min=self.length - held + 1))
        newest = held - (self.length - until)  # how many of the queries are before ``until``
        place = torch.arange(-count, 0, device=until.device)
        known = -place <= torch.minimum(newest, until - ends + 1).clamp(min=1)[:, None]
        queries = self.queries[:, (newest[:, None] + place).clamp(min=0)].float()
        return queries.unflatten(0, (len(self.at), -1)).transpose(1, 2), known

    def _counts(self, spread: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        """Tokens that each new block keeps, ``(kv_heads, blocks)``, by its place among those before it that are whole in sight.

        ``spread``: ``(kv_heads, all blocks)``: how little redundant each is.
        """
        number = torch.arange(spread.shape[1], device=until.device)
        new = number[self.done :]
        low = torch.zeros_like(new)
        if self.call.window is not None:
            low = torch.minimum(-((self.call.window - until).clamp(max=0) // self.method.block), new)
        places = [
            ((spread[:, None] >= spread[:, i, None]) & (number >= low[i - self.done, None]) & (number < i[:, None])).sum(-1)
            for i in new.split(BLOCKS)
        ]
        return ranked_counts(self.plan.shares, new + 1 - low, torch.cat(places, 1)[..., None], self.method.block)[..., 0]

    def _drop(self, slots: torch.Tensor, until: torch.Tensor) -> None:
        """From ``until`` (any,) on, entries ``slots`` (kv_heads, any), -1 for none, are not seen."""
        real, head = slots >= 0, torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)
        self.gone[head[real], slots[real]] = until.expand_as(slots)[real]
        self.order[head[real], slots[real]] = DROPPED

    def _fit(self, pool: Pool, spread: torch.Tensor, slots: torch.Tensor, order: torch.Tensor, until: torch.Tensor) -> None:
        """Takes the new blocks (see ``_weigh``) one by one, and drops what the limit has no room for whenever it is passed."""
        due = set(until.tolist())
        over = {self.limit + 1} if self.first <= self.limit < self.length else set()
        taken = 0
        for at in sorted(due | over):
            if at in due:
                pool.add(slots[:, taken], order[:, taken], self.done + taken)
                taken += 1
            if at > self.limit and self.done + taken:
                lost = pool.keep(self._stays(pool, spread[:, : self.done + taken], at))
                self._drop(lost, torch.tensor([at], device=lost.device))

    def _stays(self, pool: Pool, spread: torch.Tensor, until: int) -> torch.Tensor:
        """Marks what stays of the pool, as the limit says, for the tokens from ``until`` on.

        ``spread``: ``(kv_heads, blocks)``: of all blocks so far. They keep tokens in the proportions of their configuration, and
        each keeps one while the limit has room for that.
        """
        low = 0 if self.call.window is None else max(0, until - self.call.window) // self.method.block
        there, blocks = pool.slots >= 0, spread.shape[1] - low
        if self.call.window is not None:
            there = there & (self.at.gather(1, pool.slots.clamp(min=0)) >= until - self.call.window)
        number = (pool.number - low).clamp(min=0)
        held = torch.zeros(len(self.at), max(blocks, 1), dtype=torch.int64, device=self.at.device)
        held.scatter_add_(1, number, there.long())
        if blocks > 0:
            worth = spread[:, low:].masked_fill(held == 0, float(WAITS))
            place = worth.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            total = torch.tensor([blocks], device=held.device)
            wanted = ranked_counts(self.plan.shares, total, place[:, None], self.method.block)[:, 0]
            held = self._divide(wanted, held, low, spread.shape[1])
        return there & (pool.order < held.gather(1, number))

    def _divide(self, wanted: torch.Tensor, held: torch.Tensor, low: int, done: int) -> torch.Tensor:
        """How many of the ``held`` tokens each block keeps, ``(kv_heads, blocks)``, in the proportions ``wanted``."""
        room = self._room(low, done)
        one = (held > 0).long()
        one = one * (one.sum(-1) <= room)[:, None].long()
        more = largest_remainder((wanted - one).clamp(min=0).double(), room - one.sum(-1), held - one)
        return torch.where((held.sum(-1) > room)[:, None], one + more, held)

    def _room(self, low: int, done: int) -> torch.Tensor:
        """Tokens that each head may hold behind the window, int64 ``(kv_heads,)``, in the blocks from ``low`` to ``done``."""
        method, density = self.method, self.plan.density
        rest = self.limit - method.sinks - method.recent - method.block + 1
        method.require(
            rest >= 0,
            f"a budget of {self.limit} tokens cannot hold the {method.sinks} first and {method.recent} newest tokens and an "
            f"unfinished block of {method.block}: give a larger budget, or lower block and recent.",
        )
        most = (done - low) * method.block - (min(method.sinks, done * method.block) if low == 0 else 0)
        caps = torch.full((density.numel(),), most, device=density.device)
        total = torch.tensor(rest * density.numel(), device=density.device)
        return largest_remainder(density.flatten(), total, caps).view_as(density)[self.plan.layer]


def effective_count(weight: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of ``weight`` (..., block), which sums to 1: on how many tokens it lies."""
    return (-torch.xlogy(weight, weight).sum(-1)).exp()


def key_spread(keys: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """1 minus the length of the mean direction of ``keys`` (..., block, dim): 0 where all that are ``there`` point the same
    way."""
    unit = torch.nn.functional.normalize(keys, dim=-1) * there[..., None]
    return 1 - (unit.sum(-2) / there.sum(-1, keepdim=True).clamp(min=1)).norm(dim=-1)
