"""Attention debiasing: what late tokens draw because they are late does not count."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from laconic.attention.base import Call
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.errors import LaconicError, quote
from laconic.method import parameter
from laconic.primitives.merge import Merge
from laconic.profiles import layer_tables, need_file
from laconic.registry import register
from laconic.vision.base import PICTURE_CLAIMS, better_than
from laconic.vision.inside import Entries, InsideMethod, attention_of_last, pictures_in


@register
@dataclass(frozen=True, kw_only=True)
class AttentionDebias(InsideMethod):
    """Lets another method choose by attention that is divided by its trend over the picture, and takes padding out of the choice.

    Words attend more to late picture tokens than to early ones, whatever they show. A profile holds the trend of every layer, an
    exponential fitted to the mean attention at each place over many prompts; scores are divided by it. Tokens that show only
    padding count as 0 (where pixels come as patches, as in Qwen-VL, there is none). The other method is named first:
    ``attention_debias(fastv):11%``. Calibrate on prompts that are not those of the comparison. Of a method that drops in stages
    the released code changes the first choice only, and leaves the later ones to the scores as they are: ``faithful_code`` does
    so too.
    """

    id: ClassVar[str] = "attention_debias"
    paper: ClassVar[str] = "Attention Debiasing for Token Pruning in Vision Language Models (2025)"
    needs: ClassVar[str] = "calibration"
    calibrates_on: ClassVar[str] = "pictures"
    claims: ClassVar[tuple[Claim, ...]] = (*PICTURE_CLAIMS, better_than("fastv"))

    of: str = parameter("fastv", "the method whose scores are debiased, with its parameters")
    profile: str = parameter("", "file made by laconic profile; empty: the one that comes with a built-in model", search=())
    padding: bool = parameter(True, "take tokens that show only padding out of the choice")
    faithful_code: bool = parameter(False, "as released: of several stages only the first is changed", search=())

    def check(self) -> None:
        super().check()
        need_file(self.id, self.profile)
        self.require(
            isinstance(self.inner, InsideMethod) and self.inner.takes_budget and not isinstance(self.inner, AttentionDebias),
            f"{self.of} is no method that drops picture tokens between layers by scores: give one such as fastv.",
        )

    @functools.cached_property
    def inner(self) -> InsideMethod:
        """The method whose scores are used, at this budget."""
        from laconic.recipe import Recipe

        try:
            methods = Recipe.parse(self.of).methods
        except LaconicError as error:
            raise LaconicError(f"{self.id}: of={quote(self.of)} is no method: {error}") from None
        self.require(len(methods) == 1 and methods[0].budget.is_full, "of names one method, without a budget.")
        return dataclasses.replace(methods[0], budget=self.budget) if isinstance(methods[0], InsideMethod) else methods[0]

    @property
    def watches_parts(self) -> tuple[str, ...]:
        return getattr(self.inner, "watches_parts", ())

    @property
    def adds(self) -> bool:
        return self.inner.adds

    @property
    def narrows_steps(self) -> bool:
        return getattr(self.inner, "narrows_steps", False)

    def watched(self, *args: Any) -> None:
        self.inner.watched(*args)

    def stays(self, n: int, given: tuple[int, ...]) -> dict[int, int]:
        return self.inner.stays(n, given)

    def worth(self, layer: KVLayer, call: Call) -> torch.Tensor:
        slope = layer_tables(self.id, self.profile, layer)["slope"][layer.index]
        worth = self.inner.worth(layer, call)
        for held in pictures_in(layer):
            row, slots = held.row, held.slots
            if self.faithful_code and layer.index > min(self.plan(layer.request, held.size, held.given)):
                continue
            worth[row, slots] /= (slope * held.places / held.size).exp()
            if self.padding:
                picture = layer.request.looked[held.number]
                worth[row, slots[picture.padding()[picture.cells][held.places]]] = -1.0
        return worth

    def reduce(self, layer: KVLayer, picture: Entries, worth: torch.Tensor, k: int) -> Merge:
        return self.inner.reduce(layer, picture, worth, k)

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """The slope and height of each layer's trend over the picture, from the last token's attention in ``texts``."""
        from laconic import apply
        from laconic.recipe import Recipe

        seen = Trend()
        with apply(model, Recipe((seen,))), torch.inference_mode():
            for inputs in texts:
                model(**{name: value.to(next(model.parameters()).device) for name, value in inputs.items()})
        fits = [fit(np.concatenate(at), np.concatenate(given)) for at, given in zip(*seen.found(), strict=True)]
        return {"slope": [slope for slope, _ in fits], "height": [height for _, height in fits]}


@dataclass(frozen=True, kw_only=True)
class Trend(InsideMethod):
    """Drops nothing; notes the last token's attention to every place of a picture, layer by layer."""

    id: ClassVar[str] = "trend"
    paper: ClassVar[str] = ""

    def leave(self, layer: KVLayer, call: Call) -> None:
        for held in pictures_in(layer):
            given = attention_of_last(layer, call)[held.row, held.slots]
            self._notes.setdefault(layer.index, []).append(((held.places / held.size).cpu().numpy(), given.cpu().numpy()))

    @functools.cached_property
    def _notes(self) -> dict[int, list[tuple[np.ndarray, np.ndarray]]]:
        return {}

    def found(self) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
        """Places and attention, a list of arrays per layer each."""
        layers = [self._notes[index] for index in sorted(self._notes)]
        return [[at for at, _ in notes] for notes in layers], [[given for _, given in notes] for notes in layers]


def fit(at: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """Slope and height of ``height * exp(slope * at)``: least squares on the means of 32 stretches, from the logarithms' line."""
    from scipy.optimize import curve_fit

    stretch = np.minimum((at * 32).astype(int), 31)
    used = [i for i in range(32) if (stretch == i).any()]
    x = np.array([at[stretch == i].mean() for i in used])
    y = np.array([given[stretch == i].mean() for i in used]) + 1e-12
    slope, log = np.polyfit(x, np.log(y), 1)
    try:
        (height, slope), _ = curve_fit(lambda t, h, s: h * np.exp(s * t), x, y, p0=(np.exp(log), slope), maxfev=2000)
    except RuntimeError:  # it does not converge: the line will do
        height = np.exp(log)
    return float(slope), float(height)
