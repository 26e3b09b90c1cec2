"""What drafting methods share: a method makes a drafter, which proposes trees and sees what became of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from laconic.budget import Budget
from laconic.claims import Claim
from laconic.decoding.sampling import Processor, Sampling, Text
from laconic.decoding.tree import DraftTree
from laconic.decoding.verify import Verdict
from laconic.method import Method, parameter

if TYPE_CHECKING:
    from laconic.decoding.runner import Runner

LOSSY = ("typical", "trust")  # verifiers that let through what the model would not have said


@dataclass(frozen=True)
class Step:
    """One forward of the target model, for a drafter to learn from.

    Attributes:
        tree: what was checked. output: the model's, with ``logits`` ``(batch, nodes, vocabulary)``, those of prompt rows behind
            them, and, where the method asks for them, ``hidden_states``. scores: the logits of nodes as processors left them.
            verdict: what came of it.
    """

    tree: DraftTree
    output: Any
    scores: torch.Tensor
    verdict: Verdict


@dataclass
class Setting:
    """What a drafter works in: the target model, how tokens are drawn, and what draws them.

    Attributes:
        prefill: the model's output for the prompt.
        tokenizer, ends, stop: as ``decode`` was given them.
        places: int64 ``(batch, n)``: which token of its text each row of the output's hidden states is, -1 for padding.
    """

    model: torch.nn.Module
    text: Text
    sampling: Sampling
    generator: torch.Generator | None
    prefill: Any = None
    inputs: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    ends: frozenset[int] = frozenset()
    stop: Callable[[int, list[int]], bool] | None = None
    places: torch.Tensor | None = None

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size


class Drafter:
    """The state of one run. ``propose`` is asked before every forward, ``observe`` told after it."""

    def __init__(self, method: DraftMethod, setting: Setting) -> None:
        self.method, self.setting = method, setting

    def begin(self, setting: Setting) -> None:
        """Told of a new run that goes on with what it knows."""
        self.setting = setting

    def propose(self, text: Text, room: int) -> DraftTree:
        """A tree for every row of the batch, of ``method.nodes`` nodes at most behind the root and no deeper than ``room``."""
        rows = [([ids[-1]], [-1]) if done else self.propose_row(row, ids, room)
                for row, (ids, done) in enumerate(zip(text.rows, text.done, strict=True))]  # fmt: skip
        return DraftTree.of_rows(rows)

    def propose_row(self, row: int, ids: list[int], room: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of one row's tree, the root, ``ids[-1]``, first. What ``propose`` asks unless it is replaced."""
        raise NotImplementedError

    def observe(self, step: Step, text: Text) -> None:
        """Told after every forward; ``text`` has the new tokens already."""

    @property
    def bytes(self) -> int:
        """Memory that it holds beside the target model: tables, a draft model's weights and cache."""
        return 0


@dataclass(frozen=True, kw_only=True)
class DraftMethod(Method):
    """Base of methods that propose tokens, which the model checks in one forward.

    The budget is the number of drafted tokens in a forward: ``token_recycling:24``. What comes out follows the model's own law,
    and with temperature 0 is the greedy text, whatever is drafted.
    """

    stage: ClassVar[str] = "draft"
    guarantee: ClassVar[str] = "exact in distribution"
    claims: ClassVar[tuple[Claim, ...]] = ()
    verifiers: ClassVar[tuple[str, ...]] = ("match", "typical")  # the first is the default
    hidden: ClassVar[bool] = False  # whether its drafter looks at the target model's hidden states

    budget: Budget = parameter(Budget(amount=16), "tokens drafted in each forward")  # noqa: RUF009
    verifier: str = parameter("", "how drafts are checked; the first is the default, typical is lossy", search=())

    def __post_init__(self) -> None:
        if self.verifier == "":
            object.__setattr__(self, "verifier", self.verifiers[0])
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        counted = self.budget.amount is not None and self.budget.shape == "uniform"
        self.require(counted, "its budget is the number of tokens drafted in each forward, such as 16.")
        super().__post_init__()
        self.require(self.verifier in self.verifiers, f"verifier must be one of {', '.join(self.verifiers)}.")

    def parameters(self) -> dict[str, Any]:
        own = super().parameters()
        if self.verifier == self.verifiers[0]:
            own.pop("verifier")
        return own

    @property
    def nodes(self) -> int:
        """The most drafted tokens in a forward."""
        return self.budget.amount

    @property
    def promise(self) -> str:
        """The guarantee with these parameters."""
        return "lossy" if self.verifier in LOSSY else self.guarantee

    def prepare(self, model: torch.nn.Module) -> None:
        """Loads what it needs beside the target model, before anything is timed."""

    def drafter(self, setting: Setting) -> Drafter:
        """The state of a new run."""
        raise NotImplementedError


class Chooser:
    """Chooses the next token of every row in the place of ``Sampling.choose``. The state of one run."""

    def choose(self, runner: Runner, logits: torch.Tensor, scores: torch.Tensor, text: Text) -> torch.Tensor:
        """int64 ``(batch,)``. Leaves ``runner`` as it was: what looks ahead does so on ``runner.branch(rows)``.

        Args:
            logits: ``(batch, vocabulary)``, the model's own; scores: as processors left them.
        """
        raise NotImplementedError

    def figures(self) -> dict[str, int]:
        """What it counted; ``forwards`` and ``nodes`` are those that looking ahead took."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SampleMethod(Method):
    """Base of methods that change which token comes next: by a processor, or in the place of the choice at a step.

    Order: processors, temperature, top-k, top-p, as in transformers; a chooser gets the logits before and after processors.
    A method with a loop of its own (``entry``) is run by that function, and refused by ``decode``.
    """

    stage: ClassVar[str] = "sample"
    takes_budget: ClassVar[bool] = False
    claims: ClassVar[tuple[Claim, ...]] = ()
    entry: ClassVar[str] = ""  # the function that runs it, where that is not decode

    def processors(self, setting: Setting) -> tuple[Processor, ...]:
        """Processors for ``Sampling``, new for every run."""
        return ()

    def chooser(self, setting: Setting) -> Chooser | None:
        """The state of a new run, where the method chooses itself."""
        return None


def go_on(ids: list[int], end: int, count: int) -> list[int]:
    """The ``count`` tokens that followed position ``end`` of a text; where it is over before, it is taken to repeat itself, as
    LZ77 (Ziv and Lempel, 1977) copies."""
    period = len(ids) - end
    return [ids[end + i % period] for i in range(count)]
