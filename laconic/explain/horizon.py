"""How much a single picture token still tells a model at each layer, and from which layer on the picture is not needed.

Source: All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs (2025). What a token tells is the change of the
right answer's probability, so that this explains a model and cannot choose tokens: it knows the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.evaluation.calibration import answer_ids
from laconic.evaluation.workload import Work
from laconic.explain.replay import Replay, replay

FORMS = ("keep-one", "leave-one-out")


@dataclass(frozen=True)
class HorizonReport:
    """What ``information_horizon`` measured. Layer i means: from layer i on; the last column, one more than there are layers,
    is the whole picture.

    Attributes:
        information: ``(prompts, layers + 1, tokens)``: what each sampled token tells, a difference of probabilities; NaN where a
            prompt has fewer picture tokens.
        places: int64 ``(prompts, tokens)``: where these tokens stand in the prompt, -1 for none.
        log_probability: ``(prompts, layers + 1)``: of the answer without all picture tokens, per answer token, in nats.
        right: ``(prompts, layers + 1)``: 1 where the answer is then the greedy one, else 0.
        kinds: per prompt what it asks for, where its task says so.
        tolerance: share of the accuracy that may be lost beyond the horizon.
    """

    information: torch.Tensor
    places: torch.Tensor
    log_probability: torch.Tensor
    right: torch.Tensor
    kinds: tuple[str, ...]
    tolerance: float

    @property
    def layers(self) -> int:
        return self.right.shape[1] - 1

    @property
    def accuracy(self) -> torch.Tensor:
        """Share of right answers without all picture tokens from each layer on, ``(layers + 1,)``."""
        return self.right.mean(0)

    @property
    def horizon(self) -> int | None:
        """The first layer from which on, and from every deeper one, leaving out the picture costs less than the tolerance; None
        where the whole picture gives no right answer."""
        return first_free(self.accuracy, self.tolerance) if float(self.accuracy[-1]) else None

    @property
    def recipe(self) -> str | None:
        """What drops all picture tokens at the horizon, marks at the ends of rows apart; None where it lies at either end."""
        if not self.horizon or self.horizon == self.layers:
            return None
        return f"withdraw(at={round(self.horizon / self.layers, 3)}, threshold=1)"

    def only(self, kind: str) -> HorizonReport:
        """The same of the prompts that ask for one kind of thing."""
        chosen = torch.tensor([k == kind for k in self.kinds])
        tables = (self.information, self.places, self.log_probability, self.right)
        return HorizonReport(*(table[chosen] for table in tables), (kind,) * int(chosen.sum()), self.tolerance)

    def kind_horizons(self) -> dict[str, int | None]:
        """The horizon of each kind of question; empty where the task knows no kinds."""
        return {kind: self.only(kind).horizon for kind in sorted(set(self.kinds) - {""})}

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer, for tables and JSON; ``spread`` is the standard deviation over tokens and prompts."""
        columns = self.information.transpose(0, 1).flatten(1)
        known = [column[~column.isnan()] for column in columns]
        return [
            {
                "layer": layer,
                "information": float(known[layer].mean()),
                "spread": float(known[layer].std(correction=0)),
                "accuracy": float(self.accuracy[layer]),
                "log_probability": float(self.log_probability[:, layer].mean()),
            }
            for layer in range(self.layers + 1)
        ]


def first_free(accuracy: torch.Tensor, tolerance: float) -> int:
    """The first layer from which on no entry of ``accuracy`` (layers + 1,) is less than all but the tolerance of the last."""
    short = (accuracy < (1 - tolerance) * accuracy[-1]).nonzero()
    return int(short[-1]) + 1 if len(short) else 0


def information_horizon(
    model: torch.nn.Module,
    reader: Any,
    work: Work,
    *,
    form: str = "keep-one",
    tokens: int = 16,
    tolerance: float = 0.01,
    seed: int = 0,
) -> HorizonReport:
    """Measures on the questions of ``work`` what picture tokens tell the model at each layer.

    A token left out at layer i is in no key of layers i and deeper, and positions stay as they are. All tokens that stand for
    pictures count as such. The answer's probability is teacher-forced, the geometric mean over its tokens; an answer is right if
    it is the greedy one.

    Args:
        model, reader: a vision-language model and its processor, as ``laconic.load`` gives them.
        work: from ``laconic.evaluation.workload.open_work``.
        form: keep-one: the probability with this token alone, less that without any; leave-one-out: that with all, less that
            without this one, where tokens that tell the same hide each other.
        tokens: how many of each prompt's picture tokens are sampled.
        tolerance: share of the accuracy that may be lost beyond the horizon.
        seed: of the sample.
    """
    if form not in FORMS:
        raise LaconicError(f"There is no form '{form}' of token information: use {' or '.join(FORMS)}.")
    if not 0 <= tolerance < 1 or tokens < 1:
        raise LaconicError("tolerance is a share from 0 to below 1, and tokens at least 1: give such values.")
    need_answers(work)
    if work.metric == "regex":
        raise LaconicError(f"{work.task.name} has patterns for answers, which have no probability: give a text as 'answer'.")
    generator, found = torch.Generator().manual_seed(seed), []
    for item in work.items:
        inputs = {"input_ids": torch.tensor([item.ids]), **item.inputs}
        with replay(model, inputs, answer_ids(reader, item.example)) as again:
            pictured = again.pictured.nonzero()[:, 0].cpu()
            sample = pictured[torch.randperm(len(pictured), generator=generator)[:tokens]].sort().values
            found.append((sample, *token_information(again, sample, form)))
    kinds = tuple(str(item.example.meta.get("type", "")) for item in work.items)
    places, information, log_probability, right = zip(*found, strict=True)
    most = max(map(len, places))
    return HorizonReport(
        torch.stack([padded(values, most, float("nan")) for values in information]),
        torch.stack([padded(values, most, -1) for values in places]),
        torch.stack(log_probability), torch.stack(right), kinds, tolerance,
    )  # fmt: skip


def padded(values: torch.Tensor, count: int, value: float) -> torch.Tensor:
    """``values`` (..., k) with ``value`` behind them up to ``count``."""
    return torch.nn.functional.pad(values, (0, count - values.shape[-1]), value=value)


def need_answers(work: Work) -> None:
    """Refuses a task that shows no pictures, or has no answers."""
    if not all(item.example.pictures for item in work.items):
        raise LaconicError(
            f"{work.task.name} has prompts without pictures: use shapes_vqa, or a JSONL file with 'image' in its lines."
        )
    if work.metric in (None, "perplexity") or any(item.example.answer is None for item in work.items):
        raise LaconicError(f"{work.task.name} does not say what is right: give 'answer' in every line.")


def token_information(again: Replay, sample: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the tokens ``sample`` (m,) of one prompt tell at each layer, ``(layers + 1, m)``, and without any the answer's
    log-probability and whether it is right, ``(layers + 1,)`` each."""
    one = torch.zeros(len(sample), len(again.pictured), dtype=torch.bool, device=again.pictured.device)
    one[torch.arange(len(sample)), sample] = True
    kept = one | ~again.pictured if form == "keep-one" else ~one
    information, log_probability, right = [], [], []
    whole = again.chances(again.layers, kept[:1])
    for layer in range(again.layers):
        without = again.chances(layer, ~again.pictured[None])
        varied = again.chances(layer, kept)[0].exp()
        information.append(varied - without[0].exp() if form == "keep-one" else whole[0].exp() - varied)
        log_probability.append(without[0])
        right.append(without[1])
    information.append(torch.zeros(len(sample)))  # no layer is left that reads their keys
    return torch.stack(information), torch.cat([*log_probability, whole[0]]), torch.cat([*right, whole[1]]).float()


def summary(report: HorizonReport) -> str:
    """What the report says, in a sentence or two."""
    count, share = len(report.right), f"{report.tolerance:.3g}"
    if report.horizon is None:
        return f"The model answers none of these {count} questions right, so that nothing can be lost: use one that can see."
    if report.horizon == 0:
        return f"These {count} questions are answered as well without the picture."
    if report.recipe is None:
        return f"The picture is needed up to the last of {report.layers} layers."
    kinds = ", ".join(f"{kind} {'–' if layer is None else layer}" for kind, layer in report.kind_horizons().items())
    return (
        f"From layer {report.horizon} of {report.layers} on, leaving out the picture costs less than {share} of the accuracy on "
        f"these {count} questions: {report.recipe} drops it there." + (f" By kind: {kinds}." if kinds else "")
    )


def horizon_table(report: HorizonReport) -> Any:
    """A rich table: a line per layer with what a token tells there, and the accuracy without the picture from there on, for all
    questions and for each kind."""
    from rich.table import Table

    kinds = list(report.kind_horizons())
    table = Table(box=None)
    for heading in ("from layer", "information", "spread", "log p", "accuracy", *kinds):
        table.add_column(heading, justify="right")
    columns = [report.only(kind).accuracy for kind in kinds]
    for row in report.rows():
        layer = row["layer"]
        style = "bold" if layer == report.horizon else "dim" if layer == report.layers else ""
        name = "never" if layer == report.layers else str(layer)
        cells = [f"{row['information']:.4f}", f"{row['spread']:.4f}", f"{row['log_probability']:.2f}", f"{row['accuracy']:.2f}"]
        table.add_row(name, *cells, *(f"{float(column[layer]):.2f}" for column in columns), style=style)
    return table
