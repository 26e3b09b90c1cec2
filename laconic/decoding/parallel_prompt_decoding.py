"""Parallel Prompt Decoding: a few learned embeddings behind the text make the model guess later tokens in the same forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting, Step
from laconic.decoding.distill import Lesson, accuracy, distill, kept_apart, with_rows
from laconic.decoding.latency import forward_seconds
from laconic.decoding.prompt_trees import best_length, best_plan, first_tree, lay_out
from laconic.decoding.sampling import Text
from laconic.decoding.templates import guessed
from laconic.decoding.tree import DraftTree, PromptRows
from laconic.method import parameter
from laconic.profiles import find_profile, frozen, need_file, weights_from_json, weights_to_json
from laconic.registry import register

AHEAD = 3  # prompt tokens
STEPS, RATE = 1000, 0.03  # of training; the rate is in standard deviations of the model's own embeddings
LENGTHS = ("budget", "latency")


class _Prompted(Drafter):
    def __init__(self, method: ParallelPromptDecoding, setting: Setting) -> None:
        super().__init__(method, setting)
        tables = find_profile(method.id, method.profile, setting.model)
        table, length = tuple(tuple(row) for row in tables["accuracy"][: method.ahead]), method.nodes
        if table and method.length == "latency":
            length = best_length(table, [tuple(pair) for pair in tables["seconds"]], length)
        plan = best_plan(table, length) if table else ()
        self.ahead = len(plan)
        self.trees, self.ranks = (first_tree(self.ahead), *plan), len(tables["accuracy"][0])
        self.prompts = weights_from_json(tables["weights"])["prompts"][: self.ahead].to(setting.model.device)
        self._start(setting.text)

    def _start(self, text: Text) -> None:
        """Nothing is guessed of this text yet."""
        self.text, self.states = text, [0] * len(text.rows)
        self.guesses = torch.zeros(len(text.rows), max(self.ahead, 1), 1, dtype=torch.int64, device=self.prompts.device)

    def propose(self, text: Text, room: int) -> DraftTree:
        if text is not self.text:
            self._start(text)
        roots = text.roots(self.guesses.device)
        if not self.ahead:
            return DraftTree.chain(roots[:, None])
        states = [0 if done else state for state, done in zip(self.states, text.done, strict=True)]
        self.layout = lay_out(tuple(self.trees[state] for state in states), min(room, 2 * self.ahead))
        rows = PromptRows(self.layout.whole, self.prompts[self.layout.numbers.to(self.prompts.device)])
        tokens = guessed(self.layout.nodes, roots, self.guesses)
        return DraftTree(tokens, self.layout.nodes, prompts=rows)

    def observe(self, step: Step, text: Text) -> None:
        """The rows behind the node where the forward stopped say what comes after the newest token."""
        if step.tree.prompts is None:
            self._start(text)
            return
        end = step.verdict.path.amax(-1).cpu()[:, None]  # nodes of a path ascend
        self.states = self.layout.count.gather(1, end)[:, 0].tolist()
        logits = step.output.logits
        at = self.layout.first.gather(1, end) + torch.arange(self.ahead)
        at = at.clamp(max=logits.shape[1] - 1).to(logits.device)
        every = torch.arange(len(at), device=logits.device)[:, None]
        self.guesses = logits[every, at].topk(self.ranks, dim=-1).indices

    @property
    def bytes(self) -> int:
        return self.prompts.numel() * self.prompts.element_size()


@register
@dataclass(frozen=True, kw_only=True)
class ParallelPromptDecoding(DraftMethod):
    """Guesses tokens 2, 3, 4 with prompt tokens: learned embeddings that stand where these tokens will be.

    Every drafted token carries prompt rows of its own, so that the forward which checks it also guesses what follows it;
    nothing else is computed and no second model is held. How many prompt tokens are used, how many rows a token carries,
    and how many guesses are checked when 1, 2 or 3 depths are guessed, follows from how often each guess is right, so that
    the most tokens come out of a forward. The budget counts all rows behind the newest token, guesses and prompt rows. The
    first forward after the prompt only guesses. The embeddings, hidden x ``ahead`` numbers, are trained by ``laconic
    profile parallel_prompt_decoding``; the model stays as it is.
    """

    id: ClassVar[str] = "parallel_prompt_decoding"
    paper: ClassVar[str] = "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference (2024)"
    needs: ClassVar[str] = "training"

    budget: Budget = parameter(Budget(amount=24), "rows behind the newest token in each forward")  # noqa: RUF009
    ahead: int = parameter(AHEAD, "prompt tokens at most; as many as pay are used, and 0 drafts nothing", least=0, search=())
    length: str = parameter(
        "budget", "rows that are used: budget, all of it; latency: as many as are fastest by the profile's times", search=()
    )
    profile: str = parameter(
        "", "a file of laconic profile parallel_prompt_decoding; empty: the one that comes with a built-in model"
    )

    def check(self) -> None:
        need_file(self.id, self.profile)
        self.require(self.nodes >= 3, "its budget holds a prompt row, a guess and the row behind it: give 3 or more.")
        self.require(self.length in LENGTHS, f"length must be one of {', '.join(LENGTHS)}.")

    def drafter(self, setting: Setting) -> Drafter:
        return _Prompted(self, setting)

    @classmethod
    def calibrate(
        cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], seed: int = 0, steps: int = STEPS
    ) -> dict[str, Any]:
        """Trains the embeddings, from those of random tokens on.

        Returns:
            ``weights``: ``prompts`` (ahead, hidden), and what ``distill`` says of them; ``untrained``: the accuracy before
            training; ``seconds``: of a forward by its rows on this machine, pairs.
        """
        table = model.get_input_embeddings().weight.detach().float()
        size = table.std()
        chosen = torch.randint(0, len(table), (AHEAD,), generator=torch.Generator().manual_seed(seed))
        scaled = torch.nn.Parameter(table[chosen.to(table.device)] / size)

        def guess(lesson: Lesson) -> torch.Tensor:
            return with_rows(model, lesson, (scaled * size).to(model.dtype))

        with frozen(model):
            before = accuracy(model, guess, kept_apart(texts)[1], AHEAD, seed)
            found = distill(model, guess, [scaled], texts, ahead=AHEAD, steps=steps, rate=RATE, seed=seed)
        holder = torch.nn.ParameterDict({"prompts": torch.nn.Parameter(scaled.detach() * size)})
        return {"weights": weights_to_json(holder), "untrained": before, "seconds": forward_seconds(model), **found}
