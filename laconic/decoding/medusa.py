"""Medusa: small heads on the last hidden state guess the tokens after the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting, Step
from laconic.decoding.distill import Lesson, distill
from laconic.decoding.sampling import Text
from laconic.decoding.templates import best_tree, guessed
from laconic.decoding.tree import DraftTree
from laconic.method import parameter
from laconic.profiles import find_profile, frozen, need_file, weights_from_json, weights_to_json
from laconic.registry import register

HEADS = 3
STEPS, RATE = 1000, 1e-3  # of training


class Heads(torch.nn.Module):
    """Hidden states ``(..., hidden)`` to ``(..., heads, hidden)``, from which the model's own output layer reads tokens.

    Each head is a residual block, h + silu(W h + b). Untrained, with zeros, it guesses the next token again.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(heads, width, width))
        self.bias = torch.nn.Parameter(torch.zeros(heads, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.to(self.weight)
        moved = torch.einsum("...i,hoi->...ho", hidden, self.weight) + self.bias
        return hidden[..., None, :] + torch.nn.functional.silu(moved)


class _Headed(Drafter):
    def __init__(self, method: Medusa, setting: Setting) -> None:
        super().__init__(method, setting)
        tables = find_profile(method.id, method.profile, setting.model)
        weights = weights_from_json(tables["weights"])
        self.heads = Heads(*weights["bias"].shape).requires_grad_(False)
        self.heads.load_state_dict(weights)
        self.heads.to(setting.model.device)
        self.accuracy = tuple(tuple(row) for row in tables["accuracy"])
        self.text = setting.text
        self._guess(setting.prefill.hidden_states[-1][:, -1])

    def _guess(self, hidden: torch.Tensor) -> None:
        """Notes the likeliest tokens of each depth, given the hidden state of the newest token that a forward has seen."""
        output = self.setting.model.get_output_embeddings()
        logits = output(self.heads(hidden).to(output.weight.dtype))
        self.guesses = logits.topk(len(self.accuracy[0]), dim=-1).indices

    def propose(self, text: Text, room: int) -> DraftTree:
        roots = text.roots(self.guesses.device)
        if text is not self.text:  # a hot start: nothing is guessed of this text yet
            return DraftTree.chain(roots[:, None])
        shape = best_tree(self.accuracy[:room], self.method.nodes).expand(len(text.rows))
        return DraftTree(guessed(shape, roots, self.guesses), shape)

    def observe(self, step: Step, text: Text) -> None:
        self.text = text
        end = step.verdict.path.amax(-1)  # nodes of a path ascend
        self._guess(step.output.hidden_states[-1][torch.arange(len(end), device=end.device), end])

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.heads.parameters())


@register
@dataclass(frozen=True, kw_only=True)
class Medusa(DraftMethod):
    """Drafts a fixed tree from heads that guess tokens 2, 3, 4 from the last hidden state; each depth without knowing the others.

    A head is one residual block of hidden x hidden weights in front of the model's own output layer. The heads are trained by
    ``laconic profile medusa`` on what the frozen model says by itself, and how often each guess is right is measured on texts
    kept apart; the tree holds the guesses that are worth most.
    """

    id: ClassVar[str] = "medusa"
    paper: ClassVar[str] = "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads (2024)"
    needs: ClassVar[str] = "training"
    hidden: ClassVar[bool] = True

    budget: Budget = parameter(Budget(amount=16), "tokens drafted in each forward; the original drafts 64")  # noqa: RUF009
    profile: str = parameter("", "a file of laconic profile medusa; empty: the one that comes with a built-in model")

    def check(self) -> None:
        need_file(self.id, self.profile)

    def drafter(self, setting: Setting) -> Drafter:
        return _Headed(self, setting)

    @classmethod
    def calibrate(
        cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], seed: int = 0, steps: int = STEPS
    ) -> dict[str, Any]:
        """Trains the heads.

        Returns:
            ``weights``: of ``Heads``; and what ``distill`` says of them.
        """
        heads = Heads(HEADS, model.config.get_text_config().hidden_size).to(model.device)
        output = model.get_output_embeddings()

        def guess(lesson: Lesson) -> torch.Tensor:
            return output(heads(lesson.hidden).to(output.weight.dtype))

        with frozen(model):
            found = distill(model, guess, list(heads.parameters()), texts, ahead=HEADS, steps=steps, rate=RATE, seed=seed)
        return {"weights": weights_to_json(heads), **found}
