"""Explainability-guided compression: what an answer would rest on, foretold from the first layer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic import profiles
from laconic.claims import Claim
from laconic.errors import LaconicError
from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import PICTURE_CLAIMS, Reduction, VisionMethod, better_than
from laconic.vision.picture import Picture
from laconic.vision.select import top
from laconic.vision.student import RelevanceStudent, label_of, mean_divergence, train_student


@register
@dataclass(frozen=True, kw_only=True)
class ExplainPrune(VisionMethod):
    """Keeps the tokens that the answer will probably rest on, before the language model's first layer.

    A profile holds a small convolution, trained once per model on examples that the model answers right. It foretells, from the
    attention that the words behind a picture give to its tokens in the first layer, how relevant each token is for the answer:
    attention weighted by its gradients, followed through all layers (see ``laconic.explain.relevance``). For that attention the
    first layer's queries and keys are computed once more, for the whole prompt; in a later turn of a conversation it is that of
    this turn. Pictures may have more or fewer tokens than in training. Calibrate on prompts that are not those of the comparison.
    """

    id: ClassVar[str] = "explain_prune"
    paper: ClassVar[str] = (
        "Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective (2025), also as "
        "Task-Related Token Compression in Multimodal Large Language Models from an Explainability Perspective (2026)"
    )
    needs: ClassVar[str] = "training"
    calibrates_on: ClassVar[str] = "answered pictures"
    reads_first_layer: ClassVar[bool] = True
    claims: ClassVar[tuple[Claim, ...]] = (*PICTURE_CLAIMS, better_than("fastv"))

    profile: str = parameter("", "file made by laconic profile; empty: the one that comes with a built-in model", search=())

    def check(self) -> None:
        super().check()
        profiles.need_file(self.id, self.profile)

    def reduce(self, picture: Picture, k: int) -> Reduction:
        scores = self.score(picture)
        return Reduction(top(scores, k, picture.cells), scores=scores)

    def score(self, picture: Picture) -> torch.Tensor:
        self.require(picture.from_words is not None, "no word stands behind a picture: put the question behind it.")
        tables = profiles.find_profile(self.id, self.profile, picture.model)
        attention = picture.from_words[picture.cells]
        student = RelevanceStudent.of(tables["weights"]).to(attention.device)
        scores = torch.zeros(len(picture.layout), device=attention.device)
        scores[picture.cells] = student(attention[None])[0].exp()
        return scores

    @classmethod
    def calibrate(
        cls,
        model: torch.nn.Module,
        texts: Sequence[dict[str, torch.Tensor]],
        answers: Sequence[torch.Tensor] | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Trains the convolution on prompts with pictures and the answers that the model itself gives, right ones only
        (``laconic.evaluation.calibration.answered_pictures`` finds such).

        Returns:
            ``weights``: those of a ``RelevanceStudent``; ``pictures``: how many it learnt from; ``loss``: its divergence from
            the relevance in nats, mean over these, and ``even``: that of the same probability for every token.
        """
        if not answers:
            raise LaconicError(f"{cls.id} learns from prompts that the model answers right: give one answer for each.")
        examples = [pair for x, answer in zip(texts, answers, strict=True) for pair in examples_of(model, x, answer)]
        student = train_student(examples, seed)
        even = [float((label * (label * len(label)).clamp(min=1e-30).log()).sum()) for _, label in examples]
        return {
            "weights": profiles.weights_to_json(student),
            "pictures": len(examples),
            "loss": round(float(mean_divergence(student, examples)), 4),
            "even": round(sum(even) / len(even), 4),
        }


def examples_of(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], answer: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the student is to learn of one prompt: for each of its pictures the attention from the words and the label, ``(c,)``
    each, of its competing tokens. Those that have no words behind them, or no relevance, teach nothing."""
    from laconic import apply
    from laconic.explain.relevance import relevance

    with apply(model, ExplainPrune()) as handle, torch.no_grad():
        model(**{name: value.to(model.device) for name, value in inputs.items()}, logits_to_keep=1)
        pictures = handle.entry.pictures
    parts = relevance(model, inputs, answer).split([len(picture.layout) for picture in pictures])
    pairs = [(picture, part[picture.cells]) for picture, part in zip(pictures, parts, strict=True)]
    return [
        (picture.from_words[picture.cells], label_of(part))
        for picture, part in pairs
        if picture.from_words is not None and bool(part.any())
    ]
