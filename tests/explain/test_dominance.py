"""Indices of text dominance against their definition, and their rows against the stock model's attention maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import vlm
from asked import READER, greedy, work

import laconic
from laconic.explain.dominance import Blind, DominanceReport, indices, layer_groups, summary, text_dominance
from laconic.recipe import Recipe


def one(attention: list[float], tokens: list[float]) -> tuple[float, float, float]:
    found = indices(torch.tensor(attention), torch.tensor(tokens))
    return float(found.mdi), float(found.aei_text), float(found.aei_picture)


def test_even_attention_gives_one_and_scale_does_not_matter() -> None:
    assert one([0.2, 0.8], [20, 80]) == pytest.approx((1, 1, 1))
    assert one([2.0, 1.0], [20, 80]) == pytest.approx(one([200.0, 100.0], [20, 80]))
    mdi, text, picture = one([0.6, 0.4], [20, 80])
    assert mdi == pytest.approx((0.6 / 20) / (0.4 / 80)) and mdi == pytest.approx(text / picture)
    assert text == pytest.approx(0.6 / 0.2) and picture == pytest.approx(0.4 / 0.8)


def test_swapped_kinds_invert_it_and_split_tokens_double_it() -> None:
    mdi, text, picture = one([0.7, 0.3], [11, 64])
    assert one([0.3, 0.7], [64, 11]) == pytest.approx((1 / mdi, picture, text))
    assert one([0.7, 0.3], [11, 128])[0] == pytest.approx(2 * mdi)  # every picture token twice, each with half of its attention


def test_without_one_kind_there_is_no_index() -> None:
    assert indices(torch.tensor([0.9, 0.0]), torch.tensor([9.0, 0.0])).mdi.isnan()
    assert one([0.9, 0.0], [9, 5])[0] > 1e8  # nobody looks


def test_groups_of_layers() -> None:
    assert layer_groups(32) == {"early": [0, 1], "middle": [15, 16], "late": [30, 31]}
    assert layer_groups(6) == {"early": [0, 1], "middle": [2, 3], "late": [4, 5]}
    assert layer_groups(1) == {"early": [0], "middle": [0], "late": [0]}


def maps(family: str, x: dict[str, torch.Tensor], answer: list[int]) -> torch.Tensor:
    """The stock model's attention of the rows that the answer is read from, mean over heads, ``(layers, answer, n)``."""
    more = torch.tensor([answer[:-1]])
    count = x["input_ids"].shape[1]
    extra = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    given = {
        name: torch.cat([value, extra.get(name, torch.zeros_like(more))], 1) if value.shape == (1, count) else value
        for name, value in x.items()
    }
    return torch.stack([a[0].mean(0)[-len(answer) :] for a in vlm.maps(family, given)])


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_attention_is_that_of_the_stock_models_maps(family: str) -> None:
    answer = greedy(family)
    asked = work(family, [answer])
    report = text_dominance(vlm.build(family), READER, asked)
    x, n = vlm.inputs(family, (1,)), len(asked.items[0].ids)
    rows = maps(family, x, [int(word) for word in answer.split()])
    picture = x["input_ids"][0] == vlm.IMAGE
    words = ~picture
    words[0] = False
    for kind, (mask, column) in enumerate(((words, None), (picture, None), (None, 0))):
        columns = rows[:, :, :n]
        expected = columns[:, :, mask].sum(-1) if column is None else columns[:, :, column]
        torch.testing.assert_close(report.attention[0, 0, :, kind], expected.mean(1), atol=1e-5, rtol=1e-4)
        seen = (columns > 0).float()
        count = seen[:, :, mask].sum(-1) if column is None else seen[:, :, column]
        torch.testing.assert_close(report.tokens[0, 0, :, kind], count.mean(1))
    assert report.accuracy == (1.0,)


def test_the_first_token_counts_as_a_word_or_not_at_all() -> None:
    report = text_dominance(vlm.build("llava"), READER, work("llava", ["7"]))
    attention, tokens = report.attention[0, 0, 0], report.tokens[0, 0, 0]
    assert tokens[1] == 64 and tokens[2] == 1
    expected = (attention[0] / tokens[0]) / (attention[1] / tokens[1])
    assert float(report.of(False).mdi[0, 0, 0]) == pytest.approx(float(expected), rel=1e-5)
    expected = ((attention[0] + attention[2]) / (tokens[0] + 1)) / (attention[1] / tokens[1])
    assert float(report.of(True).mdi[0, 0, 0]) == pytest.approx(float(expected), rel=1e-5)


def test_rows_are_means_of_ratios() -> None:
    attention = torch.tensor([[[0.5, 0.4, 0.1]], [[0.2, 0.7, 0.1]]])[None]
    tokens = torch.tensor([[[5.0, 10.0, 1.0]], [[5.0, 0.0, 1.0]]])[None]
    report = DominanceReport(("dense",), attention, tokens, (0.5,), 0.25)
    early = report.rows()[0]
    assert early["mdi"] == pytest.approx((0.6 / 6) / (0.4 / 10)) and early["mdi_without_first"] == pytest.approx(2.5)
    assert early["gain"] == 0.25 and early["picture_tokens"] == 5 and "+0.25" in summary(report)
    nothing = replace(report, tokens=tokens * torch.tensor([1.0, 0.0, 1.0]))
    assert nothing.rows()[2]["mdi"] is None and "no picture token" in summary(nothing)


def test_tokens_that_a_recipe_leaves_out_do_not_count() -> None:
    recipes = (
        "dense",
        "uniform:25%",
        "uniform:50% + random_drop(at=0.3):25% + withdraw(at=0.7, threshold=1)",
        "h2o(sinks=1, recent=2):20",
    )
    report = text_dominance(vlm.build("llava"), READER, work("llava", ["7", "8"], tokens=4), recipes)
    counts = report.tokens[..., 1].mean(1).tolist()
    assert counts[:3] == [[64, 64, 64], [16, 16, 16], [32, 16, 0]]
    assert all(16 < count < 64 for count in counts[3])  # all of the prompt's row, then what is left beside four words
    assert [row["picture_tokens"] for row in report.rows()[:6]] == [64, 64, 64, 16, 16, 16]
    assert report.rows()[8]["mdi"] is not None and report.of(True).mdi[2, :, 2].isnan().all()


def test_the_blind_model_sees_nothing_of_any_picture() -> None:
    model, x = vlm.build("llava"), vlm.inputs("llava", (1,))
    with laconic.apply(model, Recipe((Blind(budget=1),))) as handle, torch.no_grad():
        logits = model(**x).logits[0, -1]
        other = model(**{**x, "pixel_values": torch.zeros_like(x["pixel_values"])}).logits[0, -1]
        assert handle.latest.layers[0].n == int((x["input_ids"] != vlm.IMAGE).sum())
    assert torch.equal(logits, other)
