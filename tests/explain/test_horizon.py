"""What single picture tokens tell, against masks in the stock model, and the recipe that follows from the horizon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm
from asked import READER, greedy, work
from typer.testing import CliRunner

import laconic
from laconic.cli import app
from laconic.explain.horizon import HorizonReport, first_free, information_horizon, summary, token_information
from laconic.explain.replay import replay, rows_of, with_answer
from laconic.layers import decoder_layers

ANSWER = torch.tensor([7, 33, 12])


@contextmanager
def masked(family: str, first: int, gone: torch.Tensor) -> Iterator[None]:
    """The stock model with eager attention, in which layers from ``first`` on do not see the keys ``gone`` (n,)."""

    def hide(layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"].clone()
        mask[..., gone] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    with vlm.eager(family) as model:
        hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in decoder_layers(model)[first:]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def by_masks(family: str, x: dict[str, torch.Tensor], first: int, gone: torch.Tensor, answer: torch.Tensor = ANSWER) -> float:
    """Log-probability of the answer per token."""
    given = with_answer(x, answer, family)
    with masked(family, first, gone), torch.no_grad():
        logits = vlm.build(family)(**given).logits[0, -len(answer) :].log_softmax(-1)
    return float(logits.gather(1, answer[:, None]).mean())


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_tokens_left_out_from_a_layer_on_are_keys_that_nobody_sees(family: str) -> None:
    x = vlm.inputs(family, (1,))
    with replay(vlm.build(family), x, ANSWER) as again:
        pictured = again.pictured
        place = pictured.nonzero()[5, 0]
        none, one, all_but_one = ~pictured, ~pictured, torch.ones_like(pictured)
        one[place], all_but_one[place] = True, False
        kept = torch.stack([none, one, all_but_one, torch.ones_like(pictured)])
        for first in (0, 1, again.layers - 1, again.layers):
            found = again.chances(first, kept)[0]
            expected = [by_masks(family, x, first, ~row) for row in kept]
            torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma", "internvl"])
def test_the_answer_is_teacher_forced_as_it_would_be_written(family: str) -> None:
    """No token of the prompt may see the answer, in models whose prompts see all of themselves neither."""
    model, x = vlm.build(family), vlm.inputs(family, (1,))
    with torch.no_grad(), laconic.apply(model, "dense") as handle:
        cache, logits = handle.cache(), []
        logits.append(model(**x, cache=cache).logits[0, -1])
        for token in ANSWER[:-1]:
            logits.append(model(input_ids=token.view(1, 1), cache=cache).logits[0, -1])
    expected = torch.stack(logits).log_softmax(-1).gather(1, ANSWER[:, None]).mean()
    with replay(model, x, ANSWER) as again:
        found, right = again.chances(again.layers, ~again.pictured[None])
        assert float(found) == pytest.approx(float(expected), abs=2e-5) and not bool(right)


def test_information_is_a_difference_of_probabilities_and_zero_where_no_layer_is_left() -> None:
    with replay(vlm.build("llava"), vlm.inputs("llava", (1,)), ANSWER) as again:
        sample = again.pictured.nonzero()[[3, 40], 0]
        keep, log_probability, _ = token_information(again, sample, "keep-one")
        leave, same, _ = token_information(again, sample, "leave-one-out")
        one = ~again.pictured
        one[sample[1]] = True
        expected = again.chances(1, torch.stack([one, ~again.pictured]))[0].exp()
        assert float(keep[1, 1]) == pytest.approx(float(expected[0] - expected[1]), abs=1e-7)
        assert keep.shape == leave.shape == (4, 2) and float(keep[-1].abs().sum() + leave[-1].abs().sum()) == 0
        assert float(keep[:3].abs().min()) > 0 and not torch.allclose(keep, leave, atol=1e-7)
        torch.testing.assert_close(log_probability, same)
        again.pictured = torch.zeros_like(again.pictured)
        again.pictured[sample[0]] = True  # a picture of one token: alone and all are the same
        both = [token_information(again, sample[:1], form)[0] for form in ("keep-one", "leave-one-out")]
        torch.testing.assert_close(both[0], both[1], atol=1e-6, rtol=1e-3)


def test_the_report_holds_what_was_sampled_and_repeats_with_its_seed() -> None:
    asked = work("qwen2_vl", [greedy("qwen2_vl"), "7"], ["colour", "count"])
    model = vlm.build("qwen2_vl")
    report = information_horizon(model, READER, asked, tokens=4, seed=1)
    assert report.information.shape == (2, 4, 4) and report.right[:, -1].tolist() == [1.0, 0.0]
    assert float(report.accuracy[-1]) == 0.5 and float(report.only("colour").accuracy[-1]) == 1.0
    for places, item in zip(report.places, asked.items, strict=True):
        assert all(item.ids[place] == vlm.IMAGE for place in places.tolist()) and len(places.unique()) == 4
    again = information_horizon(model, READER, asked, tokens=4, seed=1)
    torch.testing.assert_close(again.information, report.information)
    assert not torch.equal(information_horizon(model, READER, asked, tokens=4, seed=2).places, report.places)
    rows = report.rows()
    assert [row["layer"] for row in rows] == [0, 1, 2, 3] and rows[-1]["spread"] == rows[-1]["information"] == 0
    assert rows[1]["information"] == pytest.approx(float(report.information[:, 1].mean()), abs=1e-9)


def test_pictures_of_fewer_tokens_than_are_sampled() -> None:
    report = information_horizon(vlm.build("internvl"), READER, work("internvl", ["7"]), tokens=50)
    assert report.places.shape == (1, 16)


def test_the_horizon_is_the_first_layer_from_which_on_nothing_is_lost() -> None:
    accuracy = torch.tensor([0.2, 0.9, 0.5, 0.895, 0.9, 0.9])
    assert first_free(accuracy, 0.01) == 3 and first_free(accuracy, 0.0) == 4 and first_free(accuracy, 0.5) == 1
    assert first_free(torch.tensor([0.3, 0.2, 1.0]), 0.01) == 2
    assert first_free(torch.tensor([1.0, 1.0, 0.9]), 0.01) == 0


def made(right: list[list[float]]) -> HorizonReport:
    table = torch.tensor(right).float()
    return HorizonReport(
        torch.zeros(len(right), table.shape[1], 1), torch.zeros(len(right), 1).long(), table, table, ("",) * len(right), 0.01
    )


def test_the_report_names_the_recipe_that_drops_at_the_horizon() -> None:
    report = made([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert report.horizon == 2 and report.recipe == "withdraw(at=0.667, threshold=1)" and report.recipe in summary(report)
    assert made([[0, 0, 0, 1]]).recipe is None and "up to the last" in summary(made([[0, 0, 0, 1]]))
    assert made([[1, 0, 1, 1], [1, 1, 1, 1]]).horizon == 2 and made([[1, 1, 1, 1]]).recipe is None
    assert made([[0, 0, 0, 0]]).horizon is None and "none of these 1 questions" in summary(made([[0, 0, 0, 0]]))
    for layers in range(2, 100):
        for horizon in range(1, layers):
            right = [[0.0] * horizon + [1.0] * (layers + 1 - horizon)]
            method = laconic.Recipe.parse(made(right).recipe).methods[0]
            assert round(method.at * layers) == horizon


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "paligemma"])
def test_that_recipe_does_what_was_measured(family: str) -> None:
    x, single = vlm.inputs(family, (1,)), ANSWER[:1]
    with replay(vlm.build(family), x, single) as again:
        layers = again.layers
        expected = [float(again.chances(first, ~again.pictured[None])[0]) for first in range(layers)]
    for first in range(1, layers):
        report = made([[0.0] * first + [1.0] * (layers + 1 - first)])
        with laconic.apply(vlm.build(family), report.recipe), torch.no_grad():
            found = vlm.build(family)(**x).logits[0, -1].log_softmax(-1)[single]
        assert float(found) == pytest.approx(expected[first], abs=2e-5)


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_tokens_that_see_each_other_still_do_after_a_drop(family: str) -> None:
    x = vlm.inputs(family, (1,))
    with laconic.apply(vlm.build(family), "random_drop(at=0.3):40%") as handle, torch.no_grad():
        logits = vlm.build(family)(**x).logits[0, -1].log_softmax(-1)
        gone = torch.ones(x["input_ids"].shape[1], dtype=torch.bool)
        gone[handle.latest.layers[-1].positions[0, 0]] = False
    assert float(logits[ANSWER[0]]) == pytest.approx(by_masks(family, x, 1, gone, ANSWER[:1]), abs=3e-5)


def test_a_model_that_would_use_no_cache_is_replayed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vlm.build("llava"), vlm.inputs("llava", (1,))
    monkeypatch.setattr(model.config.get_text_config(), "use_cache", False)
    with replay(model, x, ANSWER) as again:
        found = again.chances(1, ~again.pictured[None])[0]
        assert float(found) == pytest.approx(by_masks("llava", x, 1, again.pictured), abs=1e-4)


def test_a_head_that_is_not_understood_is_refused() -> None:
    model = vlm.build("llava")

    def turn(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output

    hook = model.model.language_model.register_forward_hook(turn)
    try:
        with pytest.raises(laconic.LaconicError, match="not understood"), replay(model, vlm.inputs("llava", (1,)), ANSWER):
            pass
    finally:
        hook.remove()


def test_rows_are_the_kept_ones_with_padding_in_front() -> None:
    kept = torch.tensor([[True, False, True, True], [False, False, False, True]])
    assert rows_of(kept).tolist() == [[0, 2, 3], [-1, -1, 3]]


def test_bad_questions_are_refused_in_a_sentence() -> None:
    model, asked = vlm.build("llava"), work("llava", ["7"])
    for options, match in (({"form": "all"}, "keep-one"), ({"tokens": 0}, "at least 1"), ({"tolerance": 1.0}, "below 1")):
        with pytest.raises(laconic.LaconicError, match=match):
            information_horizon(model, READER, asked, **options)
    example = asked.items[0].example
    for changed, match in ((replace(example, pictures=()), "'image'"), (replace(example, answer=None), "'answer'")):
        asked.items[0].example = changed
        with pytest.raises(laconic.LaconicError, match=match):
            information_horizon(model, READER, asked)


def test_the_command_prints_a_row_per_layer(folder: str) -> None:
    options = ["explain", "horizon", "--model", folder, "--samples", "2", "--tokens", "2"]
    result = CliRunner().invoke(app, [*options, "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["layer"] for row in found["layers"]] == list(range(7)) and set(found["kinds"]) == {"colour", "count"}
    table = CliRunner().invoke(app, options)
    assert table.exit_code == 0 and "from layer" in table.stdout and found["summary"] in table.stdout
    text = CliRunner().invoke(app, ["explain", "horizon", "--model", "needle"])
    assert text.exit_code == 2 and "reads text only" in text.stderr


def test_the_command_shares_attention_between_words_and_pictures(folder: str) -> None:
    options = ["explain", "dominance", "--model", folder, "--samples", "1", "--method", "uniform:25%"]
    result = CliRunner().invoke(app, [*options, "--json"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["recipe"], row["group"], row["picture_tokens"]) for row in rows] == [
        *(("dense", group, 576) for group in ("early", "middle", "late")),
        *(("uniform:25%", group, 144) for group in ("early", "middle", "late")),
    ]
    table = CliRunner().invoke(app, options)
    assert table.exit_code == 0 and "MDI" in table.stdout and "In late layers" in table.stdout
