"""What methods are expected to show, and how it is measured and recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

import laconic
from laconic import claims
from laconic.attention.streaming import Streaming
from laconic.claims import Claim
from laconic.cli import app
from laconic.errors import LaconicError
from laconic.evaluation.suite import run_suite

CHEAP = {"task": "needle", "lengths": (256,), "samples": 2, "budget": "40"}


@pytest.fixture
def boaster():
    """A method with two claims: one that must hold, one that cannot."""
    from laconic import registry

    @laconic.register
    @dataclass(frozen=True, kw_only=True)
    class Boaster(Streaming):
        """Boasts."""

        id: ClassVar[str] = "boaster"
        claims: ClassVar[tuple[Claim, ...]] = (
            Claim("dense", "bytes_kept", by=2, **CHEAP), Claim("streaming", "quality", by=0.5, **CHEAP),
        )  # fmt: skip

    yield Boaster
    registry._methods.pop("boaster")


def test_better_means_more_of_quality_and_less_of_cost() -> None:
    assert Claim("random", by=0.5).holds(0.75, 0.25) and not Claim("random", by=0.5).holds(0.7, 0.25)
    assert Claim("dense", "bytes_read", by=4).holds(25, 100) and not Claim("dense", "bytes_read", by=4).holds(26, 100)
    assert Claim("dense", "kl").holds(1.0, 1.0) and not Claim("dense").holds(None, 1.0)
    assert str(Claim("random")) == "quality at least random's, at 10% on needle of 4,096 tokens"
    assert str(Claim("dense", "bytes_read", by=4, question="after")) == (
        "bytes read at most dense's / 4, at 10% on needle of 4,096 tokens, chosen before the question"
    )


def test_every_claim_can_be_planned() -> None:
    for row in laconic.methods():
        for claim in laconic.registry.find(row["id"]).claims:
            if claim.rival != "dense" and ":" not in claim.rival:
                laconic.registry.find(claim.rival)
            laconic.Budget.parse(claim.budget)


def test_outcomes_say_what_holds_and_what_does_not(boaster, tmp_path: Path) -> None:
    rows = run_suite(names=["boaster"], output=tmp_path, progress=False)
    assert [row["holds"] for row in rows] == [True, False]
    assert rows[0]["value"] * 2 <= rows[0]["rival_value"] and rows[1]["value"] == rows[1]["rival_value"]
    written = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(rows))
    again = CliRunner().invoke(app, ["compare", "--suite", "cards", "--methods", "boaster", "-o", str(tmp_path), "--json"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout) == written, "what was measured is read, not measured again"


def test_outcomes_are_shown_with_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"claim": str(Claim("random")), "value": 0.2, "rival_value": 0.4, "holds": False}
    monkeypatch.setattr("laconic.method.outcomes", lambda: {"h2o": [row]})
    measured = laconic.registry.find("h2o").describe()["measured"]
    assert measured == ["does not hold: quality at least random's, at 10% on needle of 4,096 tokens (0.2 against 0.4)"]
    assert measured[0] in CliRunner().invoke(app, ["methods", "h2o"]).stdout.replace("\n", " ").replace("  ", " ")


def test_recorded_outcomes_belong_to_methods_and_their_claims() -> None:
    for method, rows in claims.outcomes().items():
        known = {str(claim) for claim in laconic.registry.find(method).claims}
        assert {row["claim"] for row in rows} <= known, f"{method}: run laconic compare --suite cards again"


def test_unknown_suites_and_methods_without_claims_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaconicError, match="no suite 'x'"):
        run_suite("x", output=tmp_path)
    with pytest.raises(LaconicError, match="makes no claim"):
        run_suite(names=["dense"], output=tmp_path)
