"""DHSA: the prompt is cut where the attention changes, and each block of queries reads the tokens of the best stretches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic import kernels
from laconic.attention.base import Call, PrefillMethod
from laconic.attention.boundaries import BoundaryPredictor, border_labels, choose_borders, train_predictor
from laconic.attention.prefill import sparse_prefill_attention
from laconic.attention.probe import Probe
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.profiles import layer_tables, need_file, weights_to_json
from laconic.registry import register

BORDERS, REDUCE = ("predicted", "fixed"), ("sum", "mean")


@register
@dataclass(frozen=True, kw_only=True)
class DHSA(PrefillMethod):
    """Prompts: each block of queries attends to its budget of tokens, those of the stretches that fit it best.

    A small network, trained once per model (the profile), says from the keys where the text changes; stretches of different
    lengths lie between. A stretch, and a block of queries, is represented by its mean times the square root of its length; their
    product ranks the stretches, and tokens are taken from the best on until the budget is used. The first tokens, and the last
    before the end of the block, are always read; the last ``instruction`` queries read everything. One set serves all heads, the
    stretches are found in the first layer for all. The cache and the steps stay as they are; prompts in pieces are attended to in
    full.
    """

    id: ClassVar[str] = "dhsa"
    paper: ClassVar[str] = "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs (2025)"
    needs: ClassVar[str] = "training"
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim("dense", by=-0.05, budget="25%"), Claim("dense", "pairs", by=2, budget="25%"),
        Claim("dhsa(borders=fixed):25%", "kl", budget="25%"),
    )  # fmt: skip

    block: int = parameter(64, "queries that share what they read", least=1)
    first: int = parameter(128, "first tokens that every block reads", least=0)
    local: int = parameter(128, "last tokens before the end of a block that it reads; no less than a block", least=1)
    instruction: int = parameter(64, "last queries of the prompt, which read everything", least=0)
    borders: str = parameter("predicted", "where stretches end: predicted by the profile's network, or fixed: all of one length")
    length: int = parameter(32, "tokens per stretch with borders=fixed", least=1)
    threshold: float = parameter(0.0, "logit above which the network's borders count")
    apart: int = parameter(8, "tokens within which there is no second border", least=0)
    density: int = parameter(8, "most borders per block of queries", least=1)
    reduce: str = parameter("sum", "products are summed over heads; or mean: heads are averaged before, as published")
    profile: str = parameter("", "a file of laconic profile dhsa; empty: the one that comes with a built-in model")

    def check(self) -> None:
        need_file(self.id, self.profile)
        self.require(self.borders in BORDERS, f"borders must be one of {', '.join(BORDERS)}.")
        self.require(self.reduce in REDUCE, f"reduce must be one of {', '.join(REDUCE)}.")
        self.require(self.local >= self.block, f"local={self.local} hides its own key from queries of a block of {self.block}.")

    def attend_prompt(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, float] | None:
        if call.window is not None or layer.n != call.query.shape[2] or self.covers(layer, call):
            return None
        output, shares = torch.zeros_like(call.query), []
        starts = layer.starts()
        for row, quota in enumerate(self.quota(layer, call).tolist()):
            pad = 0 if starts is None else int(starts[row, 0])
            if pad == layer.n:
                continue
            query, keys, values = (t[row : row + 1, :, pad:] for t in (call.query, layer.keys, layer.values))
            borders = self._borders(layer, keys[0], row)
            blocks = self.blocks(query[0], keys[0], borders, quota)
            at = torch.arange(layer.n - pad, device=keys.device)[None, None]
            part, share = sparse_prefill_attention(query, keys, values, at, blocks, scale=call.scale, softcap=call.softcap)
            output[row : row + 1, :, pad:] = part
            shares.append(share)
        return output, sum(shares) / max(len(shares), 1)

    def blocks(
        self, query: torch.Tensor, keys: torch.Tensor, borders: torch.Tensor, quota: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """What each block of queries reads: its first row, the row after its last, and the slots ``(1, 1, k)``.

        Args:
            query: ``(heads, n, head_dim)``; keys: ``(kv_heads, n, head_dim)``; borders: from 0 to n; quota: tokens per block.
        """
        n = keys.shape[1]
        whole = max(0, n - self.instruction)
        lengths = borders.diff()
        queries = _pooled(_side_by_side(query, keys.shape[0], self.reduce), _ends(whole, self.block).to(keys.device))
        worth = queries @ _pooled(_side_by_side(keys, keys.shape[0], self.reduce), borders).T  # (blocks, stretches)
        for number, begin in enumerate(range(0, whole, self.block)):
            end = min(begin + self.block, whole)
            if end <= quota:
                chosen = torch.arange(end, device=keys.device)
            else:
                scores = worth[number].repeat_interleave(lengths)[:end].clone()
                scores[: self.first] = scores[max(0, end - self.local) :] = float("inf")
                fixed = min(end, self.first + self.local)
                self.require(quota >= fixed, f"a budget of {quota} tokens cannot hold {fixed}: lower first and local.")
                chosen = kernels.topk(scores[None, None], quota)[0, 0]
            yield begin, end, chosen[None, None]
        if whole < n:
            yield whole, n, torch.arange(n, device=keys.device)[None, None]

    def _borders(self, layer: KVLayer, keys: torch.Tensor, row: int) -> torch.Tensor:
        """Borders of a row's stretches, the same in all layers."""
        memory, name, n = layer.request.memory, f"{self.id}.borders", keys.shape[1]
        if self.borders == "fixed":
            return _ends(n, self.length).to(keys.device)
        if layer.index == 0 or row not in memory.get(name, {}):
            predictor = BoundaryPredictor.of(layer_tables(self.id, self.profile, layer)["weights"]).to(keys.device)
            logits = predictor(keys.transpose(0, 1).flatten(1).float())
            most = max(1, n // self.block * self.density)
            found = choose_borders(logits.cpu(), self.threshold, self.apart, most, n - self.instruction)
            memory[name] = {**memory.get(name, {}), row: found.to(keys.device)}
        return memory[name][row]

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], seed: int = 0) -> dict[str, Any]:
        """Trains the network that finds borders, on the keys and the attention of all layers.

        Returns:
            ``weights``: those of a ``BoundaryPredictor``; on these texts, ``borders``: the share of places that are borders,
            ``found``: the share of these that it finds, and ``right``: the share of what it finds that is one.
        """
        layers = _Labels().read(model, texts).layers
        examples = [example for text in zip(*layers, strict=True) for example in text]
        predictor = train_predictor(examples, seed)
        pairs = [(predictor(keys) > 0, labels) for keys, labels in examples]
        said = torch.cat([guess[~labels.isnan()] for guess, labels in pairs])
        true = torch.cat([labels[~labels.isnan()] > 0 for _, labels in pairs])
        both = float((said & true).sum())
        return {
            "weights": weights_to_json(predictor),
            "borders": round(float(true.float().mean()), 4),
            "found": round(both / max(float(true.sum()), 1), 4),
            "right": round(both / max(float(said.sum()), 1), 4),
        }


class _Labels(Probe):
    """Collects the keys of every layer and where the attention to them changes, a pair for each text."""

    def look(self, layer: KVLayer, call: Call) -> None:
        if call.window is None:
            labels = border_labels(call.query[0].cpu(), layer.keys[0].cpu(), call.scale, call.softcap)
            keys = layer.keys[0].transpose(0, 1).flatten(1).float().cpu()
            self.found.setdefault(layer.index, []).append((keys, labels))


def _ends(n: int, size: int) -> torch.Tensor:
    """0, size, 2 * size ... n."""
    return torch.tensor([*range(0, n, size), n])


def _side_by_side(x: torch.Tensor, kv_heads: int, reduce: str) -> torch.Tensor:
    """(heads, n, d) to (n, kv_heads * d), means over each group, so that a product sums over heads; or to (n, d), their mean."""
    if reduce == "mean":
        return x.float().mean(0)
    return x.float().unflatten(0, (kv_heads, -1)).mean(1).transpose(0, 1).flatten(1)


def _pooled(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Mean of x (n, d) times the square root of the length, for each stretch between neighbouring ``ends``: (stretches, d)."""
    sums = torch.cat([x.new_zeros(1, x.shape[1], dtype=torch.float64), x.double().cumsum(0)])[ends].diff(dim=0)
    return (sums / ends.diff().sqrt()[:, None]).float()
