"""MMTok: the tokens that cover the question and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.primitives.greedy import CoverageRule
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.picture import Picture
from laconic.vision.select import candidates, pick


@register
@dataclass(frozen=True, kw_only=True)
class MMTok(VisionMethod):
    """Keeps the tokens that together best cover the words of the prompt and all tokens of the picture.

    A word or token is covered as well as by the best kept token: by the softmax of its cosines with all of them, words at
    ``word_temperature`` in the language model's space, tokens at ``token_temperature`` in the encoder's. The mean over words
    counts once, the mean over tokens ``share`` times. Found one by one, which is at least 63 % of the best. Knows the question,
    so that what it keeps may be wrong for the next one. Words are taken from the prompt without a list of stop words.
    """

    id: ClassVar[str] = "mmtok"
    paper: ClassVar[str] = "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs (2025)"

    share: float = parameter(0.5, "weight of the picture's tokens against the words", least=0)
    word_temperature: float = parameter(0.02, "of the softmax over tokens for each word", least=1e-4, search=(0.01, 0.05))
    token_temperature: float = parameter(0.2, "of the softmax over tokens for each token", least=1e-4, search=())

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        among = candidates(picture)
        matrix = torch.cat([self._words(picture, among), self.share * self._tokens(picture, among)])
        return pick(matrix.mT, k, CoverageRule(), picture.cells)

    def _words(self, picture: Picture, among: torch.Tensor) -> torch.Tensor:
        """How well each token covers each word, ``(m, n)``; the rows sum to 1 / m."""
        return coverage(picture.question, picture.features, among, self.word_temperature)

    def _tokens(self, picture: Picture, among: torch.Tensor) -> torch.Tensor:
        seen = picture.encoded_tokens()
        return coverage(seen[among], seen, among, self.token_temperature)


def coverage(rows: torch.Tensor, tokens: torch.Tensor, among: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softmax over the tokens ``among`` of the cosines with each of ``rows``, over the number of rows: ``(rows, n)``."""
    rows, tokens = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (rows, tokens))
    logits = (rows @ tokens.t() / temperature).masked_fill(~among, float("-inf"))
    return logits.softmax(-1) / max(1, len(rows))
