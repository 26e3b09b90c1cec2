"""The loop: propose a tree, run the model once, verify, keep what was accepted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from laconic.decoding.base import Chooser, Drafter, DraftMethod, SampleMethod, Setting, Step
from laconic.decoding.runner import Runner
from laconic.decoding.sampling import Sampling, Text
from laconic.decoding.tree import DraftTree
from laconic.decoding.verify import Verdict, k_seq, match, rejection, trust, typical
from laconic.errors import LaconicError
from laconic.hooks import Handle, apply
from laconic.recipe import Recipe


@dataclass(frozen=True)
class Progress:
    """One step, for whoever watches: of each row the drafted tokens, their parents, the accepted nodes, and what is new."""

    tokens: list[list[int]]
    parents: list[list[int]]
    accepted: list[list[int]]
    new: list[list[int]]


@dataclass
class Decoded:
    """What ``decode`` made.

    Attributes:
        rows: new tokens of each row, without what follows the end.
        forwards: of the target model, the prompt's included; nodes: tokens that the others computed.
        accepted: how often 0, 1, 2, ... drafted tokens of a row were accepted in a forward.
        prefill_s: time to the first new token; decode_s: of everything after it.
        draft_s: of it, spent on proposing; watch_s: spent on telling who watches, which no other time includes.
        draft_bytes: memory of the drafter.
        stats: the cache's figures, see ``Handle.stats``.
        drafter: what knows what the run has taught it, for a hot start of the next one.
        figures: what a method that chooses tokens itself counted.
    """

    rows: list[list[int]]
    forwards: int = 0
    nodes: int = 0
    accepted: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    watch_s: float = 0.0
    draft_bytes: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    drafter: Drafter | None = None
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_forward(self) -> float | None:
        """New tokens of a row per forward after the prompt's; the first token is the prompt's own."""
        return per_forward(self.accepted)


def per_forward(accepted: Sequence[int]) -> float | None:
    """New tokens per forward, where 0, 1, 2, ... drafted ones were accepted so often; the model's own one comes on top."""
    steps = sum(accepted)
    return sum((count + 1) * times for count, times in enumerate(accepted)) / steps if steps else None


def decode(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    recipe: Any = "dense",
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int | torch.Generator | None = 0,
    ends: Collection[int] = (),
    stop: Callable[[int, list[int]], bool] | None = None,
    watch: Callable[[Progress], None] | None = None,
    drafter: Drafter | None = None,
    tokenizer: Any = None,
) -> Decoded:
    """Continues prompts, with what a recipe drafts.

    Args:
        inputs: ``input_ids`` and, for prompts of different lengths, ``attention_mask`` (batch, n), padded on the left.
        recipe: methods of the cache, at most one that drafts, and methods of the stage "sample".
        sampling: by default greedy.
        seed: or a generator, for sampling; None takes torch's own.
        ends: tokens that end a text, kept as its last.
        stop: says of a row and its new tokens whether it is finished.
        watch: told of every step.
        drafter: of an earlier run, to go on with what it knows (a hot start); by default the recipe's, new.
        tokenizer: for methods that look for words, such as ``cyclic_reflex``.

    Raises:
        LaconicError: where the methods do not fit together or the model.
    """
    recipe = Recipe.parse(recipe)
    method, samplers = drafting(recipe), choosing(recipe)
    rest = tuple(m for m in recipe.methods if m is not method and m not in samplers)
    generator = torch.Generator(model.device).manual_seed(seed) if isinstance(seed, int) else seed
    with torch.inference_mode(), apply(model, Recipe(rest) if rest else "dense") as handle:
        run = _Run(handle, inputs, method, sampling or Sampling(), generator, drafter)
        run.set_up(samplers, tokenizer, frozenset(ends), stop)
        return run(max_new_tokens, watch)


def drafting(recipe: Recipe) -> DraftMethod | None:
    """The method of a recipe that drafts."""
    found = [m for m in recipe.methods if isinstance(m, DraftMethod)]
    if len(found) > 1:
        raise LaconicError(f"{' and '.join(m.id for m in found)} both draft: keep one of them.")
    return found[0] if found else None


def choosing(recipe: Recipe) -> tuple[SampleMethod, ...]:
    """The methods of a recipe that change which token comes next."""
    found = tuple(m for m in recipe.methods if isinstance(m, SampleMethod))
    for m in found:
        if m.entry:
            raise LaconicError(f"{m.id} has a loop of its own: call {m.entry}.")
    return found


class _Run:
    def __init__(
        self, handle: Handle, inputs: dict[str, Any], method: DraftMethod | None, sampling: Sampling,
        generator: torch.Generator | None, drafter: Drafter | None,
    ) -> None:  # fmt: skip
        self.handle, self.inputs, self.method, self.sampling, self.generator = handle, dict(inputs), method, sampling, generator
        self.runner = Runner(handle, hidden=method is not None and method.hidden)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        rows = ids.tolist()
        if mask is not None:
            rows = [[i for i, real in zip(row, keep, strict=True) if real] for row, keep in zip(rows, mask.tolist(), strict=True)]
        if not all(rows):
            raise LaconicError("The prompt is empty: give at least one token.")
        self.text, self.drafter = Text(rows), drafter
        if method is not None:
            method.prepare(handle.model)
            handle.refuse_drafts(len(rows))
            limit = self.runner.limit
            fits = limit is None or method.nodes < limit
            method.require(fits, f"{method.nodes} drafted tokens are more than the model's {limit} positions: draft fewer.")
        self.device = ids.device

    def set_up(self, samplers: tuple[SampleMethod, ...], tokenizer: Any, ends: frozenset[int], stop: Any) -> None:
        """What the methods of the stage "sample" bring: processors, and at most one that chooses."""
        self.ends, self.stop = ends, stop
        self.setting = Setting(self.handle.model, self.text, self.sampling, self.generator, inputs=self.inputs,
                               tokenizer=tokenizer, ends=ends, stop=stop)  # fmt: skip
        own = tuple(process for m in samplers for process in m.processors(self.setting))
        self.sampling = self.setting.sampling = dataclasses.replace(self.sampling, processors=(*self.sampling.processors, *own))
        choosers = {m.id: c for m in samplers if (c := m.chooser(self.setting)) is not None}
        if len(choosers) + (self.method is not None and bool(choosers)) > 1:
            both = [*choosers, *([self.method.id] if self.method is not None else [])]
            raise LaconicError(f"{' and '.join(both)} both say which tokens come next: keep one of them.")
        self.chooser: Chooser | None = next(iter(choosers.values()), None)

    def __call__(self, most: int, watch: Any) -> Decoded:
        begun = time.perf_counter()
        self.most, self.watch = most, watch
        self.result = Decoded([[] for _ in self.text.rows])
        output = self.runner.prefill(self.inputs)
        root = DraftTree.chain(self.text.roots(self.device)[:, None])
        self.bare = root.shape  # of every step without a draft
        scores = self.sampling.scores(output.logits[:, -1:], self.text, root)
        self.newest = self._choose(output.logits[:, -1:], scores)[:, 0]
        first = self.newest.tolist()
        self.result.prefill_s = time.perf_counter() - begun
        self._write([[token] for token in first], root, None)
        if self.method is not None:
            start = time.perf_counter()
            self.setting.prefill, self.setting.places = output, self.runner.cache.request.positions
            if self.drafter is None:
                self.drafter = self.method.drafter(self.setting)
            else:
                self.drafter.begin(self.setting)
            self.result.draft_s += time.perf_counter() - start
        while not all(self.text.done):
            self._step()
        return self._finish(begun)

    def _step(self) -> None:
        begun = time.perf_counter()
        if self.drafter is not None and (room := self._room()) > 0:
            tree = self.drafter.propose(self.text, room)
        else:
            tree = DraftTree(self.newest[:, None], self.bare)
        self.result.draft_s += time.perf_counter() - begun
        shape, tree = tree.shape, tree.to(self.device)
        output = self.runner.step(tree.tokens[:, 0]) if tree.plain else self.runner.run(tree.tokens, shape, tree.prompts)
        scores = self.sampling.scores(output.logits[:, : tree.nodes], self.text, tree)
        verdict = self._verify(tree, output.logits, scores)
        self.newest, last = verdict.token, verdict.token.tolist()
        if tree.plain:
            path, new = verdict.path, [[token] for token in last]
        else:
            accepted = [[node for node in row if node >= 0] for row in verdict.path.tolist()]
            path = verdict.path[:, : max(map(len, accepted))].cpu()
            self.runner.settle(path)
            drafted = tree.tokens.tolist()
            new = [[*(row[at] for at in nodes[1:]), token] for row, nodes, token in zip(drafted, accepted, last, strict=True)]
        for row, tokens in enumerate(new):
            if not self.text.done[row]:
                self.result.accepted += [0] * (len(tokens) - len(self.result.accepted))
                self.result.accepted[len(tokens) - 1] += 1
        self._write(new, tree, path)
        if self.drafter is not None:
            begun = time.perf_counter()
            self.drafter.observe(Step(tree, output, scores, verdict), self.text)
            self.result.draft_s += time.perf_counter() - begun

    def _room(self) -> int:
        """How deep a draft may reach: no further than the longest text still to be written, and than the model's positions."""
        rows = [row for row, done in enumerate(self.text.done) if not done]
        room = max(self.most - self.text.written(row) for row in rows) - 1
        if self.runner.limit is not None:
            room = min(room, self.runner.limit - 1 - int(self.runner.lengths.max()))
        return room

    def _choose(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One token after each node, ``(batch, nodes)``."""
        if self.chooser is not None:
            return self.chooser.choose(self.runner, logits[:, -1], scores[:, -1], self.text)[:, None]
        return self.sampling.choose(scores, self.generator)

    def _verify(self, tree: DraftTree, logits: torch.Tensor, scores: torch.Tensor) -> Verdict:
        name = self.method.verifier if self.method is not None and tree.nodes > 1 else "match"
        if name == "trust":
            return trust(tree, self.sampling.choose(scores, self.generator))
        if name == "typical":
            law = self.sampling.soft(scores, self.sampling.temperature or 1.0)
            return typical(tree, law, self.sampling.choose(scores, self.generator))
        if self.sampling.greedy or name == "match":
            return match(tree, self._choose(logits, scores))
        check = {"rejection": rejection, "k_seq": k_seq}[name]
        return check(tree, self.sampling.law(scores), self.generator)

    def _write(self, new: list[list[int]], tree: DraftTree, path: torch.Tensor | None) -> None:
        """Appends new tokens to the texts that are not finished, up to their end."""
        for row, tokens in enumerate(new):
            if self.text.done[row]:
                self.text.rows[row].append(tokens[-1])  # what a finished row's next forward is fed with; nobody reads it
                new[row] = []
                continue
            for count, token in enumerate(tokens):
                self.text.rows[row].append(token)
                self.result.rows[row].append(token)
                full = len(self.result.rows[row]) >= self.most
                if full or token in self.ends or (self.stop is not None and self.stop(row, self.result.rows[row])):
                    self.text.done[row] = True
                    new[row] = tokens[: count + 1]
                    break
        self._tell(new, tree, path)

    def _tell(self, new: list[list[int]], tree: DraftTree, path: torch.Tensor | None) -> None:
        if self.watch is not None:
            begun = time.perf_counter()
            real = tree.shape.real
            tokens = [row[keep].tolist() for row, keep in zip(tree.tokens, real, strict=True)]
            parents = [row[keep].tolist() for row, keep in zip(tree.shape.parents, real, strict=True)]
            accepted = [[] for _ in new] if path is None else [[i for i in row if i > 0] for row in path.tolist()]
            self.watch(Progress(tokens, parents, accepted, new))
            self.result.watch_s += time.perf_counter() - begun

    def _finish(self, begun: float) -> Decoded:
        result = self.result
        result.decode_s = time.perf_counter() - begun - result.prefill_s - result.watch_s
        result.forwards, result.nodes = self.runner.forwards, self.runner.rows - self.inputs["input_ids"].numel()
        if self.chooser is not None:
            result.figures = self.chooser.figures()
            result.forwards += result.figures.get("forwards", 0)
            result.nodes += result.figures.get("nodes", 0)
        result.draft_bytes = 0 if self.drafter is None else self.drafter.bytes
        self.handle.serve(self.runner.cache)  # the latest forward may have looked ahead
        result.stats = self.handle.stats()
        result.drafter = self.drafter
        return result
