"""AdaDec: greedy, and where the model is unsure a look ahead at its best candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from laconic.decoding.base import Chooser, SampleMethod, Setting
from laconic.decoding.runner import Runner
from laconic.decoding.sampling import Text
from laconic.decoding.tree import DraftTree
from laconic.errors import LaconicError
from laconic.method import parameter
from laconic.profiles import find_profile, need_file
from laconic.registry import register

CUTS = np.arange(1, 100) / 100
TRAINED = 0.8  # share of the tokens that the regression is fitted to; the cut is chosen on the others


@register
@dataclass(frozen=True, kw_only=True)
class AdaDec(SampleMethod):
    """Decodes greedily; where the entropy of the next token passes a threshold, looks ahead before it chooses.

    It writes on a little from each of the best candidates and takes the one whose tokens have the largest mean log
    probability; only the candidate itself is kept. The entropy is that of the model's own logits, in nats; candidates and
    their log probabilities are what processors leave. The threshold comes from a profile (``laconic profile adadec``), which
    learns from the entropy whether the likeliest token is right, or is given: 0 looks ahead at every step, ``inf`` never. A
    roll-out stops where ``decode`` would: at ``ends`` and at ``stop``. ``Decoded.figures`` counts gated steps and extra
    forwards. (The original's factor lambda scales all scores and changes nothing.)
    """

    id: ClassVar[str] = "adadec"
    paper: ClassVar[str] = "Towards Better Code Generation: Adaptive Decoding with Uncertainty Guidance (2025)"
    needs: ClassVar[str] = "calibration"

    candidates: int = parameter(3, "tokens that are tried at a gated step", least=1)
    lookahead: int = parameter(5, "tokens written on from each", least=0)
    threshold: float = parameter(-1.0, "entropy in nats from which on it looks ahead; below 0: the profile's", search=())
    sums: bool = parameter(False, "compare sums of log probabilities; means favour what is easy to go on from")
    past_ends: bool = parameter(False, "notice an end only behind the first token written on, as published", search=())
    profile: str = parameter("", "file of the profile; empty for the one of a built-in model", search=())

    def check(self) -> None:
        need_file(self.id, self.profile)

    def chooser(self, setting: Setting) -> Chooser:
        if not setting.sampling.greedy:
            raise LaconicError("adadec decodes greedily: leave the temperature at 0.")
        limit = self.threshold
        if limit < 0:
            limit = find_profile(self.id, self.profile, setting.model)["threshold"]
        return LookAhead(self, limit, setting)

    @classmethod
    def calibrate(
        cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor] | None = None, seed: int = 42
    ) -> dict[str, Any]:  # fmt: skip
        """The threshold, from whether the likeliest token is right at each token of right answers; without them, of the texts."""
        entropies, right = [], []
        for index, text in enumerate(texts):
            ids = text if answers is None else torch.cat([text, answers[index]])
            start = 1 if answers is None else len(text)
            with torch.inference_mode():
                logits = model(input_ids=ids[None].to(model.device)).logits[0, start - 1 : -1].float().cpu()
            entropies.append(entropy(logits).double().numpy())
            right.append((logits.argmax(-1) == ids[start:]).numpy())
        return fit_threshold(np.concatenate(entropies), np.concatenate(right), seed)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """In nats, of rows of logits ``(..., vocabulary)``."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs.masked_fill(logs == -math.inf, 0.0)).sum(-1)


def fit_threshold(entropies: np.ndarray, right: np.ndarray, seed: int = 42) -> dict[str, float]:
    """The entropy below which the likeliest token is taken to be right, with the logistic regression that it comes from.

    Four fifths of the tokens train it, as many right ones as wrong ones; on the others the cut of the probability is chosen that
    says most often whether the token is right.
    """
    if len(right) < 20 or bool(right.all()) or not bool(right.any()):
        raise LaconicError("adadec needs 20 tokens or more, some that the model gets right and some wrong: give more texts.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(right))
    train, test = np.split(order, [int(TRAINED * len(order))])
    groups = [train[right[train] == value] for value in (True, False)]
    fewest = min(map(len, groups))
    if fewest == 0:
        raise LaconicError("adadec found right or wrong tokens only where it trains: give more texts.")
    balanced = np.concatenate([rng.choice(group, fewest, replace=False) for group in groups])
    slope, intercept = logistic(entropies[balanced], right[balanced])
    if slope >= 0:
        raise LaconicError("The entropy of this model does not tell where it errs: adadec has no threshold for it; give one.")
    sure = 1 / (1 + np.exp(-(slope * entropies[test] + intercept)))
    accuracy = ((sure[:, None] >= CUTS) == right[test, None]).mean(0)
    cut = float(CUTS[accuracy.argmax()])
    threshold = (math.log(cut / (1 - cut)) - intercept) / slope
    return {
        "threshold": threshold, "slope": slope, "intercept": intercept, "cut": cut, "accuracy": float(accuracy.max()),
        "tokens": len(right), "gated": float((entropies >= threshold).mean()),
    }  # fmt: skip


def logistic(x: np.ndarray, y: np.ndarray, steps: int = 50, ridge: float = 1e-3) -> tuple[float, float]:
    """Slope and intercept of P(y) = sigmoid(slope x + intercept) by Newton's method. The ridge keeps separable data finite."""
    rows, target, weights = np.stack([x, np.ones_like(x)], 1), y.astype(float), np.zeros(2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(rows @ weights, -500, 500)))
        gradient = rows.T @ (p - target) + ridge * weights
        curvature = (rows * (p * (1 - p))[:, None]).T @ rows + ridge * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    return float(weights[0]), float(weights[1])


class LookAhead(Chooser):
    """The choice of AdaDec at a step, all gated rows of a batch at once: one forward per depth."""

    def __init__(self, method: AdaDec, threshold: float, setting: Setting) -> None:
        self.method, self.threshold, self.setting = method, threshold, setting
        self.steps = self.gated = self.forwards = self.nodes = 0

    def choose(self, runner: Runner, logits: torch.Tensor, scores: torch.Tensor, text: Text) -> torch.Tensor:
        chosen = scores.argmax(-1)
        going = ~torch.tensor(text.done, device=logits.device)
        gated = ((entropy(logits) >= self.threshold) & going).nonzero()[:, 0].cpu()
        self.steps, self.gated = self.steps + int(going.sum()), self.gated + len(gated)
        if len(gated) and self.method.candidates > 1 and self.method.lookahead > 0:
            best, scored = self.rate(runner, scores[gated], text, gated)
            chosen[gated] = best.gather(1, scored.argmax(-1, keepdim=True))[:, 0]
        return chosen

    def rate(
        self, runner: Runner, scores: torch.Tensor, text: Text, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Candidates ``(gated, candidates)`` of the gated ``rows``, the likeliest first, and their scores."""
        logs, best = scores.log_softmax(-1).topk(min(self.method.candidates, scores.shape[-1]), dim=-1)
        width = best.shape[1]
        total, tokens, sources = logs.flatten().double(), best.flatten(), rows.repeat_interleave(width)
        futures = Text([[*text.rows[row], token] for row, token in zip(sources.tolist(), tokens.tolist(), strict=True)])
        futures.prompts = [text.prompts[row] for row in sources.tolist()]
        length = torch.ones_like(total)
        going = torch.ones_like(tokens, dtype=torch.bool)
        if not self.method.past_ends:
            going &= ~self._ended(futures, sources)
        branch = None
        for _ in range(self._room(runner)):
            if not bool(going.any()):
                break
            branch = branch or runner.branch(sources)
            output = branch.step(tokens)
            step = self.setting.sampling.scores(output.logits, futures, DraftTree.chain(tokens[:, None]))[:, 0].log_softmax(-1)
            value, tokens = step.max(-1)
            total += torch.where(going, value.double(), 0.0)
            length += going
            for row, token in zip(futures.rows, tokens.tolist(), strict=True):
                row.append(token)
            going &= ~self._ended(futures, sources)
        if branch is not None:
            self.forwards, self.nodes = self.forwards + branch.forwards, self.nodes + branch.rows
        return best, (total if self.method.sums else total / length).unflatten(0, (-1, width))

    def _room(self, runner: Runner) -> int:
        """How far it can look: no further than the model's positions."""
        room = math.inf if runner.limit is None else runner.limit - int(runner.lengths.max())
        return int(min(self.method.lookahead, room))

    def _ended(self, futures: Text, sources: torch.Tensor) -> torch.Tensor:
        """Whether the newest token of each future ends it."""
        ends = () if self.method.past_ends else self.setting.ends
        stop: Callable[[int, list[int]], bool] = self.setting.stop or (lambda row, new: False)
        return torch.tensor([
            ids[-1] in ends or stop(row, ids[count:])
            for row, ids, count in zip(sources.tolist(), futures.rows, futures.prompts, strict=True)
        ], device=self.setting.model.device)  # fmt: skip

    def figures(self) -> dict[str, int]:
        """``steps``: tokens that were chosen; ``gated``: those with a look ahead; ``forwards`` and ``nodes`` that took."""
        return {"steps": self.steps, "gated": self.gated, "forwards": self.forwards, "nodes": self.nodes}


def python_body_ends(tokenizer: Any) -> Callable[[int, list[int]], bool]:
    """A stop rule for completing the body of a Python function: a line that is not indented, or four blank lines, has begun."""

    def stop(row: int, new: list[int]) -> bool:
        lines = tokenizer.decode(new).split("\n")[1:]  # the first goes on with the prompt's last line
        return any(line and not line[0].isspace() for line in lines) or (len(lines) >= 4 and not any(map(str.strip, lines[-4:])))

    return stop
