"""FASA: a few frequency pairs of the rotary embedding rank the tokens like all dimensions do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call, ReadMethod
from laconic.attention.probe import Probe
from laconic.attention.search import Blocks, Keys, Tokens
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.profiles import layer_tables, need_file
from laconic.registry import register

TRACK = "fasa"
QUERIES = 64  # last tokens of a text whose choices are compared in calibration


@register
@dataclass(frozen=True, kw_only=True)
class FASA(ReadMethod):
    """Votes on the dominant pairs of dimensions of each KV head only, then reads the chosen tokens with all dimensions.

    A rotary embedding turns dimensions in pairs, each with its frequency. Which pairs choose the same tokens as the whole
    head is measured once per model (the profile ranks all pairs of every KV head by their contextual agreement);
    ``pairs`` of them are copied beside the cache, so that a step's choice reads 2 * ``pairs`` numbers per token. Each KV head
    chooses for itself. Nothing is forgotten, and memory grows by the copies.
    """

    id: ClassVar[str] = "fasa"
    paper: ClassVar[str] = "FASA: Frequency-aware Sparse Attention (2026)"
    needs: ClassVar[str] = "calibration"
    claims: ClassVar[tuple[Claim, ...]] = (*AttentionMethod.claims, Claim("tokenselect"), Claim("dense", "bytes_read", by=3))

    pairs: int = parameter(8, "pairs of dimensions that a choice looks at, per KV head", least=1)
    profile: str = parameter("", "a file of laconic profile fasa; empty: the one that comes with a built-in model")

    def check(self) -> None:
        need_file(self.id, self.profile)

    def observe(self, layer: KVLayer, call: Call) -> None:
        copies(layer, self.pairs, self.profile)

    @property
    def chain(self) -> list[Blocks | Tokens]:
        return [Tokens(partial(dominant_pairs, pairs=self.pairs, profile=self.profile))]

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Ranks the pairs of every layer and KV head by contextual agreement.

        The agreement of a pair is the share of the quarter of past tokens with the largest logits (256 at most) that its
        logits alone would also choose, mean over the last queries of the texts and the query heads of the group.

        Returns:
            ``ranking``: ``[layers][kv_heads][pairs]``, best first; ``agreement``: the same shape; ``rope``: the layout.
        """
        from laconic.attention.rope import LAYOUTS, find_ropes

        layout = next((rope.layout for rope in find_ropes(model) if rope is not None), LAYOUTS[0])  # one for all tables
        agreement = [table / len(texts) for table in _Agreement(layout).read(model, texts).layers]
        ranking = [table.argsort(dim=-1, descending=True, stable=True) for table in agreement]
        return {
            "rope": layout,
            "ranking": [table.tolist() for table in ranking],
            "agreement": [[[round(float(v), 4) for v in head] for head in table] for table in agreement],
        }


def dominant_pairs(layer: KVLayer, call: Call, *, pairs: int, profile: str) -> Keys:
    """Copies of the ``pairs`` dominant pairs of dimensions of every key, and the query's."""
    grouped = call.last.unflatten(1, (layer.heads, -1))
    return Keys(_few(layer, grouped, pairs, profile).flatten(1, 2), copies(layer, pairs, profile))


def copies(layer: KVLayer, pairs: int, profile: str) -> torch.Tensor:
    """The dominant pairs of all keys, ``(batch, kv_heads, n, 2 * pairs)``, kept beside the cache; adds those of new keys."""
    have = layer.tracks[TRACK].n if TRACK in layer.tracks else 0
    if have == layer.n:
        return layer.tracks[TRACK].view()
    return layer.track(TRACK, _few(layer, layer.keys[:, :, have:], pairs, profile))


def _few(layer: KVLayer, rows: torch.Tensor, pairs: int, profile: str) -> torch.Tensor:
    """The dominant dimensions of ``rows`` (batch, kv_heads, any, head_dim), contiguous."""
    tables = layer_tables(FASA.id, profile, layer)
    ranked = torch.tensor(tables["ranking"][layer.index], device=rows.device)[:, :pairs]
    dims = pair_dimensions(ranked, rows.shape[-1], tables["rope"])
    return rows.gather(3, dims[None, :, None].expand(rows.shape[0], -1, rows.shape[2], -1))


def pair_dimensions(pairs: torch.Tensor, head_dim: int, layout: str) -> torch.Tensor:
    """Dimensions ``(..., 2 * pairs)`` of ``pairs`` (..., pairs): i and i + d / 2 where halves are paired, else 2i and 2i + 1."""
    other = (pairs, pairs + head_dim // 2) if layout == "half" else (2 * pairs, 2 * pairs + 1)
    return torch.cat(other, dim=-1)


class _Agreement(Probe):
    """Compares what pairs of dimensions would choose with what all choose."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout

    def look(self, layer: KVLayer, call: Call) -> None:
        rows = min(QUERIES, call.query.shape[2] // 2)
        table = pair_agreement(call.query[0, :, -rows:], layer.keys[0], self.layout)
        self.found[layer.index] = self.found.get(layer.index, 0) + table


def pair_agreement(query: torch.Tensor, keys: torch.Tensor, layout: str) -> torch.Tensor:
    """How far each pair of dimensions alone chooses what all do (see ``FASA.calibrate``), ``(kv_heads, head_dim / 2)``, 0 to 1.

    Args:
        query: ``(heads, rows, head_dim)``, those of the last tokens; keys: ``(kv_heads, n, head_dim)``.
    """
    query, keys = query.float(), keys.float()
    group, rows, (n, dim) = query.shape[0] // keys.shape[0], query.shape[1], keys.shape[1:]
    own = torch.arange(n - rows, n, device=keys.device)[:, None]
    hidden = torch.arange(n, device=keys.device) > own
    top = max(1, min(256, (n - rows) // 4))
    table = torch.zeros(keys.shape[0], dim // 2)
    for head in range(query.shape[0]):
        mine, held = query[head], keys[head // group]
        whole = (mine @ held.T).masked_fill(hidden, float("-inf")).topk(top, dim=-1).indices
        marks = torch.zeros_like(hidden).scatter(1, whole, True)
        for pair in range(dim // 2):
            dims = pair_dimensions(torch.tensor([pair]), dim, layout)
            part = (mine[:, dims] @ held[:, dims].T).masked_fill(hidden, float("-inf")).topk(top, dim=-1).indices
            table[head // group, pair] += float(marks.gather(1, part).float().mean()) / group
    return table
