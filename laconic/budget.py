"""How many tokens may stay."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from laconic.errors import LaconicError, quote

SHAPES = ("uniform", "pyramid")
_FORM = re.compile(r"(?:(?P<shape>[a-z]+):)?(?P<number>[0-9]{1,18}(?:\.[0-9]+)?)(?P<percent>%?)")


@dataclass(frozen=True)
class Budget:
    """A number of tokens or a share of them, kept per KV head and layer.

    Exactly one of ``amount`` (tokens) and ``share`` (0 < share <= 1, the share *kept*) is set. ``shape`` spreads the
    budget over the layers: ``uniform`` gives each layer the same, ``pyramid`` falls linearly from 1.5 times the mean in
    the first layer to 0.5 times in the last (PyramidKV, 2024), with the same total.
    """

    amount: int | None = None
    share: float | None = None
    shape: str = "uniform"

    def __post_init__(self) -> None:
        if (self.amount is None) == (self.share is None):
            raise LaconicError("A budget is either a number of tokens (256) or a share of them (10%), not both.")
        if self.amount is not None and self.amount < 1:
            raise LaconicError(f"Budget {self.amount} keeps no token: give at least 1 token, or a share such as 10%.")
        if self.share is not None and not 0 < self.share <= 1:
            raise LaconicError(f"Budget {self.share:.6g} is not a share: give more than 0% and at most 100%.")
        if self.shape not in SHAPES:
            raise LaconicError(f"Budget shape '{self.shape}' is unknown: use one of {', '.join(SHAPES)}.")

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """``"256"`` is tokens, ``"10%"`` is a share kept, ``"pyramid:10%"`` spreads it over the layers."""
        if isinstance(text, Budget):
            return text
        match = _FORM.fullmatch(str(text).strip().lower())
        if match is None:
            raise LaconicError(
                f"Budget {quote(text)} is not understood: give tokens (256), a share kept (10%), or pyramid:10%."
            )
        shape = match["shape"] or "uniform"
        if match["percent"]:
            share = float(Decimal(match["number"]) / 100)  # decimal, so that text -> budget -> text is exact
            if not 0 < share <= 1:
                raise LaconicError(f"Budget {quote(text)} is out of range: give more than 0% and at most 100%.")
            return cls(share=share, shape=shape)
        if "." in match["number"]:
            raise LaconicError(f"Budget {quote(text)} is ambiguous: write {match['number'][:20]}% for a share, or whole tokens.")
        return cls(amount=int(match["number"]), shape=shape)

    def tokens(self, n: int, *, layer: int = 0, layers: int = 1) -> int:
        """Tokens that may stay out of ``n`` in ``layer`` of ``layers``: between 1 (0 when n is 0) and n."""
        wanted = float(min(self.amount, 2 * n)) if self.amount is not None else self.share * n
        if self.shape == "pyramid" and layers > 1 and not self.is_full:
            wanted *= 1.5 - layer / (layers - 1)
        return min(n, max(1, math.ceil(wanted - 1e-9)))

    @property
    def is_full(self) -> bool:
        """Whether everything stays at any length."""
        return self.share == 1.0

    def __str__(self) -> str:
        size = str(self.amount) if self.amount is not None else f"{_plain(Decimal(repr(self.share)) * 100)}%"
        return size if self.shape == "uniform" else f"{self.shape}:{size}"


def _plain(number: Decimal) -> str:
    """All digits, without an exponent and without zeros at the end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
