"""What a method is: a frozen dataclass whose fields are its parameters."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from laconic.budget import Budget
from laconic.claims import Claim, outcome_sentence, outcomes
from laconic.errors import LaconicError, quote

GUARANTEES = ("exact", "exact in distribution", "properly weighted", "lossy")
NEEDS = ("nothing", "calibration", "training")


def parameter(default: Any, help: str, *, least: float | None = None, search: Sequence[Any] | None = None) -> Any:
    """A dataclass field with a default, one line of help, which the catalogue shows, and the ``least`` value allowed.

    ``search``: the values that ``laconic tune`` tries beside the default; without it both of a bool, and half and double of
    a number. An empty one leaves the parameter alone.
    """
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "search": search})


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. A subclass is a frozen, keyword-only dataclass; its docstring is its catalogue entry."""

    id: ClassVar[str]
    stage: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str] = "nothing"
    guarantee: ClassVar[str] = "lossy"
    verbs: ClassVar[tuple[str, ...]] = ()
    takes_budget: ClassVar[bool] = True  # False: it leaves nothing out, so there is nothing to budget
    claims: ClassVar[tuple[Claim, ...]] = ()  # what it is expected to show; measured by laconic compare --suite cards

    budget: Budget = parameter(  # noqa: RUF009 (returns a dataclass field)
        Budget(share=1.0), "tokens (256) or share (10%) kept per KV head and layer")

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        for field in dataclasses.fields(self):
            if field.name != "budget":
                object.__setattr__(self, field.name, _coerce(self.id, field, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raises LaconicError when parameters do not fit together. Called on construction."""

    def require(self, condition: bool, sentence: str) -> None:
        """Raises a LaconicError that names the method unless ``condition`` holds."""
        if not condition:
            raise LaconicError(f"{self.id}: {sentence}")

    def parameters(self) -> dict[str, Any]:
        """Parameters that differ from their defaults, budget apart."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "budget" and getattr(self, f.name) != f.default
        }

    def __str__(self) -> str:
        inner = ", ".join(str(v) if name == "of" else f"{name}={v}" for name, v in self.parameters().items())
        return self.id + (f"({inner})" if inner else "") + ("" if self.budget == Budget(share=1.0) else f":{self.budget}")

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """The catalogue row: id, stage, paper, needs, guarantee, verbs, takes_budget, parameters, summary, text, measured."""
        text = inspect.cleandoc(cls.__doc__ or "")
        return {
            "id": cls.id,
            "stage": cls.stage,
            "paper": cls.paper,
            "needs": cls.needs,
            "guarantee": cls.guarantee,
            "verbs": list(cls.verbs),
            "takes_budget": cls.takes_budget,
            "parameters": [
                {
                    "name": f.name,
                    "type": str(f.type),
                    "default": str(f.default) if isinstance(f.default, Budget) else f.default,
                    "help": f.metadata.get("help", ""),
                }
                for f in dataclasses.fields(cls)
            ],
            "summary": text.split("\n\n")[0].replace("\n", " "),
            "text": text,
            "measured": [outcome_sentence(row) for row in outcomes().get(cls.id, [])],
        }


def _coerce(method_id: str, field: dataclasses.Field, value: Any) -> Any:
    """Turns the text of a recipe into the type of the field's default, so that recipes and Python agree."""
    kind = type(field.default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float) and not isinstance(value, bool):
            return _number(method_id, field, value)
    except (KeyError, ValueError, TypeError, OverflowError):
        pass
    if kind is str and isinstance(value, str):
        return value
    raise LaconicError(f"{method_id}: {field.name}={quote(value)} does not fit: give a value like {field.default!r}.")


def _number(method_id: str, field: dataclasses.Field, value: Any) -> int | float:
    number, least = type(field.default)(value), field.metadata.get("least")
    if math.isnan(number) or (isinstance(value, float) and number != value):
        raise ValueError  # not a number, or a fraction where a whole number is due
    if least is not None and number < least:
        raise LaconicError(f"{method_id}: {field.name}={quote(value)} is too small: give at least {least}.")
    return number
