"""RazorAttention: heads that look far keep everything; for the others, one entry stands for all that they drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.attention.base import Call
from laconic.attention.probe import Probe
from laconic.attention.retrieval_heads import RetrievalHeads, calibrated, ranked
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.scores import capped
from laconic.profiles import layer_tables
from laconic.registry import register

TOKENS, COPIES = 2500, 4  # random tokens and how often they are repeated
ROWS = 256  # rows of the attention map that calibration looks at together


@register
@dataclass(frozen=True, kw_only=True)
class RazorAttention(RetrievalHeads):
    """Retrieval heads keep every token, the other heads their first and newest ones and a mean of what they drop.

    Which heads retrieve is measured once per model, on random tokens that are repeated: an induction head looks at the token
    after the earlier copy of its own, an echo head at the copy itself. In every other head one entry stands for the dropped
    tokens: their mean key and mean value, with the logarithm of their number added to its logit. No attention map is needed
    afterwards. The budget is that of all heads together; the original gives the other heads max(4000, n / 5) tokens, which with
    15 % of retrieval heads is a budget of 32 % for long texts.
    """

    id: ClassVar[str] = "razor_attention"
    paper: ClassVar[str] = "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (2024)"
    compensates: ClassVar[bool] = True
    claims: ClassVar[tuple[Claim, ...]] = (*RetrievalHeads.claims, Claim("dense", "bytes_kept", by=3, budget="30%"))

    induction: float = parameter(0.14, "share of the model's KV heads that retrieve, the best by induction score", least=0)
    echo: float = parameter(0.01, "share of the model's KV heads that retrieve, the best by echo score", least=0)

    def check(self) -> None:
        super().check()
        self.require(max(self.induction, self.echo) <= 1, "induction and echo are shares of the heads: give numbers up to 1.")

    def retrieval(self, layer: KVLayer, most: torch.Tensor) -> torch.Tensor:
        tables = layer_tables(self.id, self.profile, layer)
        chosen = best_heads(tables["induction"], self.induction) | best_heads(tables["echo"], self.echo)
        return chosen.to(most.device).expand(len(most), -1, -1)

    def forget(self, layer: KVLayer, first: torch.Tensor, counts: torch.Tensor) -> None:
        ahead = torch.arange(int(counts.max()), device=first.device)
        layer.fold(torch.where(ahead < counts[..., None], first[..., None] + ahead, -1))

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], seed: int = 0) -> dict[str, Any]:
        """Scores every KV head by the attention that repeated random tokens pay to their earlier copies. The texts only say
        which tokens there are.

        Returns:
            ``induction``, ``echo``: ``[layers][kv_heads]``: the mean probability of the token after an earlier copy, and of the
            copy, of the query head in the group that has the most.
        """
        config = model.config.get_text_config()
        count = min(TOKENS, (config.max_position_embeddings - 1) // COPIES)
        known = torch.cat(list(texts)).unique()
        generator = torch.Generator().manual_seed(seed)
        part = known[torch.randint(len(known), (count,), generator=generator)]
        ids = torch.cat([texts[0][:1], part.repeat(COPIES)])
        found = _Copies(count).read(model, [ids]).layers
        return {"induction": calibrated([f[0] for f in found]), "echo": calibrated([f[1] for f in found])}


def best_heads(scores: list[list[float]], share: float) -> torch.Tensor:
    """Boolean ``(layers, kv_heads)``: the best ``share`` of all heads of the model, ties to the lowest."""
    places = ranked(scores)
    return places < round(share * places.numel())


class _Copies(Probe):
    """Measures what a text of equal parts of ``count`` tokens, after one first token, pays to copies."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def look(self, layer: KVLayer, call: Call) -> None:
        query, keys = call.query[0].float() * call.scale, layer.keys[0].float()
        group = query.shape[0] // keys.shape[0]
        scores = torch.stack([copy_scores(q, keys[h // group], self.count, call.softcap) for h, q in enumerate(query)])
        self.found[layer.index] = scores.view(keys.shape[0], group, 2).amax(1).T


def copy_scores(query: torch.Tensor, keys: torch.Tensor, count: int, softcap: float | None = None) -> torch.Tensor:
    """Mean probability (2,) of the token after an earlier copy of a row's token, and of the copy, over all rows and copies.

    Args:
        query, keys: ``(n, head_dim)`` of one head, the queries scaled; one first token, then equal parts of ``count`` tokens.
    """
    n, total, pairs = len(keys), torch.zeros(2), 0
    for begin in range(1 + count, n, ROWS):
        rows = torch.arange(begin, min(begin + ROWS, n))
        logits = capped(query[rows] @ keys[: int(rows[-1]) + 1].T, softcap)
        later = torch.arange(logits.shape[1]) > rows[:, None]
        weights = logits.masked_fill(later, float("-inf")).softmax(-1)
        for distance in range(count, n, count):
            copies = rows[rows - distance >= 1] - distance
            own = copies + distance - begin
            total += torch.stack([weights[own, copies + 1].sum(), weights[own, copies].sum()])
            pairs += len(copies)
    return total / max(pairs, 1)
