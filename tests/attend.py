"""One attention layer without a model: drives a recipe over given queries, keys and values, and repeats it by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from laconic import Recipe
from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.attention.rope import Rope
from laconic.cache import EMPTY, KVLayer, Request
from laconic.kernels.ragged import dense

SCALE = 0.7


def random_qkv(
    n: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0
) -> list[torch.Tensor]:
    """query (batch, heads, n, dim), keys and values (batch, kv_heads, n, dim): every token of a text of n tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, n, dim, generator=generator) for h in (heads, kv_heads, kv_heads)]


class Run:
    """A layer that reads a text in pieces; iterating yields (slice of the piece, output) after each."""

    def __init__(
        self,
        recipe: str,
        qkv: list[torch.Tensor],
        prompt: int,
        *,
        pads: tuple[int, ...] = (),
        window: int | None = None,
        softcap: float | None = None,
        rope: Rope | None = None,
        layer: int = 0,
        layers: int = 1,
        measure: bool = False,
    ) -> None:
        self.query, self.keys, self.values = qkv
        self.prompt, self.window, self.softcap = prompt, window, softcap
        self.pads = torch.tensor(pads or [0] * self.query.shape[0])
        self.policy = Policy(Recipe.parse(recipe).methods, measure=measure)
        self.layer = KVLayer(layer, layers, Request())
        self.layer.rope, self.layer.request.policy = rope, self.policy

    def piece(self, begin: int, end: int) -> torch.Tensor:
        positions = torch.arange(begin, end)[None] - self.pads[:, None]
        self.layer.request.positions = positions.masked_fill(positions < 0, EMPTY)
        self.layer.update(self.keys[:, :, begin:end], self.values[:, :, begin:end])
        return self.policy.attend(self.layer, Call(self.query[:, :, begin:end], SCALE, self.window, self.softcap))

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The prompt at once, then token by token: yields (tokens seen, output of the piece)."""
        yield self.prompt, self.piece(0, self.prompt)
        for begin in range(self.prompt, self.query.shape[2]):
            yield begin + 1, self.piece(begin, begin + 1)


def probabilities(query: torch.Tensor, keys: torch.Tensor, slots: list[int], scale: float = SCALE) -> torch.Tensor:
    """Softmax of one query (dim,) over the keys (n, dim) at ``slots``, by hand."""
    return torch.stack([query @ keys[s] * scale for s in slots]).softmax(0)


def attention(run: Run, row: int, head: int, at: int, slots: list[int]) -> torch.Tensor:
    """Output of query ``at`` of one head over ``slots`` of the whole text, by hand."""
    kv_head = head // (run.query.shape[1] // run.keys.shape[1])
    weights = probabilities(run.query[row, head, at], run.keys[row, kv_head], slots)
    return sum(w * run.values[row, kv_head, s] for w, s in zip(weights, slots, strict=True))


def top(scores: dict[int, float], k: int) -> list[int]:
    """The k best, ties to the lowest, ascending."""
    return sorted(sorted(scores, key=lambda s: (-scores[s], s))[:k])


def held(run: Run) -> list[list[list[int]]]:
    """Positions in the layer per row and head, without empty slots."""
    return [[[p for p in head if p >= 0] for head in row] for row in run.layer.positions.tolist()]


class Seen(NamedTuple):
    """One call of attention in one layer of a model: what the layer held then, new entries included, and what came out."""

    layer: KVLayer
    call: Call
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    output: torch.Tensor


def record(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """All calls of attention from now on, in order."""
    calls: list[Seen] = []
    original = Policy.attend

    def attend(self: Policy, layer: KVLayer, call: Call) -> torch.Tensor:
        before = [t.clone() for t in (dense(layer.keys), dense(layer.values), layer.positions)]
        output = original(self, layer, call)
        calls.append(Seen(layer, call, *before, output))
        return output

    monkeypatch.setattr(Policy, "attend", attend)
    return calls


def turn_by(model: Any, index: int, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """``x`` (n, head_dim) turned by ``at`` (n,) positions as layer ``index`` of a Gemma 3 does, from its configuration."""
    theta = model.config.rope_parameters[model.config.layer_types[index]]["rope_theta"]
    half = x.shape[-1] // 2
    angle = at[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
