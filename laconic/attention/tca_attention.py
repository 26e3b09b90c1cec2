"""TCA-Attention: every block of tokens is thinned out once, by as much as its head and its redundancy allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, EvictMethod
from laconic.attention.prefill import sparse_prefill_attention
from laconic.attention.probe import Probe
from laconic.attention.queries import join_queries
from laconic.attention.tca_stream import (
    DROPPED,
    ORDER,
    SPREAD,
    WAITS,
    Plan,
    Stream,
    blocks_done,
    configurations,
    distributions,
    sizes,
)  # fmt: skip
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.scores import capped
from laconic.primitives.select import marked
from laconic.profiles import layer_tables, need_file
from laconic.registry import register

PROBES = ("after", "last")
REDUNDANCY = ("entropy", "keys")
ROWS = 64  # last queries of a text whose attention is measured in calibration


@register
@dataclass(frozen=True, kw_only=True)
class TCAAttention(EvictMethod):
    """Keeps a few tokens of each block, and never looks back: one choice serves the prompt, the cache and the steps.

    When a block of ``block`` tokens leaves the local window, the newest queries say what its tokens weigh (softmax inside the
    block), and the best stay, as many as the head's share and the block's redundancy allow: blocks whose weight lies on few
    tokens keep fewer. Later tokens of the prompt see only what stayed, so a prompt costs less too, and nothing comes back. How
    much each KV head may drop is measured once per model: the profile knows how much attention a head retains with each of
    31 configurations, and the sparsest that retains ``tau`` is taken. Without a budget (or with 100%) that decides how many
    tokens stay. With one, all heads and layers share that total in the same proportions, blocks are thinned further as new
    ones come, and what does not fit in a window of ``recent`` tokens and an unfinished block is refused.
    """

    id: ClassVar[str] = "tca_attention"
    paper: ClassVar[str] = "Training-free Context-adaptive Attention for Efficient Long Context Modeling (2025)"
    needs: ClassVar[str] = "calibration"
    claims: ClassVar[tuple[Claim, ...]] = AttentionMethod.claims
    reads_keys: ClassVar[bool] = False  # a block's keys, once, when it leaves the window

    recent: int = parameter(16, "newest tokens that are always kept: the local window", least=0)
    block: int = parameter(16, "tokens per block", least=2)
    tau: float = parameter(0.95, "share of its attention that each head has to retain in calibration", least=0)
    queries: int = parameter(16, "newest queries that weigh a block, of those that see all of it", least=1)
    probe: str = parameter("after", "what weighs a block: after, the newest queries that see all of it; last, its last one")
    redundancy: str = parameter("entropy", "entropy: weight on few tokens; keys: keys that point the same way")
    profile: str = parameter("", "a file of laconic profile tca_attention; empty: the one of a built-in model")

    def check(self) -> None:
        self.require(self.probe in PROBES, f"probe must be one of {', '.join(PROBES)}.")
        self.require(self.redundancy in REDUNDANCY, f"redundancy must be one of {', '.join(REDUNDANCY)}.")
        self.require(self.tau <= 1, "tau is a share: give a number up to 1.")
        self.require(self.budget.shape == "uniform", "its profile divides the layers' budget: give it without 'pyramid:'.")
        need_file(self.id, self.profile)

    def attend_prompt(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, float] | None:
        plan = self._plan(layer)
        limits = [self._limit(layer, call, row) for row in range(len(layer.lengths))]
        if not any(self._thins(int(n), limit, plan) for n, limit in zip(layer.lengths, limits, strict=True)):
            return None
        queries, parts, probed = self._prepare(layer, call), [], 0.0
        for row, limit in enumerate(limits):
            stream, own = Stream.of(self, layer, call, row, limit, plan, queries[row]), slice(row, row + 1)
            stream.thin()
            parts.append(sparse_prefill_attention(
                call.query[own], layer.keys[own], layer.values[own], layer.shared_positions[own], stream.pieces(),
                scale=call.scale, window=call.window, softcap=call.softcap, gone=stream.gone[None],
            ))  # fmt: skip
            self._write(layer, row, stream)
            new, held = call.query.shape[2], layer.n - call.query.shape[2]
            probed += stream.probed / (new * held + new * (new + 1) / 2)
        return torch.cat([output for output, _ in parts]), (sum(share for _, share in parts) + probed) / len(parts)

    def observe(self, layer: KVLayer, call: Call) -> None:
        """Thins out the blocks that have left the window, unless ``attend_prompt`` has just done so."""
        memory = layer.memory
        if memory.get(f"{self.id}.seen") == layer.seen:
            return
        queries, plan = self._prepare(layer, call), None
        for row, (length, done) in enumerate(zip(layer.lengths.tolist(), memory[f"{self.id}.done"].tolist(), strict=True)):
            limit = self._limit(layer, call, row)
            if length >= min((done + 1) * self.block + self.recent, length + 1 if limit is None else limit + 1):
                plan = plan or self._plan(layer)
                stream = Stream.of(self, layer, call, row, limit, plan, queries[row])
                stream.thin()
                self._write(layer, row, stream)

    def keep(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if not layer.memory.pop(f"{self.id}.drops", False):
            return None
        first = 0 if call.window is None else (layer.lengths[:, None, None] - call.window).clamp(min=0)
        return marked((layer.tracks[ORDER].view() != DROPPED) & (layer.positions >= first))

    def _prepare(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Gives the new entries their tracks, once for each call, and the queries (batch, heads, any, head_dim): the new ones,
        behind the last of earlier calls."""
        memory = layer.memory
        for name, kind in ((ORDER, torch.int32), (SPREAD, torch.float32)):
            have = layer.tracks[name].n if name in layer.tracks else 0
            fresh = torch.full((*layer.keys.shape[:2], layer.n - have), WAITS, dtype=kind, device=layer.keys.device)
            layer.track(name, fresh)
        if f"{self.id}.done" not in memory:  # the first call, or the first after a crop
            memory[f"{self.id}.done"] = blocks_done(layer, self.block)
        memory[f"{self.id}.seen"] = layer.seen
        return join_queries(memory, f"{self.id}.query", call.query, max(self.queries, self.recent + 1))

    def _write(self, layer: KVLayer, row: int, stream: Stream) -> None:
        """What the stream has decided, into the tracks of its row."""
        layer.tracks[ORDER].view()[row], layer.tracks[SPREAD].view()[row] = stream.order, stream.spread
        layer.memory[f"{self.id}.done"][row] = stream.done
        dropped = bool((stream.order == DROPPED).any())
        layer.memory[f"{self.id}.drops"] = layer.memory.get(f"{self.id}.drops", False) or dropped

    def _limit(self, layer: KVLayer, call: Call, row: int) -> int | None:
        """Tokens that a head may hold on average; None where the calibrated shares decide."""
        if self.budget.is_full:
            return None
        if self.budget.amount is not None:
            return self.budget.amount
        prompt = int(layer.memory["prompt"][row])
        return self.budget.tokens(prompt if call.window is None else min(prompt, call.window))

    def _thins(self, length: int, limit: int | None, plan: Plan) -> bool:
        """Whether a text of ``length`` tokens loses any."""
        if limit is None:
            return length > self.block + self.recent and bool((plan.density[plan.layer] < 1).any())
        return length > limit

    def _plan(self, layer: KVLayer) -> Plan:
        """The sparsest configuration of every head of the model that retains ``tau``."""
        tables = layer_tables(self.id, self.profile, layer)
        shares = distributions(tables["configurations"], self.block)
        density = shares @ sizes(self.block).double() / self.block
        enough = torch.tensor(tables["mass"], dtype=torch.float64) >= self.tau  # (layers, kv_heads, configurations)
        chosen = torch.where(enough, density, 2.0).argmin(-1)
        device = layer.keys.device
        return Plan(layer.index, shares[chosen[layer.index]].to(device), density[chosen].to(device))

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Measures how much of its dense attention every head retains with each configuration.

        It is the mean over the last 64 queries of the texts, and the least of the query heads of a group.

        Returns:
            ``configurations``: pairs of mu and sigma (see ``distributions``), the last of which keeps everything;
            ``mass``: ``[layers][kv_heads][configurations]``; ``block``, ``recent``: what it was measured with.
        """
        probe = _Retained(cls()).read(model, texts)
        mass = torch.stack(probe.layers) / len(texts)
        mass[..., -1] = 1.0
        return {
            "block": probe.method.block,
            "recent": probe.method.recent,
            "configurations": [[round(float(v), 4) for v in pair] for pair in configurations(probe.method.block)],
            "mass": [[[round(float(v), 5) for v in head] for head in table] for table in mass],
        }


class _Retained(Probe):
    """Measures what each configuration would have left of the attention."""

    def __init__(self, method: TCAAttention) -> None:
        super().__init__()
        self.method = method

    def look(self, layer: KVLayer, call: Call) -> None:
        queries = self.method._prepare(layer, call)[0]
        rows = min(ROWS, call.query.shape[2])
        dense, own = _last_weights(layer, call, rows), layer.positions[0, 0, -rows:, None]
        shares = distributions(configurations(self.method.block), self.method.block).to(dense.device)
        table = torch.ones(layer.heads, len(shares))
        for number, share in enumerate(shares):
            plan = Plan(0, share.expand(layer.heads, -1), torch.zeros(1, layer.heads))
            stream = Stream.of(self.method, layer, call, 0, None, plan, queries)
            stream.thin()
            kept = (dense * (stream.gone[:, None, None] > own)).sum(-1)  # (kv_heads, group, rows)
            table[:, number] = kept.mean(-1).amin(-1).cpu()
        self.found[layer.index] = self.found.get(layer.index, 0) + table


def _last_weights(layer: KVLayer, call: Call, rows: int) -> torch.Tensor:
    """Dense attention of the last ``rows`` queries of the first text, ``(kv_heads, group, rows, n)``."""
    query = call.query[0, :, -rows:].float().unflatten(0, (layer.heads, -1))
    logits = capped(query @ layer.keys[0].float().transpose(1, 2)[:, None] * call.scale, call.softcap)
    own = layer.positions[0, 0, -rows:, None]
    hidden = layer.positions[0, 0] > own
    if call.window is not None:
        hidden = hidden | (layer.positions[0, 0] <= own - call.window)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)
