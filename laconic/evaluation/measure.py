"""One cell of a comparison: a method at a budget on the examples of a task, measured against the dense model.

Every example runs the same way. The prompt is prefilled in one forward, as ``generate`` does it (with ``question="after"``
only the context, and the rest of the prompt comes token by token); every further token is a decode step of one token.
Decode steps are *forced* along the dense model's continuation, so that the distributions of both can be compared
step by step. As long as a method's most likely token is the forced one, its own greedy text is the same; at the first
difference its own text goes on from a fork of the cache.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.evaluation import metrics
from laconic.evaluation.blocks import along
from laconic.evaluation.memory import PeakMemory
from laconic.models.reading import read, text_side

# Above this, the dense log-probabilities that all cells are compared with are held in half precision.
REFERENCE_BYTES = 1 << 30
# Steps whose distributions are compared at a time: long texts of large vocabularies would need many copies.
STEPS = 256


@dataclass
class Item:
    """An example made ready: token ids, how many of them are prefilled, and what the dense model did with it."""

    example: Any
    ids: list[int]
    prefill: int
    limit: int
    forced: list[int] | None = None  # the text itself (perplexity), else the dense greedy continuation once known
    dense: torch.Tensor | None = None  # (T, V) log-probabilities of the dense model along ``forced``
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # what goes with the prefill beside its ids: pictures

    @property
    def cost(self) -> int:
        """Tokens that a run of this item goes through: the unit of the progress bar."""
        return len(self.ids) + self.limit


@dataclass
class Trace:
    """What one run of one item gave."""

    logits: list[torch.Tensor]  # one (V,) float32 per forced token
    forced: list[int]
    own: list[int]  # the method's own greedy tokens
    prefill_s: float
    pairs: float | None = None  # share of the prefill's pairs of query and key that was computed
    steps_s: list[float] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)  # the cache's figures, per forced step
    masses: list[float | None] = field(default_factory=list)  # attention mass not read or evicted, per forced step

    agrees: list[bool] = field(default_factory=list)  # filled by judge: same most likely token as dense, per forced token
    kls: list[float] = field(default_factory=list)  # filled by judge: divergence from dense in nats, per forced token

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probabilities (T, V) along the forced tokens."""
        return torch.cat(list(self.stretches()))

    def stretches(self) -> Iterator[torch.Tensor]:
        """The log-probabilities in pieces of at most ``STEPS`` tokens."""
        for begin in range(0, len(self.logits), STEPS):
            log_probs = torch.stack(self.logits[begin : begin + STEPS]).log_softmax(-1)
            if bool(torch.isnan(log_probs).any()):
                raise LaconicError(
                    "The model's logits are not numbers (NaN): load it in float32, or leave this method out."
                )
            yield log_probs


class Runner:
    """Runs items through a model. ``stop`` are the ids that end a text; ``tokenizer`` turns own tokens into text."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, text_side(tokenizer)
        self.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.stop = stop_ids(model, self.tokenizer)
        config: Any = model.config
        self.layers: int = config.get_text_config().num_hidden_layers

    def forward(
        self, tokens: Sequence[int], cache: Any, inputs: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, Any, float]:
        """Logits (V,) float32 after ``tokens``, the cache, and the seconds it took."""
        ids = torch.tensor([list(tokens)], device=self.device)
        extra = {name: value.to(self.device) for name, value in (inputs or {}).items()} | self._extra
        self._wait()
        start = time.perf_counter()
        out = self.model(input_ids=ids, use_cache=True, **{self._cache_name: cache}, **extra)
        self._wait()
        seconds = time.perf_counter() - start
        cache = out.get("cache") if out.get("cache") is not None else out.get("past_key_values")
        return out.logits[0, -1].float(), cache, seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def run(self, item: Item, handle: Any = None, *, lean: bool = False) -> Trace:
        """Prefill, then decode along ``item.forced``, or along the model's own choice where that is not known yet.

        Where the method's own greedy choice leaves the forced tokens, its own text goes on from a fork of the cache. A
        ``lean`` run makes no copy of the cache and keeps no distributions, which are no memory of the method.
        """
        logits, cache, steps, prefill_s, pairs = self._prompt(item, handle)
        trace = Trace([], [], [], prefill_s, pairs, steps)
        branch, pick = None, self._picker(item)
        cut = (handle.stats()["dropped_mass"] or 0.0) if handle is not None else 0.0  # what evicting the prompt took
        while True:
            if not lean:
                trace.logits.append(logits)
            choice = int(logits.argmax())
            token = pick(logits) if item.forced is None else item.forced[len(trace.forced)]
            if choice != token and not trace.own and item.example.answer is not None:
                trace.own, branch = [*trace.forced, choice], None if lean else fork_cache(cache)
            trace.forced.append(token)
            if len(trace.forced) == (item.limit if item.forced is None else len(item.forced)):
                break
            if item.forced is None and token in self.stop:
                break
            logits, cache, seconds = self.forward([token], cache)
            steps.append(seconds)
            if handle is not None:
                trace.stats.append(handle.stats())
                mass = trace.stats[-1]["dropped_mass"]
                trace.masses.append(None if mass is None else max(mass, cut))
        if handle is not None and not trace.stats:  # an answer of one token has no decode step of its own
            trace.stats.append(handle.stats())
        if branch is not None:
            self._continue(trace.own, branch, item.limit)
        trace.own = trace.own or trace.forced
        return trace

    def _picker(self, item: Item) -> Callable[[torch.Tensor], int]:
        """How the dense text goes on: the likeliest token, or one that is drawn, which is never the end."""
        if item.example.draw is None:
            return lambda logits: int(logits.argmax())
        # on the CPU, so that the same seed draws the same text on every device
        generator, stop = torch.Generator().manual_seed(item.example.draw), sorted(self.stop)

        def draw(logits: torch.Tensor) -> int:
            shares = logits.softmax(-1).cpu()
            shares[stop] = 0.0
            return int(torch.multinomial(shares, 1, generator=generator))

        return draw

    def _prompt(self, item: Item, handle: Any) -> tuple[torch.Tensor, Any, list[float], float, float | None]:
        """The prompt: logits after it, the cache, seconds per decode step in it, seconds and share of pairs of the prefill."""
        logits, cache, steps, prefill_s, pairs = None, None, [], 0.0, None
        if item.prefill:
            logits, cache, prefill_s = self.forward(item.ids[: item.prefill], None, item.inputs)
            pairs = handle.stats()["pairs"] if handle is not None else None
        for token in item.ids[item.prefill :]:
            logits, cache, seconds = self.forward([token], cache)
            steps.append(seconds)
        return logits, cache, steps, prefill_s, pairs

    def _continue(self, own: list[int], cache: Any, limit: int) -> None:
        """Adds the method's own greedy text; ``own`` ends with a token that is not fed yet."""
        while len(own) < limit and own[-1] not in self.stop:
            logits, cache, _ = self.forward([own[-1]], cache)
            own.append(int(logits.argmax()))

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without the end mark."""
        return self.tokenizer.decode([t for t in tokens if t not in self.stop], skip_special_tokens=True)


def fork_cache(cache: Any) -> Any:
    """A copy that can go its own way: the cache's own ``fork`` where it has one, a deep copy otherwise."""
    return cache.fork() if hasattr(cache, "fork") else copy.deepcopy(cache)


def stop_ids(model: torch.nn.Module, tokenizer: Any) -> set[int]:
    """Ids that end a text, by the generation config and the tokenizer."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = set(found if isinstance(found, (list, tuple)) else [] if found is None else [found])
    if getattr(tokenizer, "eos_token_id", None) is not None:
        ids.add(tokenizer.eos_token_id)
    return {int(i) for i in ids}


def prepare(
    examples: Sequence[Any],
    tokenizer: Any,
    *,
    perplexity: bool = False,
    question: str = "seen",
    max_new_tokens: int | None = None,
) -> list[Item]:
    """Examples as items. ``question="seen"`` prefills the whole prompt, as ``generate`` does; with ``"after"`` only the context
    is prefilled and the question comes token by token."""
    items = []
    for number, example in enumerate(examples, 1):
        inputs = read(tokenizer, example.prompt, example.pictures)
        ids = inputs.pop("input_ids")[0].tolist()
        if len(ids) < (4 if perplexity else 1):
            raise LaconicError(f"Example {number} has {len(ids)} tokens, too few to run: give it a longer prompt.")
        limit = max_new_tokens or example.max_new_tokens
        if perplexity:
            half = len(ids) // 2
            forced = ids[half : half + limit]
            items.append(Item(example, ids[:half], half - 1, len(forced), forced))
            continue
        prefill = len(ids)
        if question == "after" and example.question:
            context = read(tokenizer, example.prompt[: -len(example.question)], example.pictures)["input_ids"][0].tolist()
            prefill = min(prefill, _common_prefix(context, ids))
        inputs = {name: v[:, :prefill] if v.shape == (1, len(ids)) else v for name, v in inputs.items()}
        items.append(Item(example, ids, prefill, limit, inputs=inputs))
    return items


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning: where a tokenizer joins context and question, the joined token is decoded."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def keep_reference(item: Item, trace: Trace, items: int) -> None:
    """Stores the dense run of an item, in half precision where all ``items`` of them would not fit well."""
    item.forced = trace.forced
    large = len(trace.logits) * trace.logits[0].numel() * 4 * items > REFERENCE_BYTES
    item.dense = torch.cat([part.to(torch.float16 if large else torch.float32) for part in trace.stretches()])


def judge(runner: Runner, item: Item, trace: Trace, metric: str | None) -> dict[str, Any]:
    """The row of one example: fidelity (top-1 agreement), kl (nats), and correct, prediction or perplexity."""
    if item.dense is None:
        raise ValueError("keep_reference comes first")
    example, chosen = item.example, 0.0
    for begin, log_probs in zip(range(0, len(trace.forced), STEPS), trace.stretches(), strict=True):
        dense = item.dense[begin : begin + STEPS].float().log_softmax(-1)
        trace.agrees += metrics.top1(dense, log_probs).tolist()
        trace.kls += metrics.kl(dense, log_probs).tolist()
        tokens = torch.tensor(trace.forced[begin : begin + STEPS], device=log_probs.device)
        chosen += float(log_probs.gather(1, tokens[:, None]).sum())
    # What the prefill itself predicts is no merit of the method: it counts only where nothing else was predicted.
    free = int(item.prefill == len(item.ids) and len(trace.forced) > 1)
    row: dict[str, Any] = {
        "meta": dict(example.meta),
        "tokens": len(item.ids),
        "correct": None,
        "fidelity": _mean(trace.agrees[free:]),
        "kl": _mean(trace.kls[free:]),
        "prediction": None,
        "answer": example.answer,
    }
    if metric == "perplexity":
        row.update(nll=-chosen, scored=len(trace.forced))
    elif metric is not None and example.answer is not None:
        row["prediction"] = runner.text(trace.own)
        row["correct"] = metrics.score(metric, row["prediction"], example.answer, example.choices)
    return row


def warm_up(runner: Runner, item: Item, recipe: Any, tokens: int = 1024, steps: int = 3) -> None:
    """Runs the beginning of an item once, so that compiling kernels is not timed.

    A share of these few tokens may be less than a method can work with; whether it can is for the full items to say.
    """
    from laconic import apply

    ids = item.ids if item.inputs else item.ids[:tokens]  # a picture cannot be cut
    with contextlib.suppress(LaconicError), apply(runner.model, recipe) as handle:
        prefill = item.prefill if item.inputs else len(ids) - 1
        runner.run(Item(item.example, ids, prefill, steps, inputs=item.inputs), handle)


def measure_cell(
    runner: Runner,
    items: Sequence[Item],
    metric: str | None,
    recipe: Any,
    advance: Callable[[int], None],
    enough: Callable[[dict[str, Any]], bool] | None = None,
) -> dict[str, Any]:
    """Runs all items under a recipe and returns the measured part of the cell's row.

    Times are means over the examples (prefill) and over all decode steps. Two figures are taken on the longest example:
    the peak memory above what was in use before (so without the weights), and the attention mass not read. For these it
    runs twice: lean, and without taking times, because measuring the mass costs a dense pass per step.

    ``enough`` is asked after every example, with the row of those so far, whether that is all that is wanted to know; such a
    search goes without the two figures.
    """
    from laconic import apply

    longest = None if enough else max(range(len(items)), key=lambda i: len(items[i].ids))
    traces: list[Trace] = []
    cells: list[dict[str, Any]] = []
    peak = PeakMemory(runner.device)
    with apply(runner.model, recipe) as handle:
        for i, item in enumerate(items):
            with peak if i == longest else contextlib.nullcontext():
                trace = runner.run(item, handle, lean=i == longest)
            if i == longest:
                item.forced = trace.forced
                with apply(runner.model, recipe, measure=True) as second:
                    again = runner.run(item, second)
                trace.own, trace.masses, trace.logits = again.own, again.masses, again.logits
            if item.dense is None:
                keep_reference(item, trace, len(items))
            cells.append(judge(runner, item, trace, metric))
            trace.logits.clear()  # the large part
            traces.append(trace)
            advance(item.cost)
            if enough is not None and enough(summarise(items[: i + 1], traces, cells, metric)):
                break
    measured = summarise(items[: len(cells)], traces, cells, metric)
    measured["blocks"] = along(items[: len(cells)], traces, recipe, runner.layers)
    if longest is None:
        return measured
    mass = _mean(traces[longest].masses)
    return {**measured, "dropped_mass": mass, "peak_bytes": peak.bytes, "peak_source": peak.source}


def summarise(items: Sequence[Item], traces: Sequence[Trace], cells: list[dict], metric: str | None) -> dict[str, Any]:
    """The means of a cell's examples."""
    steps = [seconds for trace in traces for seconds in trace.steps_s]
    seen = [len(item.ids) + len(trace.forced) / 2 * (len(trace.forced) > 1) for item, trace in zip(items, traces, strict=True)]
    kept = [_mean([step["kept"] for step in trace.stats]) for trace in traces]
    if metric == "perplexity":
        quality: float | None = math.exp(sum(c["nll"] for c in cells) / sum(c["scored"] for c in cells))
    else:
        quality = _mean([c["correct"] for c in cells])
    return {
        "quality": quality,
        "quality_name": metric if quality is not None else None,
        "fidelity": _mean([c["fidelity"] for c in cells]),
        "kl": _mean([c["kl"] for c in cells]),
        "kept": _mean(kept),
        "kept_share": _mean([None if k is None else k / n for k, n in zip(kept, seen, strict=True)]),
        **{key: _mean([step[key] for t in traces for step in t.stats]) for key in ("bytes_kept", "bytes_read")},
        "pairs": _mean([trace.pairs for trace in traces]),
        "prefill_s": _mean([trace.prefill_s for trace in traces]),
        "decode_s": _mean(steps),
        "examples": len(items),
        "cells": list(cells),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
