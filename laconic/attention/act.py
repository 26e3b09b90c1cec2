"""ACT: sinks in the middle of a prompt give most of their weight back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.attention.base import Call, ReweightMethod
from laconic.attention.head_search import Score, measure_answers
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.primitives.scores import attention_received
from laconic.profiles import layer_tables, need_file
from laconic.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class ACT(ReweightMethod):
    """Finds tokens that draw much attention from all over the prompt, the first one apart, and takes most of it from them.

    A sink is a token whose mean attention, over the queries that can see it, exceeds ``threshold`` / n (in layers with a
    sliding window, n is at most that window). Per KV head, up to ``most`` of them keep the share ``beta`` of their weight in
    every row; what they lose goes to all other tokens in proportion to what these have. Sinks are found in the prompt, or in
    the newest piece of one that comes in pieces, from the attention as it is, and stay those for the answer. The first and
    last layers are left as they are; a profile names the query heads that gained from it on examples, in any layer. Gains,
    where there are any, are small: measure on examples of your own. The built-in ``needle`` gains nothing, and loses where
    sinks keep no weight at all (``beta=0``). A prompt costs two to three times its dense attention.
    """

    id: ClassVar[str] = "act"
    paper: ClassVar[str] = "Unveiling and Harnessing Hidden Attention Sinks: Enhancing LLMs through Attention Calibration (2024)"

    beta: float = parameter(0.4, "share of its weight that a sink keeps; 1 changes nothing", least=0)
    threshold: float = parameter(5.0, "a sink draws more than this many times the even share 1 / n", least=1)
    most: int = parameter(8, "sinks per KV head at most", least=1)
    skip: int = parameter(2, "layers at the beginning that are left alone, and the last", least=0)
    profile: str = parameter("", "a file of laconic profile act, with the heads to change; empty: all but those of skip")

    def check(self) -> None:
        super().check()
        need_file(self.id, self.profile)
        self.require(self.beta <= 1, "beta is a share: give a number up to 1.")

    def columns(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if self.beta == 1 or not self.changed(layer, call.query.shape[1]):
            return None
        if not call.decoding:
            layer.memory[self.id] = self._sinks(layer, call)
        found = layer.memory.get(self.id)
        return None if found is None else layer.slots_of(found)

    def changed(self, layer: KVLayer, heads: int) -> list[int]:
        """The query heads of the layer that are changed."""
        if self.profile:
            tables = layer_tables(self.id, self.profile, layer)
            return [head for index, head in tables["heads"] if index == layer.index]
        spared = layer.index < self.skip or layer.index == layer.layers - 1
        return [] if spared else list(range(heads))

    def _sinks(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """True positions of the sinks, ``(batch, kv_heads, most)``, -1 where there are fewer."""
        received = attention_received(
            call.query, layer.keys, scale=call.scale, softcap=call.softcap, starts=layer.starts(), window=call.window
        )
        n, reach = layer.n, call.window or layer.n
        seers = (n - torch.arange(n, device=received.device)).clamp(max=min(call.query.shape[2], reach))
        positions = layer.positions
        mean = (received / seers).masked_fill(positions <= 0, 0.0)  # the first token is no sink, nor is padding
        best, at = mean.topk(min(self.most, n), dim=-1)
        seen = layer.lengths[:, None, None].clamp(min=1, max=reach)
        return positions.gather(2, at).masked_fill(best <= self.threshold / seen, -1).sort(dim=-1).values

    def factor(self, layer: KVLayer, mass: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """A mass s becomes beta s, the rest r becomes 1 - beta s: the odds s / r change by beta r / (1 - beta s)."""
        changed = self.beta * rest / (1 - self.beta * mass)
        changed = changed.masked_fill(rest < 1e-30, 1.0)  # nothing but sinks in sight: the row stays as it is
        mine = torch.zeros(mass.shape[1], 1, dtype=torch.bool, device=mass.device)
        mine[self.changed(layer, len(mine))] = True
        return changed.masked_fill(~mine, 1.0)

    @classmethod
    def calibrate(
        cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """Changes one head at a time, and keeps those with which the texts are answered better than without.

        See ``measure_answers`` for what counts. It takes one run of all texts per head of the model.

        Returns:
            ``heads``: pairs ``[layer, head]``, none where all together do not help; ``before`` and ``after``: the score
            without and with them.
        """
        config = model.config.get_text_config()

        def score(chosen: Sequence[tuple[int, int]]) -> Score:
            return measure_answers(model, _Chosen.of(chosen), texts, answers)

        before = score([])
        every = [(i, head) for i in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]
        heads = [at for at in every if score([at]) > before]
        after = score(heads) if heads else before
        return {"heads": heads if after > before else [], "before": before, "after": max(before, after)}


class _Chosen(ACT):
    """Changes given heads while they are searched."""

    chosen: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, heads: Sequence[tuple[int, int]]) -> _Chosen:
        method = cls()
        object.__setattr__(method, "chosen", heads)
        return method

    def changed(self, layer: KVLayer, heads: int) -> list[int]:
        return [head for index, head in self.chosen if index == layer.index]
