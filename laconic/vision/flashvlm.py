"""FlashVLM: half of the budget for what is salient and asked for, half for a background without repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.merge import bipartite
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.select import scaled, top

FLOOR = 1e-6
STEP = 8  # background tokens that go in a round


@register
@dataclass(frozen=True, kw_only=True)
class FlashVLM(VisionMethod):
    """Keeps tokens that are both salient and like the question's words, and of the others those that repeat each other least.

    A token is like the words as the mean of its cosines with them, in which similar words weigh more; over the picture that is
    sharpened by a softmax and a power. The product of saliency and likeness, each to a share, ranks the first half of the budget.
    The background is thinned round by round: of every second token, in the order of the ranking, those most like one of the
    others go. With ``text=0`` it is VisPruner (2024), which knows no question. The words are those behind the picture; the
    released code takes the whole prompt's, the system's sentences among them: ``faithful_code`` does so too.
    """

    id: ClassVar[str] = "flashvlm"
    paper: ClassVar[str] = "FlashVLM: Text-Guided Visual Token Selection for Large Multimodal Models (2025)"

    text: float = parameter(0.5, "share of the words in the product; 0 knows no question", least=0, search=(0.0, 0.75))
    important: float = parameter(0.5, "share of the budget that goes to the ranking", least=0, search=(0.75,))
    word_temperature: float = parameter(0.05, "of the softmax over words", least=1e-4, search=())
    token_temperature: float = parameter(0.01, "of the softmax over tokens", least=1e-4, search=(0.03,))
    power: float = parameter(2.5, "likeness after the softmax is raised to this", least=0, search=())

    faithful_code: bool = parameter(False, "as released: all words of the prompt, not only those behind the picture", search=())

    def check(self) -> None:
        super().check()
        self.require(self.text <= 1 and self.important <= 1, "text and important are shares: give at most 1.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("salience", -2)}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        cells = picture.cells
        salient = scaled(picture.salience(-2)[cells]).clamp(min=FLOOR)
        asked = self.likeness(picture)[cells].clamp(min=FLOOR)
        score = torch.zeros(len(picture.layout), device=salient.device)
        score[cells] = scaled(((1 - self.text) * salient.log() + self.text * asked.log()).exp())
        chosen = top(score, int(k * self.important), cells)
        rest = cells[~torch.isin(cells, chosen)]
        rest = rest[score[rest].argsort(descending=True, stable=True)]
        return torch.cat([chosen, self.background(picture, rest, k - len(chosen))]).sort().values

    def background(self, picture: Picture, rest: torch.Tensor, k: int) -> torch.Tensor:
        """What is left of ``rest`` when the most repeated are gone, ``(k,)``."""
        keys = picture.encoded_tokens()
        while len(rest) > max(k, 1):
            gone, _ = bipartite(keys, rest, min(STEP, len(rest) - k))
            rest = rest[~torch.isin(rest, gone)]
        return rest[:k]

    def likeness(self, picture: Picture) -> torch.Tensor:
        """How much each token is like the words, sharpened, 0..1: ``(n,)``."""
        unit = torch.nn.functional.normalize(picture.features.float(), dim=-1)
        words = picture.text if self.faithful_code else picture.question
        cosine = unit @ torch.nn.functional.normalize(words.float(), dim=-1).t()
        mean = ((cosine / self.word_temperature).softmax(-1) * cosine).sum(-1)
        gone = picture.layout.separators.to(mean.device)
        return scaled((mean.masked_fill(gone, float("-inf")) / self.token_temperature).softmax(0) ** self.power)
