"""Which heads sleep on a sink token: sink weight, drained values and residual peaks, without an attention map.

Source: Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs (2024). A head that has
nothing to do puts its weight on one token, mostly the first, whose value it keeps small: it is *dormant*. On other texts
the same head may be *active*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from laconic import kernels
from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.attention.probe import Probe
from laconic.cache import KVLayer
from laconic.errors import LaconicError
from laconic.hooks import apply
from laconic.primitives.scores import capped
from laconic.recipe import Recipe

DORMANT = 0.5  # mean weight on the sink from which a head counts as dormant; below half of it, as active
INTERVENTIONS = ("zero", "sink")
STYLES = {"dormant": "reverse", "mixed": "bold", "active": "dim"}


@dataclass(frozen=True)
class SinkReport:
    """What ``sink_report`` measured.

    Attributes:
        sink: position of the sink token: where, in the first half, the mean attention over layers and heads is largest.
        weight: ``(layers, heads)``: mean probability that later queries give to the sink.
        value_ratio: ``(layers, heads)``: length of the sink's value over the median length; heads of a group share it.
        residual_ratio: ``(layers + 1,)``: length of the sink's hidden state over the median, before layer 0 and after each.
    """

    sink: int
    weight: torch.Tensor
    value_ratio: torch.Tensor
    residual_ratio: torch.Tensor

    def rows(self) -> list[dict[str, Any]]:
        """One dict per head, for tables and JSON."""
        layers, heads = self.weight.shape
        return [
            {
                "layer": layer,
                "head": head,
                "weight": float(self.weight[layer, head]),
                "value_ratio": float(self.value_ratio[layer, head]),
                "state": state(float(self.weight[layer, head])),
            }
            for layer in range(layers)
            for head in range(heads)
        ]


def state(weight: float, cutoff: float = DORMANT) -> str:
    """dormant, active or mixed, by the mean weight on the sink."""
    return "dormant" if weight >= cutoff else "active" if weight < cutoff / 2 else "mixed"


def sink_report(model: torch.nn.Module, texts: Sequence[torch.Tensor]) -> SinkReport:
    """Measures sinks on token ids, one 1-D tensor per text (at least 8 tokens each).

    The attention that each token receives comes from streaming column sums, so long texts fit.
    """
    if not texts or min(len(ids) for ids in texts) < 8:
        raise LaconicError("Sinks are measured on one or more texts of at least 8 tokens each.")
    shortest = min(len(ids) for ids in texts)
    received, values, residual = [], [], []
    for ids in texts:
        probe = _Received(shortest)
        with apply(model, "dense") as handle, torch.no_grad():
            handle.policy = probe
            output = model(ids[None].to(model.device), output_hidden_states=True, use_cache=True)
        received.append(torch.stack([got for got, _ in probe.layers]))
        values.append(torch.stack([length for _, length in probe.layers]))
        norms = torch.stack([hidden[0, :shortest].float().norm(dim=-1) for hidden in output.hidden_states])
        residual.append(norms)
    mean = torch.stack(received).mean(0)  # (layers, heads, shortest)
    sink = int(mean[..., : shortest // 2].mean((0, 1)).argmax())  # the last tokens have too few queries after them
    lengths, norms = torch.stack(values).mean(0), torch.stack(residual).mean(0)
    return SinkReport(
        sink=sink,
        weight=mean[..., sink],
        value_ratio=lengths[..., sink] / lengths.median(-1).values.clamp(min=1e-12),
        residual_ratio=norms[:, sink] / norms.median(-1).values.clamp(min=1e-12),
    )


class _Received(Probe):
    """Notes, per layer, what the first tokens receive and how long their values are."""

    def __init__(self, sinks: int) -> None:
        super().__init__()
        self.sinks = sinks

    def look(self, layer: KVLayer, call: Call) -> None:
        n, heads = layer.n, call.query.shape[1]
        sums = kernels.column_sums(
            call.query, layer.keys, scale=call.scale, starts=layer.starts(), window=call.window, softcap=call.softcap
        )[0]
        later = (n - torch.arange(n, device=sums.device) - 1).clamp(min=1)
        own = _own_weight(call, layer)  # a token's attention to itself says nothing about sinks
        received = ((sums - own)[:, : self.sinks] / later[: self.sinks]).cpu()
        lengths = layer.values[0, :, : self.sinks].float().norm(dim=-1)
        self.found[layer.index] = received, lengths.repeat_interleave(heads // lengths.shape[0], 0).cpu()


def _own_weight(call: Call, layer: KVLayer) -> torch.Tensor:
    """Probability that each query gives to its own token, ``(heads, n)``, from running sums of the rest: blockwise."""
    query, keys = call.query[0].float(), layer.keys[0].float()
    keys = keys.repeat_interleave(query.shape[0] // keys.shape[0], 0)
    n, own = query.shape[1], []
    slot = torch.arange(n, device=query.device)
    for begin in range(0, n, 128):
        rows = slot[begin : begin + 128]
        logits = capped(query[:, rows] @ keys[:, : int(rows[-1]) + 1].transpose(1, 2) * call.scale, call.softcap)
        hidden = slot[None, : logits.shape[-1]] > rows[:, None]
        if call.window is not None:
            hidden |= slot[None, : logits.shape[-1]] <= rows[:, None] - call.window
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        own.append(weights.gather(-1, rows[None, :, None].expand(query.shape[0], -1, 1))[..., 0])
    return torch.cat(own, 1)


def active_dormant_map(
    model: torch.nn.Module, domains: dict[str, Sequence[torch.Tensor]], cutoff: float = DORMANT
) -> list[dict[str, Any]]:
    """State of every head on each domain; heads whose state differs between domains come first.

    Args:
        domains: texts as token ids by domain, such as ``{"code": [...], "prose": [...]}``.

    Returns:
        One dict per head: layer, head, ``weights`` and ``states`` by domain, and ``spread``, the largest difference.
    """
    reports = {name: sink_report(model, texts) for name, texts in domains.items()}
    layers, heads = next(iter(reports.values())).weight.shape
    rows = []
    for layer in range(layers):
        for head in range(heads):
            weights = {name: float(report.weight[layer, head]) for name, report in reports.items()}
            states = {name: state(weight, cutoff) for name, weight in weights.items()}
            spread = max(weights.values()) - min(weights.values())
            rows.append({"layer": layer, "head": head, "weights": weights, "states": states, "spread": spread})
    return sorted(rows, key=lambda row: (len(set(row["states"].values())) == 1, -row["spread"]))


@contextmanager
def intervene(model: torch.nn.Module, heads: Sequence[tuple[int, int]], what: str = "zero", sink: int = 0) -> Iterator[None]:
    """Inside the block, query heads ``(layer, head)`` give nothing (``zero``) or put all weight on the sink (``sink``).

    How much worse the model gets tells what these heads are for.
    """
    if what not in INTERVENTIONS:
        raise LaconicError(f"There is no intervention '{what}': use {' or '.join(INTERVENTIONS)}.")
    with apply(model, "dense") as handle:
        handle.policy = _Intervention(heads, what, sink)
        yield


class _Intervention(Policy):
    def __init__(self, heads: Sequence[tuple[int, int]], what: str, sink: int) -> None:
        super().__init__(Recipe.parse("dense").methods)
        self.heads, self.what, self.sink = heads, what, sink

    def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        output = super().attend(layer, call)
        group = call.query.shape[1] // layer.heads
        for index, head in self.heads:
            if index == layer.index:
                value = layer.values[:, head // group, self.sink, None] if self.what == "sink" else 0.0
                output[:, head] = value
        return output


def head_uses(model: torch.nn.Module, texts: Sequence[torch.Tensor], what: str = "zero") -> torch.Tensor:
    """How much the mean loss rises when each head alone is taken out, ``(layers, heads)``."""
    layers, heads = model.config.get_text_config().num_hidden_layers, model.config.get_text_config().num_attention_heads
    base = _loss(model, texts)
    uses = torch.zeros(layers, heads)
    for layer in range(layers):
        for head in range(heads):
            with intervene(model, [(layer, head)], what):
                uses[layer, head] = _loss(model, texts) - base
    return uses


def _loss(model: torch.nn.Module, texts: Sequence[torch.Tensor]) -> float:
    """Mean next-token loss per token."""
    total = count = 0.0
    with torch.no_grad():
        for ids in texts:
            logits = model(ids[None].to(model.device), use_cache=True).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:].to(logits.device), reduction="sum"))
            count += len(ids) - 1
    return total / count


def summary(report: SinkReport) -> str:
    """What the report says, in one sentence."""
    dormant = sum(row["state"] == "dormant" for row in report.rows())
    if not dormant:
        return (
            f"No head gives one token half of its attention (the most is {float(report.weight.max()):.2f}, on position "
            f"{report.sink}): there is no sink to protect or to tune."
        )
    return (
        f"{dormant} of {report.weight.numel()} heads are dormant on the token at position {report.sink}: let what evicts "
        f"always keep it (sinks={report.sink + 1} or more)."
    )


def sink_table(report: SinkReport) -> Any:
    """A rich table: a line per layer, a cell per head with the weight on the sink and the value ratio in parentheses."""
    from rich.table import Table

    table = Table(box=None)
    for heading in ("layer", *(f"head {h}" for h in range(report.weight.shape[1])), "residual"):
        table.add_column(heading, justify="right")
    for layer, (weights, ratios) in enumerate(zip(report.weight.tolist(), report.value_ratio.tolist(), strict=True)):
        cells = [f"[{STYLES[state(w)]}]{w:.2f} ({r:.1f})[/]" for w, r in zip(weights, ratios, strict=True)]
        table.add_row(str(layer), *cells, f"{float(report.residual_ratio[layer + 1]):.1f}")
    return table


def map_table(rows: Sequence[dict[str, Any]]) -> Any:
    """A rich table of ``active_dormant_map``: a line per head, with its weight on the sink in each domain."""
    from rich.table import Table

    table = Table(box=None)
    for heading in ("layer", "head", *rows[0]["weights"], "spread"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"[{STYLES[row['states'][name]]}]{w:.2f} {row['states'][name]}[/]" for name, w in row["weights"].items()]
        table.add_row(str(row["layer"]), str(row["head"]), *cells, f"{row['spread']:.2f}")
    return table
