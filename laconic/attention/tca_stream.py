"""How TCA-Attention thins a text out, block by block, as it comes in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from laconic.attention.base import Call
from laconic.buffers import locate, take
from laconic.cache import KVLayer
from laconic.primitives.allocate import largest_remainder
from laconic.primitives.scores import capped
from laconic.primitives.select import marked

if TYPE_CHECKING:
    from laconic.attention.tca_attention import TCAAttention

ORDER, SPREAD = "tca_attention.order", "tca_attention.spread"
WAITS, DROPPED = -1, 1 << 20  # the order of a token whose block is not thinned yet, and of one that goes


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


def ranked_counts(shares: torch.Tensor, blocks: int, block: int) -> torch.Tensor:
    """Tokens that ``blocks`` blocks keep, the largest number first: int64 ``(heads, blocks)``, by largest remainders of
    ``shares`` (heads, sizes)."""
    total = torch.full(shares.shape[:1], blocks, device=shares.device)
    number = largest_remainder(shares.flip(-1), total, total[:, None].expand(shares.shape))
    place = torch.arange(blocks, device=shares.device).expand(len(shares), -1).contiguous()
    return sizes(block).to(shares.device).flip(0)[torch.searchsorted(number.cumsum(-1), place, right=True)]


def blocks_done(layer: KVLayer, block: int) -> torch.Tensor:
    """How many first blocks of each row are thinned, ``(batch,)``, by what the tracks say of the entries."""
    at, waits = layer.positions[:, 0], layer.tracks[ORDER].view()[:, 0] == WAITS
    thinned = torch.where(waits, -1, at).amax(-1)
    return torch.where(thinned < 0, 0, torch.minimum(thinned + 1, layer.lengths) // block)


@dataclass
class Stream:
    """One row's text as it comes in: which entries behind the window its tokens may see, per KV head.

    Attributes:
        at: ``(kv_heads, n)``: the position of each slot. first, length: tokens before this call and after it.
        queries: ``(heads, any, head_dim)``: those of the newest tokens, of this call and some before it.
        slots, order, number, stays: ``(kv_heads, pool)``: the entries behind the window that may still be chosen, -1 in front
            in ``slots`` where a head has fewer; their rank in their block; its number; whether they are chosen now.
        spread: ``(kv_heads, blocks)``: how little redundant each block is.
        done: blocks that are behind the window. settled: those of them that lose nothing more unless the limit asks for it.
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
    slots: torch.Tensor
    order: torch.Tensor
    number: torch.Tensor
    stays: torch.Tensor
    spread: torch.Tensor
    done: int
    settled: int
    probed: int = 0  # pairs of query and key that were computed to weigh tokens, per query head

    @classmethod
    def of(
        cls, method: TCAAttention, layer: KVLayer, call: Call, row: int, limit: int | None, plan: Plan, queries: torch.Tensor
    ) -> Stream:
        """The text of ``row`` up to this call, and ``queries`` (heads, any, head_dim) up to its newest token."""
        at = layer.positions[row].contiguous()
        length, new, done = int(layer.lengths[row]), call.query.shape[2], int(layer.memory[f"{method.id}.done"][row])
        order, spread = (layer.tracks[name].view()[row] for name in (ORDER, SPREAD))
        held = (at >= method.sinks) & (at < done * method.block) & (order != DROPPED)
        slots, (order, spread) = compact_slots(held, order, spread)
        number = at.gather(1, slots.clamp(min=0)).clamp(min=0) // method.block
        table = torch.full((len(at), done + 1), float(WAITS), device=at.device)
        table.scatter_(1, torch.where(slots < 0, done, number), spread)
        queries = queries[:, -max(length, 1) :]
        return cls(
            method, layer, call, row, limit, plan, at, length - min(new, length), length, queries, slots, order, number,
            slots >= 0, table[:, :done], done, done,
        )  # fmt: skip

    def pieces(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """For ``sparse_prefill_attention``: rows that see the same thinned blocks, and all that they see."""
        at, shift = self.first, self.call.query.shape[2] - self.length
        while at < self.length:
            due = (self.done + 1) * self.method.block + self.method.recent
            over = self.length + 1 if self.limit is None or self.limit < at else self.limit + 1
            until = max(min(due, over), at + 1)  # a block may be overdue: it was there before the method
            yield at + shift, min(until, self.length) + shift, self.visible(min(until, self.length))
            at = until
            if until <= self.length and until >= min(due, over):
                if until >= due:
                    self.take(until)
                self.choose(until)

    def visible(self, until: int) -> torch.Tensor:
        """Slots ``(1, kv_heads, any)`` of the sinks, of what is chosen, and of all before ``until`` that is not thinned."""
        begin, device = self.done * self.method.block, self.at.device
        sinks = torch.arange(min(self.method.sinks, begin), device=device)
        whole = torch.cat([sinks, torch.arange(begin, until, device=device)])
        index, (slots,) = compact_slots(self.stays, self.slots)
        return torch.cat([slots.masked_fill(index < 0, -1), locate(self.at[None], whole[None, None])[0]], dim=1)[None]

    def take(self, until: int) -> None:
        """Takes the next block in, and ranks its tokens once and for all."""
        method, block = self.method, self.method.block
        wanted = torch.arange(max(self.done * block, method.sinks), (self.done + 1) * block, device=self.at.device)
        slots = locate(self.at[None], wanted[None, None])[0]
        number, order = torch.full_like(slots, self.done), torch.zeros_like(slots)
        self.done += 1
        self.spread = torch.nn.functional.pad(self.spread, (0, 1), value=float(WAITS))
        self.slots, self.number = torch.cat([self.slots, slots], 1), torch.cat([self.number, number], 1)
        self.order, self.stays = torch.cat([self.order, order], 1), torch.cat([self.stays, slots >= 0], 1)
        if method.probe == "last":
            until = min(until, max(self.done * block, self.length - self.queries.shape[1] + 1))
        queries = self._probes(until, 1 if method.probe == "last" else method.queries)
        order, spread = self._weigh(queries, slots, torch.zeros_like(slots), 1)
        self.order[:, self.order.shape[1] - slots.shape[1] :], self.spread[:, -1:] = order, spread

    def choose(self, until: int) -> None:
        """Marks what stays of the pool, as its configuration or the limit says, for the tokens from ``until`` on."""
        if not self.done or (self.limit is not None and until <= self.limit):
            return
        low = 0 if self.call.window is None else max(0, until - self.call.window) // self.method.block
        there = self.slots >= 0
        if self.call.window is not None:
            there = there & (self.at.gather(1, self.slots.clamp(min=0)) >= until - self.call.window)
        blocks, number = self.done - low, (self.number - low).clamp(min=0)
        held = torch.zeros(len(self.at), max(blocks, 1), dtype=torch.int64, device=self.at.device)
        held.scatter_add_(1, number, there.long())
        if blocks > 0:
            spread = self.spread[:, low:].masked_fill(held == 0, float(WAITS))
            place = spread.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            wanted = ranked_counts(self.plan.shares, blocks, self.method.block).gather(1, place)
            held = self._divide(wanted, held, until, low)
        self.stays = there & (self.order < held.gather(1, number))
        self.settled = self.done
        index, (slots, self.order, self.number) = compact_slots(self.stays, self.slots, self.order, self.number)
        self.slots = slots.masked_fill(index < 0, -1)
        self.stays = self.slots >= 0

    def tracks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Order and spread of all entries, ``(kv_heads, n)``."""
        begin = self.done * self.method.block
        behind = (self.at >= self.method.sinks) & (self.at < begin)
        order = torch.where(behind, DROPPED, WAITS).int()
        spread = torch.full(self.at.shape, float(WAITS), device=self.at.device)
        head = torch.arange(len(self.at), device=self.at.device)[:, None].expand_as(self.stays)[self.stays]
        order[head, self.slots[self.stays]] = self.order[self.stays].int()
        spread[head, self.slots[self.stays]] = self.spread.gather(1, self.number)[self.stays]
        return order, spread

    def _divide(self, wanted: torch.Tensor, held: torch.Tensor, until: int, low: int) -> torch.Tensor:
        """How many tokens each block keeps, ``(kv_heads, blocks)``, of the ``held`` ones, in the proportions ``wanted``.

        Every block keeps one while the limit has room for that.
        """
        if self.limit is None:
            block = torch.arange(held.shape[1], device=held.device) + low
            return torch.where(block < self.settled, held, torch.minimum(held, wanted))
        room = self._room(low)
        one = (held > 0).long()
        one = one * (one.sum(-1) <= room)[:, None].long()
        more = largest_remainder((wanted - one).clamp(min=0).double(), room - one.sum(-1), held - one)
        return torch.where((held.sum(-1) > room)[:, None], one + more, held)

    def _probes(self, until: int, count: int) -> torch.Tensor:
        """The newest queries before ``until``, ``(kv_heads, group * any, head_dim)``, ``count`` of each head if they are there.

        None of them lies before the end of the last block that is behind the window, so that each sees all of it.
        """
        newest = self.queries.shape[1] - (self.length - until)  # how many of the queries are before ``until``
        count = max(1, min(count, newest, until - self.done * self.method.block + 1))
        return self.queries[:, newest - count : newest].float().unflatten(0, (len(self.at), -1)).flatten(1, 2)

    def _weigh(
        self, queries: torch.Tensor, slots: torch.Tensor, number: torch.Tensor, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank of the entries ``slots`` (kv_heads, any) in their block by the mean weight that the queries give them in it;
        and how little redundant each of the ``blocks`` is, ``(kv_heads, blocks)``."""
        method, block = self.method, self.method.block
        place = number * block + self.at.gather(1, slots.clamp(min=0)).clamp(min=0) % block
        order, spread = torch.empty_like(slots), torch.empty(len(slots), blocks, device=slots.device)
        self.probed += queries.shape[1] * len(slots) // self.call.query.shape[1] * slots.shape[1]
        held = take(self.layer.keys[self.row : self.row + 1], slots[None])[0]
        for head in range(len(slots)):  # one at a time: weights of all probes and entries are held
            here = slots[head] >= 0
            keys = held[head][here].float()
            logits = capped(queries[head] @ keys.T * self.call.scale, self.call.softcap)
            table = torch.full((len(logits), blocks * block), float("-inf"), device=slots.device)
            table[:, place[head][here]] = logits
            weight = table.unflatten(1, (blocks, block)).softmax(-1).nan_to_num(0.0).mean(0)
            there = (table[0] > float("-inf")).view(blocks, block)
            rank = weight.masked_fill(~there, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            order[head] = rank.flatten()[place[head]].masked_fill(~here, DROPPED)
            if method.redundancy == "entropy":
                spread[head] = effective_count(weight)
            else:
                full = keys.new_zeros(blocks * block, keys.shape[1])
                full[place[head][here]] = keys
                spread[head] = key_spread(full.unflatten(0, (blocks, block)), there)
            spread[head].masked_fill_(~there.any(-1), float(WAITS))
        return order, spread

    def _room(self, low: int) -> torch.Tensor:
        """Tokens that each head may hold behind the window, int64 ``(kv_heads,)``, from block ``low`` on."""
        method, density = self.method, self.plan.density
        rest = self.limit - method.sinks - method.recent - method.block + 1
        method.require(
            rest >= 0,
            f"a budget of {self.limit} tokens cannot hold the {method.sinks} first and {method.recent} newest tokens and an "
            f"unfinished block of {method.block}: give a larger budget, or lower block and recent.",
        )
        most = (self.done - low) * method.block - (min(method.sinks, self.done * method.block) if low == 0 else 0)
        caps = torch.full((density.numel(),), most, device=density.device)
        total = torch.tensor(rest * density.numel(), device=density.device)
        return largest_remainder(density.flatten(), total, caps).view_as(density)[self.plan.layer]


def compact_slots(stays: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Where ``stays`` (heads, n) is set (see ``marked``), and ``tensors`` (heads, n) there."""
    index = marked(stays)
    return index, tuple(tensor.gather(1, index.clamp(min=0)) for tensor in tensors)


def effective_count(weight: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of ``weight`` (blocks, block), which sums to 1: on how many tokens it lies."""
    return (-torch.xlogy(weight, weight).sum(-1)).exp()


def key_spread(keys: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """1 minus the length of the mean direction of ``keys`` (blocks, block, dim): 0 where all that are ``there`` point the same
    way."""
    unit = torch.nn.functional.normalize(keys, dim=-1) * there[..., None]
    return 1 - (unit.sum(-2) / there.sum(-1, keepdim=True).clamp(min=1)).norm(dim=-1)
