from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import laconic
from laconic import Budget, LaconicError, Recipe, registry

IDS = [row["id"] for row in laconic.methods()]


def assert_one_sentence(error: LaconicError) -> None:
    message = str(error)
    assert "\n" not in message and "Traceback" not in message, message
    assert message[-1] in ".?", message


def test_parts_are_name_parameters_budget() -> None:
    recipe = Recipe.parse(" snapkv( window = 8, kernel=3 ) : 20% +tokenselect(refresh=0.95):256 ")
    first, second = recipe.methods
    assert (first.id, first.window, first.kernel, first.budget) == ("snapkv", 8, 3, Budget(share=0.2))
    assert (second.id, second.refresh, second.budget) == ("tokenselect", 0.95, Budget(amount=256))
    assert str(recipe) == "snapkv(window=8, kernel=3):20% + tokenselect(refresh=0.95):256"


def other_values(field: object, default: object) -> list[object]:
    """Values for a parameter that differ from its default, for round trips."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 2]
    if isinstance(default, float):
        return [default / 3 + 0.1, 1e-7]
    return []


@pytest.mark.parametrize("name", IDS)
def test_every_parameter_survives_text_and_file(name: str, tmp_path: Path) -> None:
    cls = registry.find(name)
    tried = [laconic.get(name)]
    for field in fields(cls):
        for value in other_values(field, field.default):
            try:
                tried.append(laconic.get(name, **{field.name: value}))
            except LaconicError:
                continue  # a value that does not fit the other defaults
    if cls.takes_budget:
        shares = () if cls.stage == "draft" else ("33.3%", "0.00001%", Budget(share=1 / 3))  # drafts are counted
        tried += [laconic.get(name, budget=b) for b in (30, *shares)]
        with suppress(LaconicError):  # some spread it over layers or heads themselves
            tried += [laconic.get(name, budget=b) for b in ("pyramid:10%", "pyramid:100%")]
    for method in tried:
        recipe = Recipe((method,))
        assert Recipe.parse(str(recipe)) == recipe
        for suffix in ("json", "yaml", "yml"):
            path = tmp_path / f"recipe.{suffix}"
            recipe.save(path)
            assert Recipe.load(path) == recipe == Recipe.parse(str(path))


def test_a_method_and_an_iterable_of_methods_are_recipes() -> None:
    one, two = laconic.get("knorm", budget="64"), laconic.get("tokenselect", budget="32")
    assert Recipe.parse(one).methods == (one,)
    assert Recipe.parse([one, two]).methods == (one, two)
    recipe = Recipe.parse(one)
    assert Recipe.parse(recipe) is recipe


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "h2o+",
        "h2o:",
        "h2o:0",
        "h2o:-1",
        "h2o:200%",
        "h2o()x",
        "h2o(",
        "h2o)",
        "h2o(recent)",
        "h2o(recent=)",
        "h2o(recent=1,recent=2):8",
        "h2o(budget=3):4",
        "h2o((recent=1))",
        "dense:50%",
        "nothing:3",
        "h2o:10%:10%",
        "h2o:1.5",
        "h2o(recent=banana)",
        "h2o(name=3)",
        "tokenselect(refresh=nan):3",
        "h2o(recent_share=2)",
        "h2o(reduce=median)",
        "tokenselect(positions=x)",
        "h2o:" + "9" * 5000,
        "missing.json",
        "missing.yaml",
        "/",
        "\0.json",
        "h2o\n:3\n+",
    ],
)
def test_nonsense_is_one_sentence(text: str) -> None:
    with pytest.raises(LaconicError) as error:
        Recipe.parse(text)
    assert_one_sentence(error.value)


@pytest.mark.parametrize("value", [None, 5, [], ["h2o"], [None], b"h2o", object()])
def test_what_is_no_recipe_at_all_is_one_sentence(value: object) -> None:
    with pytest.raises(LaconicError) as error:
        Recipe.parse(value)  # type: ignore[arg-type]
    assert_one_sentence(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"recipe": 3}',
        '{"recipe": []}',
        '{"recipe": ["h2o"]}',
        '{"recipe": [{"budget": "3"}]}',
        '{"recipe": [{"method": ["h2o"]}]}',
        '{"recipe": [{"method": null}]}',
        '{"recipe": [{"method": "h2o", "x": 1}]}',
        '{"recipe": [{"method": "h2o", "budget": null}]}',
        '{"recipe": [{"method": "h2o", "budget": [1]}]}',
        '{"recipe": [{"method": "h2o", "recent": {}}]}',
        '{"recipe": {"method": "h2o"}}',
        '{"recipe": [[["method", "h2o"]]]}x',
        '{"recipe": [{"method": "h2o", "1": 2}]}',
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_broken_file_is_one_sentence(content: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_text(content)
    with pytest.raises(LaconicError) as error:
        Recipe.load(path)
    assert_one_sentence(error.value)


def test_files_that_are_no_text_or_no_file(tmp_path: Path) -> None:
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (binary, tmp_path, tmp_path / "no" / "where.json"):
        with pytest.raises(LaconicError) as error:
            Recipe.load(path)
        assert_one_sentence(error.value)
    with pytest.raises(LaconicError) as error:
        Recipe.parse("h2o:8").save(tmp_path / "no" / "where.json")
    assert_one_sentence(error.value)


def test_a_file_keeps_numbers_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    Recipe.parse("h2o(recent=3, normalise=true):8").save(path)
    assert json.loads(path.read_text()) == {
        "recipe": [{"method": "h2o", "budget": "8", "recent": 3, "normalise": True}]
    }


PIECES = st.sampled_from(
    [
        *IDS,
        "h2",
        "tokenselct",
        "(",
        ")",
        ":",
        "+",
        ",",
        "=",
        "%",
        " ",
        "-",
        ".",
        "10%",
        "256",
        "0",
        "1e9",
        "pyramid",
        "sinks",
        "recent",
        "refresh",
        "kernel",
        "true",
        "nan",
        "inf",
        "\n",
        "\0",
        "é",
        "٣",
        "½",
        "_",
        "9" * 30,
    ]
)
RECIPES = st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=40))


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RECIPES)
@example("h2o:٣")
@example("tokenselect(refresh=1e+2):64")
def test_a_thousand_random_strings_parse_or_give_one_sentence(text: str) -> None:
    if "/" in text and text.lower().endswith((".json", ".yaml", ".yml")):
        return
    try:
        recipe = Recipe.parse(text)
    except LaconicError as error:
        assert_one_sentence(error)
    else:
        assert Recipe.parse(str(recipe)) == recipe
