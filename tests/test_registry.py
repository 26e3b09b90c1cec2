from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

import laconic
from laconic import LaconicError, Method, registry
from laconic.method import GUARANTEES, NEEDS, parameter

ROWS = laconic.methods()
IDS = [row["id"] for row in ROWS]


def one_sentence(error: pytest.ExceptionInfo[LaconicError]) -> str:
    message = str(error.value)
    assert "\n" not in message and message[-1] in ".?" and len(message) < 400, message
    return message


def test_the_catalogue_has_the_methods_of_the_attention_stage() -> None:
    promised = {"dense", "random", "streaming", "knorm", "tova", "snapkv", "h2o", "tokenselect", "recycled_attention"}
    assert promised <= set(IDS)
    assert len(IDS) == len(set(IDS))
    assert [(r["stage"], r["id"]) for r in ROWS] == sorted((r["stage"], r["id"]) for r in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_catalogue_row_is_complete(row: dict) -> None:
    assert {"id", "stage", "paper", "needs", "guarantee", "verbs", "parameters", "summary", "text"} <= set(row)
    assert row["needs"] in NEEDS and row["guarantee"] in GUARANTEES
    assert row["stage"] and row["paper"]
    assert row["text"] != (Method.__doc__ or "") and not row["text"].startswith(f"{registry.find(row['id']).__name__}(")
    assert len(row["text"].split()) >= 20, "the docstring is the catalogue entry: say what the method does"
    assert row["summary"].endswith(".") and len(row["summary"]) < 200
    for item in row["parameters"]:
        assert {"name", "type", "default", "help"} <= set(item)
        assert len(item["help"]) > 8, f"{row['id']}.{item['name']} has no help"
    assert row["parameters"][0]["name"] == "budget"


@pytest.mark.parametrize("name", IDS)
def test_a_method_is_frozen_and_its_defaults_construct(name: str) -> None:
    method = laconic.get(name)
    assert laconic.get(name) == method and hash(method) == hash(laconic.get(name))
    assert method.parameters() == {}
    with pytest.raises(AttributeError):
        method.budget = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", IDS)
def test_every_parameter_refuses_nonsense_in_one_sentence(name: str) -> None:
    cls = registry.find(name)
    for field in fields(cls):
        kind = type(field.default)
        wrong = [None, [], float("nan"), *([] if field.default == "" or field.name == "end" else [""])]
        wrong += [] if field.name in {"model", "words", "end"} else ["banana"]  # any word may be a model's name, or meant itself
        if kind in (int, float) and field.name in {"sinks", "recent", "window", "every", "kernel"}:
            wrong.append(-1)
        if kind is int:
            wrong += [True, 1.5, "1.5"]
        if kind is bool:
            wrong += [2, "yes"]
        for value in wrong:
            with pytest.raises(LaconicError) as error:
                laconic.get(name, **{field.name: value})
            assert field.name in one_sentence(error).lower(), (field.name, value)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(LaconicError, match="did you mean 'tokenselect'") as error:
        laconic.get("token_select")
    one_sentence(error)
    with pytest.raises(LaconicError, match="laconic methods"):
        laconic.get("zzzzzz")


def test_an_unknown_parameter_gets_the_known_ones() -> None:
    with pytest.raises(LaconicError, match="refresh") as error:
        laconic.get("tokenselect", refesh=0.9)
    one_sentence(error)


def test_text_and_python_values_agree() -> None:
    typed = laconic.get("tokenselect", budget=256, refresh=0.5, per_head=True, sinks=2)
    assert laconic.get("tokenselect", budget="256", refresh="0.5", per_head="true", sinks="2") == typed
    assert laconic.get("tokenselect", refresh=1).refresh == 1.0


def test_a_method_of_somebody_else_is_registered_once_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    laconic.methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @laconic.register
    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        """Keeps what pleases me."""

        id: ClassVar[str] = "mine"
        stage: ClassVar[str] = "attention"
        paper: ClassVar[str] = "mine"
        strength: float = parameter(0.5, "how much")

    assert laconic.get("mine", strength="2").strength == 2.0
    assert "mine" in [row["id"] for row in laconic.methods()]

    @dataclass(frozen=True, kw_only=True)
    class Thief(Method):
        """Takes a name that is taken."""

        id: ClassVar[str] = "mine"
        stage: ClassVar[str] = "attention"
        paper: ClassVar[str] = "none"

    with pytest.raises(LaconicError, match="Two methods"):
        laconic.register(Thief)
    with pytest.raises(LaconicError, match="not a method"):
        laconic.register(dict)  # type: ignore[type-var]


def test_an_entry_point_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, value = "broken", "elsewhere:Broken"

        def load(self) -> type:
            raise ImportError("no module named elsewhere")

    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken()] if group == "laconic.methods" else [])
    with pytest.raises(LaconicError, match="broken") as error:
        registry._load()
    one_sentence(error)
