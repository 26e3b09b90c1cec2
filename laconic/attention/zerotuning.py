"""ZeroTuning: how much the first token weighs sharpens or flattens all other attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.attention.base import Call, ReweightMethod
from laconic.attention.head_search import Score, measure_answers
from laconic.cache import KVLayer
from laconic.method import parameter
from laconic.profiles import layer_tables, need_file
from laconic.registry import register

UP, DOWN = (1.5, 2.0, 3.0, 4.0), (0.75, 0.5, 0.25, 0.1)  # what is tried; heads are told apart by the second of each


@register
@dataclass(frozen=True, kw_only=True)
class ZeroTuning(ReweightMethod):
    """Multiplies the attention to the first token by ``gamma`` and divides all by their new sum, in prompts and in steps.

    The same as adding log(gamma) to its logit. Below 1, what the first token soaked up goes to the others in proportion;
    above 1 it soaks up more. Which helps depends on the task and the heads, so there is no good default but 1, which
    changes nothing: search gamma on examples of your own, for all heads with ``laconic tune``, or for each head with
    ``laconic profile zerotuning``, whose file then stands for ``gamma`` and ``heads``. It works as far as the model has a
    sink on its first token (see ``laconic explain sinks``); the built-in ``needle`` has none, and answers the same with any
    gamma from 0.1 to 10. Together with a method that evicts, let that one keep the first token (``sinks``). A prompt costs
    twice its dense attention.
    """

    id: ClassVar[str] = "zerotuning"
    paper: ClassVar[str] = "ZeroTuning: Unlocking the Initial Token's Power to Enhance LLMs Without Training (2025)"

    gamma: float = parameter(1.0, "what the weight of the first token is multiplied by; above 0", search=(0.25, 0.5, 2.0, 4.0))
    heads: str = parameter("all", "query heads that are tuned in every layer: all, or their numbers, such as 0;3;5")
    profile: str = parameter("", "a file of laconic profile zerotuning, with a gamma for every head; empty: gamma and heads")

    def check(self) -> None:
        super().check()
        need_file(self.id, self.profile)
        self.require(self.gamma > 0, "gamma must be above 0: at 0 the first token would see nothing.")
        numbers = self.heads.split(";")
        self.require(self.heads == "all" or all(n.strip().isdigit() for n in numbers), "heads is 'all' or numbers such as 0;3;5.")
        alone = not self.profile or (self.gamma == 1.0 and self.heads == "all")
        self.require(alone, "a profile has a gamma for every head: leave gamma and heads out.")

    def columns(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        if all(g == 1.0 for g in self.gammas(layer, call.query.shape[1])):
            return None
        return layer.slots_of(torch.zeros(layer.keys.shape[0], 1, 1, dtype=torch.int64, device=layer.keys.device))

    def factor(self, layer: KVLayer, mass: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.gammas(layer, mass.shape[1]), device=mass.device)[:, None]

    def gammas(self, layer: KVLayer, heads: int) -> list[float]:
        """The gamma of every query head of the layer."""
        if self.profile:
            return layer_tables(self.id, self.profile, layer)["gamma"][layer.index]
        chosen = set(range(heads)) if self.heads == "all" else {int(n) for n in self.heads.split(";")}
        self.require(max(chosen) < heads, f"heads={self.heads} names head {max(chosen)}, but there are {heads}.")
        return [self.gamma if head in chosen else 1.0 for head in range(heads)]

    @classmethod
    def calibrate(
        cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """Finds the heads that gain from a larger gamma and those that gain from a smaller one, and tunes the larger set.

        What counts is how well the texts are answered (see ``measure_answers``): with ``answers``, how often and how surely;
        without, how sure the model is of its next token. It takes two runs of all texts per head of the model.

        Returns:
            ``gamma``: ``[layers][heads]``, all 1 when nothing helps; ``before`` and ``after``: the score without and with it.
        """
        config = model.config.get_text_config()
        shape = (config.num_hidden_layers, config.num_attention_heads)

        def score(tuned: Sequence[tuple[int, int]], gamma: float) -> Score:
            table = torch.ones(shape)
            for layer, head in tuned:
                table[layer, head] = gamma
            return measure_answers(model, _Table.of(table.tolist()), texts, answers)

        before = score([], 1.0)
        groups: dict[tuple[float, ...], list[tuple[int, int]]] = {UP: [], DOWN: []}
        for at in [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]:
            best, grid = max((score([at], grid[1]), grid) for grid in groups)
            if best > before:
                groups[grid].append(at)
        grid, tuned = max(groups.items(), key=lambda group: len(group[1]))
        after, gamma = max((score(tuned, g), g) for g in grid) if tuned else (before, 1.0)
        table = torch.ones(shape)
        for at in tuned if after > before else []:
            table[at] = gamma
        return {"gamma": table.tolist(), "before": before, "after": max(before, after)}


class _Table(ZeroTuning):
    """A gamma for every head while they are searched."""

    table: list[list[float]]

    @classmethod
    def of(cls, table: list[list[float]]) -> _Table:
        method = cls()
        object.__setattr__(method, "table", table)
        return method

    def gammas(self, layer: KVLayer, heads: int) -> list[float]:
        return self.table[layer.index]
