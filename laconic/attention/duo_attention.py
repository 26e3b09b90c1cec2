"""DuoAttention: learned gates tell the heads that need the whole text from those that live on its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.attention.prefill import prefill_attention, sparse_prefill_attention
from laconic.attention.retrieval_heads import RetrievalHeads, calibrated, ranked
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.profiles import frozen, layer_tables
from laconic.registry import register

STEPS, RATE, COST = 60, 0.05, 0.05  # of learning the gates: steps, learning rate, and what an open gate costs
SINKS, RECENT = 4, 64  # what closed gates see while gates are learned
ROWS = 128  # query rows that share what a closed gate sees
LAST = 32  # last tokens of a text without an answer whose hidden states are to stay


@register
@dataclass(frozen=True, kw_only=True)
class DuoAttention(RetrievalHeads):
    """As many heads as the budget allows keep every token, the others their first and newest ones.

    A gate per KV head mixes full attention with attention to the ends of the text. The gates are learned once per model so that
    the hidden states of the answers stay what they are, at a price for every open gate; the heads are ranked by them. With the
    budget that is left, heads that do not retrieve keep more than ``recent`` tokens. Prompts are prefilled densely.
    """

    id: ClassVar[str] = "duo_attention"
    paper: ClassVar[str] = "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024)"
    claims: ClassVar[tuple[Claim, ...]] = (*RetrievalHeads.claims, Claim("razor_attention", budget="25%"))

    heads: float = parameter(1.0, "share of the model's KV heads that keep everything at most, whatever the budget", least=0)

    def check(self) -> None:
        super().check()
        self.require(self.heads <= 1, "heads is a share: give a number up to 1.")

    def retrieval(self, layer: KVLayer, most: torch.Tensor) -> torch.Tensor:
        places = ranked(layer_tables(self.id, self.profile, layer)["gates"]).to(most.device)
        return places < most.clamp(max=int(self.heads * places.numel()))[:, None, None]

    @classmethod
    def calibrate(
        cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """Learns a gate between 0 and 1 for every KV head, from 1 on, by gradient descent; the model stays as it is.

        Returns:
            ``gates``: ``[layers][kv_heads]``.
        """
        from laconic.hooks import apply

        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        gates = torch.ones(config.num_hidden_layers, heads, device=model.device, requires_grad=True)
        optimizer = torch.optim.Adam([gates], lr=RATE)
        with frozen(model), apply(model, "dense") as handle:
            for step in range(STEPS):
                at = step % len(texts)
                ids, last = texts[at], LAST
                if answers is not None:
                    ids, last = torch.cat([ids, answers[at]]), len(answers[at]) + 1
                loss = _distance(model, handle, ids.to(model.device), last, gates) + COST * gates.abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    gates.clamp_(0, 1)
        return {"gates": calibrated(list(gates.detach().cpu()))}


def _distance(
    model: torch.nn.Module, handle: Any, ids: torch.Tensor, last: int, gates: torch.Tensor
) -> torch.Tensor:
    """How far the gates move the hidden states of the ``last`` tokens, relative to their size."""

    def hidden(policy: Policy) -> torch.Tensor:
        cache = handle.cache()
        cache.request.policy = policy
        return model.base_model(ids[None], past_key_values=cache, use_cache=True).last_hidden_state[0, -last:].float()

    with torch.no_grad():
        aim = hidden(handle.policy)
    return (hidden(_Gated(gates)) - aim).square().mean() / aim.square().mean()


class _Gated(Policy):
    """Attention that is mixed, head by head, from the whole text and from its ends."""

    def __init__(self, gates: torch.Tensor) -> None:
        from laconic.recipe import Recipe

        super().__init__(Recipe.parse("dense").methods)
        self.gates = gates

    def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        entries = (call.query, layer.keys, layer.values, layer.shared_positions)
        options = {"scale": call.scale, "window": call.window, "softcap": call.softcap}
        whole = prefill_attention(*entries, **options)
        if call.window is not None:
            return whole
        ends, _ = sparse_prefill_attention(*entries, _ends(layer.n, call.query.device), **options)
        gate = self.gates[layer.index].repeat_interleave(whole.shape[1] // layer.heads)[:, None, None]
        return (gate * whole + (1 - gate) * ends).to(whole.dtype)


def _ends(n: int, device: torch.device) -> list[tuple[int, int, torch.Tensor]]:
    """Blocks of rows of a text of ``n`` tokens and what they see: its first tokens, and theirs with those before them."""
    blocks = []
    for begin in range(0, n, ROWS):
        end = min(begin + ROWS, n)
        first = torch.arange(min(SINKS, end), device=device)
        near = torch.arange(max(len(first), begin - RECENT), end, device=device)
        blocks.append((begin, end, torch.cat([first, near])[None, None]))
    return blocks
