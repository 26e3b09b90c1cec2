"""Whether a model reads its pictures or only the words: MDI and AEI from the rows of attention that an answer is read from.

Source: When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models (2025). Both compare the attention
of a kind of tokens with their number, so that they fall when tokens are left out, whether or not the rest is read any better:
beside them stands what the picture is worth, the accuracy with it and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.attention.base import AttentionMethod, Call
from laconic.attention.engine import Policy
from laconic.cache import KVLayer
from laconic.evaluation import metrics
from laconic.evaluation.measure import Item, Runner
from laconic.evaluation.workload import Work
from laconic.explain.horizon import need_answers
from laconic.hooks import apply
from laconic.kernels.ragged import dense
from laconic.models.pictures import find_eyes
from laconic.primitives.scores import attention_received
from laconic.recipe import Recipe
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.picture import Picture

LEAST = 1e-10  # attention below which a share counts as this


@dataclass(frozen=True)
class Indices:
    """MDI and AEI, of any shape alike: 1 is even, an MDI above 1 says that words draw more than their number.

    Attributes:
        mdi: attention per word token over attention per picture token.
        aei_text, aei_picture: share of the attention over share of the tokens; their quotient is the MDI.
    """

    mdi: torch.Tensor
    aei_text: torch.Tensor
    aei_picture: torch.Tensor


def indices(attention: torch.Tensor, tokens: torch.Tensor) -> Indices:
    """From attention to words and to pictures ``(..., 2)``, of any scale, and how many tokens of each there are ``(..., 2)``;
    NaN where one kind has none."""
    share = attention.clamp(min=LEAST) / attention.clamp(min=LEAST).sum(-1, keepdim=True)
    aei = (share / (tokens / tokens.sum(-1, keepdim=True))).masked_fill((tokens == 0).any(-1, keepdim=True), float("nan"))
    return Indices(aei[..., 0] / aei[..., 1], aei[..., 0], aei[..., 1])


def layer_groups(layers: int) -> dict[str, list[int]]:
    """Which layers are early, middle and late: two each, or one where there are no more."""
    middle = max(0, layers // 2 - 1)
    groups = {"early": range(2), "middle": range(middle, middle + 2), "late": range(layers - 2, layers)}
    return {name: [index for index in group if 0 <= index < layers] for name, group in groups.items()}


@dataclass(frozen=True)
class DominanceReport:
    """What ``text_dominance`` measured, recipe by recipe.

    Attributes:
        recipes: what was applied.
        attention: ``(recipes, prompts, layers, 3)``: of a row, mean over rows and heads, to the words of the prompt but its
            first token, to its pictures, and to the first token.
        tokens: of the same shape: how many of each a row sees in that layer.
        accuracy: per recipe; blind: the same of the dense model without any picture token.
    """

    recipes: tuple[str, ...]
    attention: torch.Tensor
    tokens: torch.Tensor
    accuracy: tuple[float, ...]
    blind: float

    def of(self, first: bool) -> Indices:
        """Per prompt and layer, ``(recipes, prompts, layers)``; the ``first`` token counts as a word, or not at all."""
        pairs = []
        for table in (self.attention, self.tokens):
            words = table[..., 0] + table[..., 2] if first else table[..., 0]
            pairs.append(torch.stack([words, table[..., 1]], -1))
        return indices(*pairs)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per recipe and group of layers: means over its layers and the prompts, of ratios that were taken in each;
        None where no layer of the group has picture tokens. ``gain`` is what the picture adds to the accuracy."""
        every, later = self.of(True), self.of(False)
        rows = []
        for number, recipe in enumerate(self.recipes):
            for name, layers in layer_groups(self.attention.shape[2]).items():
                at = (number, slice(None), layers)
                rows.append(
                    {
                        "recipe": recipe,
                        "group": name,
                        "layers": layers,
                        "picture_tokens": float(self.tokens[at][..., 1].mean()),
                        "mdi": mean_known(every.mdi[at]),
                        "aei_text": mean_known(every.aei_text[at]),
                        "aei_picture": mean_known(every.aei_picture[at]),
                        "mdi_without_first": mean_known(later.mdi[at]),
                        "aei_text_without_first": mean_known(later.aei_text[at]),
                        "aei_picture_without_first": mean_known(later.aei_picture[at]),
                        "accuracy": self.accuracy[number],
                        "accuracy_blind": self.blind,
                        "gain": self.accuracy[number] - self.blind,
                    }
                )
        return rows


def mean_known(values: torch.Tensor) -> float | None:
    """Mean of what is no NaN."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def text_dominance(
    model: torch.nn.Module, reader: Any, work: Work, recipes: Sequence[str | Recipe] = ("dense",)
) -> DominanceReport:
    """Measures on the questions of ``work`` how attention is shared between words and pictures, under each recipe.

    The rows are those from which the tokens of the greedy answer are read: the prompt's last one, and one for every token after
    the first. Each is computed from its query and the keys that the cache holds then. Columns are tokens of the prompt: those
    that stand for pictures, and all others (special ones too) as words; none of the answer. Tokens that a recipe has left out
    count neither as attention nor as tokens.

    Args:
        model, reader: a vision-language model and its processor, as ``laconic.load`` gives them.
        work: from ``laconic.evaluation.workload.open_work``.
    """
    need_answers(work)
    runner, chosen = Runner(model, reader), [Recipe.parse(recipe) for recipe in recipes]
    measured = [_measure(runner, work, recipe) for recipe in chosen]
    blind = _measure(runner, work, Recipe((Blind(budget=1),)))
    accuracy, attention, tokens = zip(*measured, strict=True)
    return DominanceReport(tuple(map(str, chosen)), torch.stack(attention), torch.stack(tokens), accuracy, blind[0])


def _measure(runner: Runner, work: Work, recipe: Recipe) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Accuracy, and of each prompt and layer the attention and tokens ``(prompts, layers, 3)``."""
    right, tables = [], []
    with apply(runner.model, recipe) as handle:
        for item in work.items:
            rows = handle.policy = Rows(recipe, runner.model, pictured_in(runner.model, item))
            answer = runner.text(runner.run(item, handle).own)
            right.append(metrics.score(work.metric, answer, item.example.answer, item.example.choices))
            tables.append(torch.stack([torch.stack(rows.found[layer]).mean(0) for layer in sorted(rows.found)]))
    table = torch.stack(tables)  # (prompts, layers, 2, 3)
    return sum(right) / len(right), table[:, :, 0], table[:, :, 1]


def pictured_in(model: torch.nn.Module, item: Item) -> torch.Tensor:
    """Which tokens of a prompt stand for pictures, bool ``(n,)``."""
    return torch.tensor(item.ids) == find_eyes(model).image


class Rows(Policy):
    """What a recipe does in every attention call, and before that, the last row's attention to words, pictures and the first
    token of a prompt (batch 1).

    Attributes:
        found: per layer and call ``(2, 3)``: attention, mean over heads, and how many tokens it is shared by.
    """

    def __init__(self, recipe: Recipe, model: torch.nn.Module, pictured: torch.Tensor) -> None:
        super().__init__(tuple(m for m in recipe.methods if isinstance(m, AttentionMethod)))
        self.model, self.found = model, {}
        self.kind = pictured.long()  # 0: words, 1: pictures, 2: the first token
        self.kind[0] = 2

    def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        self.found.setdefault(layer.index, []).append(self._shares(layer, call))
        return super().attend(layer, call)

    def _shares(self, layer: KVLayer, call: Call) -> torch.Tensor:
        starts = layer.starts(call.window)
        received = attention_received(
            call.last[:, :, None], dense(layer.keys), scale=call.scale, softcap=call.softcap, starts=starts, window=call.window
        )[0]
        positions = layer.shared_positions[0].expand(len(received), -1).to(received.device)
        seen = (positions >= 0) & (positions < len(self.kind))
        if starts is not None:
            seen &= torch.arange(layer.n, device=seen.device) >= starts[0, :, None]
        kinds = self.kind.to(positions.device)[positions.clamp(0, len(self.kind) - 1)]
        masks = torch.stack([(kinds == kind) & seen for kind in range(3)])  # (3, kv_heads, n)
        return torch.stack([(received * masks).sum(-1).mean(-1), masks.sum(-1).float().mean(-1)]).cpu()


@dataclass(frozen=True, kw_only=True)
class Blind(VisionMethod):
    """Leaves nothing of a picture but marks at the ends of rows; all other tokens stand where they stood."""

    id: ClassVar[str] = "blind"
    paper: ClassVar[str] = ""

    def reduce(self, picture: Picture, k: int) -> Reduction:
        return Reduction(picture.cells[:0])


def summary(report: DominanceReport) -> str:
    """What the report says about its first recipe, in one sentence."""
    late = report.rows()[2]
    if late["mdi"] is None:
        return f"Late layers hold no picture token; the picture adds {late['gain']:+.2f} to an accuracy of {report.blind:.2f}."
    return (
        f"In late layers a word draws {late['mdi']:.1f} times the attention of a picture token ({late['mdi_without_first']:.1f} "
        f"times without the first token); the picture adds {late['gain']:+.2f} to an accuracy of {report.blind:.2f} without it."
    )


def dominance_table(report: DominanceReport) -> Any:
    """A rich table: a line per recipe and group of layers."""
    from rich.table import Table

    table = Table(box=None)
    headings = ("recipe", "layers", "picture tokens", "MDI", "AEI words", "AEI picture", "MDI without first", "accuracy", "blind")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("recipe", "layers") else "right")
    names = ("mdi", "aei_text", "aei_picture", "mdi_without_first", "accuracy", "accuracy_blind")
    for row in report.rows():
        cells = ["–" if row[name] is None else f"{row[name]:.2f}" for name in names]
        recipe = row["recipe"] if row["group"] == "early" else ""
        table.add_row(recipe, row["group"], f"{row['picture_tokens']:.0f}", *cells)
    return table
