"""Learn2PD: a small trained filter sees the confidences of the whole block and says which predictions are final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from laconic.decoding.canvas import Prediction, Run
from laconic.decoding.diffusion import BlockMethod, Rule
from laconic.decoding.full_canvas import FullCanvas
from laconic.decoding.positions import select
from laconic.method import parameter
from laconic.profiles import find_profile, need_file, weights_from_json, weights_to_json
from laconic.registry import register

CANVAS = 96  # new tokens of a trace
STEPS, RATE = 4000, 3e-3  # of the filter's training, over all records at once
HELD_OUT = 0.2  # share of the prompts whose records only judge the filter


@register
@dataclass(frozen=True, kw_only=True)
class Learn2PD(BlockMethod):
    """Commits what a filter of two small layers accepts, and always the most confident position; cuts at a predicted end of text.

    The filter maps the probabilities ``(rows, block)`` of the predicted tokens, committed positions included, to accept or not.
    It belongs to a model and a block length, and is trained on traces in which exactly the right predictions were committed.
    ``end`` drops all positions behind the leftmost end token that a step commits, or else behind the most probable end
    token among all masks in sight: of the canvas, or with a cache (``plan``) of the block.
    """

    id: ClassVar[str] = "learn2pd"
    paper: ClassVar[str] = (
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding (2025)"
    )
    needs: ClassVar[str] = "training"

    threshold: float = parameter(0.96, "what the filter must say, 0 to 1; 1 accepts nothing", least=0, search=(0.9, 0.99))
    end: bool = parameter(True, "cut the canvas at a predicted end of the text")
    end_confidence: float = parameter(
        0.0, "probability that an end token not yet committed must have to cut", least=0, search=(0.9,))
    profile: str = parameter("", "file of laconic profile learn2pd; empty: the one that comes with the model", search=())

    def check(self) -> None:
        super().check()
        need_file(self.id, self.profile)

    def rule(self, run: Run) -> Rule:
        tables = find_profile(self.id, self.profile, run.model)
        self.require(
            tables["block"] == self.block, f"the profile is for blocks of {tables['block']}, not {self.block}: use its length."
        )
        network = make_filter(self.block)
        network.load_state_dict(weights_from_json(tables["weights"]))
        network.to(run.ids.device)
        return lambda seen: self._choose(network, seen)

    def _choose(self, network: nn.Module, seen: Prediction) -> torch.Tensor:
        """Open positions of the block that the filter accepts, and the best one; none behind the block."""
        score = seen.probability[:, : self.block]
        inputs = nn.functional.pad(score, (0, self.block - score.shape[1]), value=1.0)  # what is cut off counts as final
        accepted = network(inputs).sigmoid()[:, : score.shape[1]] > self.threshold
        open = seen.open[:, : self.block]
        taken = select(score, open) | (accepted & open)
        return nn.functional.pad(taken, (0, seen.open.shape[1] - taken.shape[1]))

    def sight(self, run: Run, stop: int) -> int:
        return run.length if self.end and self.plan == "none" and len(run.ids) == 1 else stop

    def after(self, run: Run, seen: Prediction, taken: torch.Tensor) -> None:
        """Cuts the canvas of a single row; rows of a batch end in different places, and stop by block only."""
        if not self.end or len(run.ids) > 1:
            return
        ends = torch.isin(seen.tokens, run.end) & seen.open
        committed = (ends & taken)[0].nonzero()
        if len(committed):
            run.cut(int(seen.positions[committed[0, 0]]) + 1)
            return
        score = seen.probability.masked_fill(~ends, -1.0)[0]
        if bool(ends.any()) and bool(score.max() >= self.end_confidence):
            run.cut(int(seen.positions[score.argmax()]) + 1)

    @classmethod
    def calibrate(cls, model: Any, texts: Sequence[torch.Tensor], seed: int = 0) -> dict[str, Any]:
        """Trains the filter on traces of the model's own answers to ``texts``, 1-D ids of prompts."""
        block = cls.__dataclass_fields__["block"].default
        found = [traces(model, ids, block) for ids in texts]
        held = max(1, round(len(found) * HELD_OUT)) if len(found) > 1 else 0
        parts = found[: len(found) - held], found[len(found) - held :] or found
        (inputs, labels), (others, truth) = ([torch.cat(pair) for pair in zip(*part, strict=True)] for part in parts)
        network = train_filter(inputs, labels, seed)
        with torch.inference_mode():
            accepted = network(others).sigmoid() > cls.__dataclass_fields__["threshold"].default
        return {
            "block": block,
            "weights": weights_to_json(network),
            "records": len(inputs),
            "precision": _share(truth[accepted]),  # on prompts not trained on, at the default threshold
            "recall": _share(accepted[truth]),
        }


def _share(marks: torch.Tensor) -> float | None:
    return round(marks.float().mean().item(), 4) if len(marks) else None


def make_filter(block: int) -> nn.Sequential:
    """Two linear layers: 2,112 parameters for blocks of 32."""
    return nn.Sequential(nn.Linear(block, block), nn.ReLU(), nn.Linear(block, block))


def train_filter(inputs: torch.Tensor, labels: torch.Tensor, seed: int) -> nn.Sequential:
    """Binary cross-entropy over all records ``(records, block)`` at once."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = make_filter(inputs.shape[1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(network(inputs), labels.float()).backward()
            optimizer.step()
    return network.requires_grad_(False)


@torch.inference_mode()
def traces(model: Any, ids: torch.Tensor, block: int, new: int = CANVAS) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences, and whether the prediction is the model's final one, ``(steps, block)``, of one prompt ``(n,)``.

    The answer of one token per step is the reference; the second decoding commits exactly what agrees with it.
    """
    method = FullCanvas(block=block)
    slow, again = Run(model, ids[None], new), Run(model, ids[None], new)
    method.decode(slow)
    oracle = Oracle(slow.ids, block)
    method.decode_with(again, oracle)
    return torch.cat(oracle.confidences).cpu(), torch.cat(oracle.right).cpu()


class Oracle:
    """A rule that knows the final ids ``(1, length)``: commits what is right, and all of it once predictions stand still."""

    def __init__(self, final: torch.Tensor, block: int) -> None:
        self.final, self.block = final, block
        self.confidences: list[torch.Tensor] = []
        self.right: list[torch.Tensor] = []
        self._last = Prediction(*[torch.empty(0)] * 4)

    def __call__(self, seen: Prediction) -> torch.Tensor:
        right = seen.tokens == self.final[:, seen.positions]
        pad = (0, self.block - right.shape[1])
        self.confidences.append(nn.functional.pad(seen.probability, pad, value=1.0))
        self.right.append(nn.functional.pad(right, pad, value=True))
        last, self._last = self._last, replace(seen)
        if torch.equal(last.positions, seen.positions) and torch.equal(last.tokens, seen.tokens):
            seen.tokens = self.final[:, seen.positions]
            return seen.open
        return right & seen.open
