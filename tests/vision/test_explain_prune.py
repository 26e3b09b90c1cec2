"""Relevance against its definition with whole maps, the student that foretells it, and the method that keeps by it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import vlm
from PIL import Image
from typer.testing import CliRunner

import laconic
from laconic.cli import app
from laconic.evaluation.examples import Example
from laconic.evaluation.measure import Runner, prepare
from laconic.explain.relevance import relevance
from laconic.models.pictures import spans
from laconic.profiles import make_profile, weights_from_json, weights_to_json
from laconic.vision.base import VisionMethod
from laconic.vision.explain_prune import ExplainPrune, examples_of
from laconic.vision.picture import Picture
from laconic.vision.student import RelevanceStudent, divergence, label_of, mean_divergence, train_student


def one(family: str, counts: tuple[int, ...] = (1,), seed: int = 0) -> dict[str, torch.Tensor]:
    return vlm.inputs(family, counts, seed=seed)


def longer(x: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with an answer behind the prompt, told from it where the model has a name for that (PaliGemma)."""
    ids = torch.cat([x["input_ids"], answer[None]], 1)
    types = {n: torch.cat([x[n], torch.zeros_like(answer)[None]], 1) for n in ("token_type_ids", "mm_token_type_ids") if n in x}
    if "token_type_ids" in x and not bool(x["token_type_ids"].any()):
        types["token_type_ids"][0, x["input_ids"].shape[1] :] = 1
    return {**x, **types, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stock(family: str, x: dict[str, torch.Tensor]) -> Any:
    """Logits and attention maps of the stock model, kept for gradients."""
    model = copy.deepcopy(vlm.build(family))
    model.set_attn_implementation("eager")
    model.train(family == "paligemma" and bool(x["token_type_ids"].any()))  # else it takes an answer for a part of the prompt
    return model(**x, output_attentions=True, use_cache=False)


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_relevance_is_the_last_row_of_the_whole_product(family: str) -> None:
    x, answer = one(family), torch.tensor([11, 12, 13])
    out = stock(family, longer(x, answer[:-1]))
    first, total = x["input_ids"].shape[1] - 1, 0.0
    for step, token in enumerate(answer.tolist()):
        gradients = torch.autograd.grad(out.logits[0, first + step, token], out.attentions, retain_graph=True)
        r = torch.eye(out.logits.shape[1])
        for maps, gradient in zip(out.attentions, gradients, strict=True):
            r = r + (maps[0] * gradient[0]).clamp(min=0).mean(0) @ r
        assert bool((r >= torch.eye(len(r)) - 1e-6).all())
        total = total + r[first + step] / len(answer)
    expected = total[: first + 1][x["input_ids"][0] == vlm.IMAGE].detach()
    found = relevance(vlm.build(family), x, answer)
    assert float(expected.max()) > 0
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.max()), rtol=1e-3)


def test_the_model_is_as_it_was_and_its_type_does_not_matter() -> None:
    x, answer = one("llava"), torch.tensor([11])
    half = copy.deepcopy(vlm.build("llava")).to(torch.bfloat16)
    before = {name: t.clone() for name, t in half.state_dict().items()}
    asked = [p.requires_grad for p in half.parameters()]
    found = relevance(half, x, answer)
    assert found.dtype == torch.float32 and [p.requires_grad for p in half.parameters()] == asked
    for name, t in half.state_dict().items():
        assert t.dtype == before[name].dtype and torch.equal(t, before[name])
    torch.testing.assert_close(found, relevance(copy.deepcopy(half).float(), x, answer))


def test_an_answer_that_no_gradient_leads_from_has_no_relevance() -> None:
    model = copy.deepcopy(vlm.build("llava"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language" in name and name.endswith("v_proj.weight"):
                weight.zero_()
    with pytest.raises(laconic.LaconicError, match="no relevance"):
        relevance(model, one("llava"), torch.tensor([11]))


@pytest.mark.parametrize(
    ("x", "answer", "sentence"),
    [
        (vlm.inputs("llava", (1, 1)), torch.tensor([3]), "one prompt"),
        (vlm.inputs("llava", (0,)), torch.tensor([3]), "no picture"),
        (vlm.inputs("llava", (1,)), torch.tensor([], dtype=torch.int64), "answer"),
    ],
)
def test_what_cannot_be_explained_is_refused(x: dict, answer: torch.Tensor, sentence: str) -> None:
    with pytest.raises(laconic.LaconicError, match=sentence):
        relevance(vlm.build("llava"), x, answer)


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_the_first_layer_is_asked_for_what_the_stock_model_attends_to(family: str) -> None:
    """Two rows, one of them padded; pictures with words before, between and behind them."""
    x, model = vlm.inputs(family, (2, 1)), vlm.build(family)
    with torch.no_grad():
        maps = stock(family, x).attentions[0].mean(1)
        with laconic.apply(model, ExplainPrune()) as handle:
            model(**x)
    held = spans(x["input_ids"], handle.entry.seen)
    for (_, _, row, slots), picture in zip(held, handle.entry.pictures, strict=True):
        words = ((x["input_ids"][row] != vlm.IMAGE) & x["attention_mask"][row].bool()).nonzero()[:, 0]
        expected = maps[row, words[words > slots[-1]]][:, slots].mean(0)
        torch.testing.assert_close(picture.from_words, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_every_picture_of_a_prompt_is_an_example_of_its_own(family: str) -> None:
    model, x, answer = vlm.build(family), one(family, (2,)), torch.tensor([11, 12])
    examples, found = examples_of(model, x, answer), relevance(model, x, answer)
    with laconic.apply(model, ExplainPrune()) as handle, torch.no_grad():
        model(**x)
    begin = 0
    for (attention, label), picture in zip(examples, handle.entry.pictures, strict=True):
        own = found[begin : begin + len(picture.layout)][picture.cells]
        begin += len(picture.layout)
        assert torch.equal(attention, picture.from_words[picture.cells]) and float(label.sum()) == pytest.approx(1, abs=1e-5)
        assert int((label == 0).sum()) >= len(own) // 2
        upper = own.masked_fill(label == 0, 0.0)
        torch.testing.assert_close(label, upper / upper.sum(), atol=1e-6, rtol=1e-3)
    assert begin == len(found) and len(examples) == 2


def test_the_loss_is_zero_only_where_both_are_equal() -> None:
    label = label_of(torch.rand(40, generator=torch.Generator().manual_seed(0)))
    same = divergence(label[None], label.clamp(min=1e-30).log()[None])
    torch.testing.assert_close(same, torch.zeros(1), atol=1e-6, rtol=0)
    for other in (torch.full((40,), 1 / 40), 0.9 * label + 0.1 * label.flip(0)):
        assert float(divergence(label[None], other.clamp(min=1e-30).log()[None])) > 1e-3


def test_labels_forget_the_lower_half_and_keep_proportions() -> None:
    label = label_of(torch.tensor([4.0, 1.0, 0.0, 12.0, 2.0]))
    torch.testing.assert_close(label, torch.tensor([4.0, 0.0, 0.0, 12.0, 2.0]) / 18)
    with pytest.raises(laconic.LaconicError, match="no relevance"):
        label_of(torch.zeros(6))


def test_the_student_learns_takes_any_number_of_tokens_and_comes_back_from_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relevant is what follows a bright token: no single value tells, the neighbourhood does."""
    monkeypatch.setattr("laconic.vision.student.EPOCHS", 30)
    generator = torch.Generator().manual_seed(0)

    def example(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        attention = torch.rand(n, generator=generator)
        return attention, label_of(attention.roll(1).pow(4))

    examples = [example(n) for n in (36, 64) for _ in range(20)]
    student, again = train_student(examples, 3), train_student(examples, 3)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    unseen = [example(100) for _ in range(8)]
    even = sum(float(divergence(label, torch.full_like(label, 1 / 100).log())) for _, label in unseen) / 8
    assert float(mean_divergence(student, unseen)) < 0.6 * even
    attention = unseen[0][0][None]
    torch.testing.assert_close(student(attention).exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(student(7 * attention), student(attention))
    torch.testing.assert_close(RelevanceStudent.of(weights_to_json(student))(attention), student(attention), atol=1e-2, rtol=1e-2)


def test_a_profile_is_trained_found_and_fits_its_model(tmp_path: Path) -> None:
    model = vlm.build("llava")
    prompts = [one("llava", (1 + seed % 2,), seed=seed) for seed in range(4)]
    answers = [torch.tensor([11 + seed, 12]) for seed in range(4)]
    made = make_profile("explain_prune", model, prompts, seed=0, answers=answers)
    assert made.tables["pictures"] == 6 and made.tables["loss"] < made.tables["even"] - 0.02
    made.save(tmp_path / "explain.json")
    recipe = f"explain_prune(profile={tmp_path / 'explain.json'}):20%"
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        model(**prompts[0])
    kept, scores = handle.entry.reductions[0].kept, handle.entry.reductions[0].scores
    ((attention, _),) = examples_of(model, prompts[0], answers[0])
    student = RelevanceStudent()
    student.load_state_dict(weights_from_json(made.tables["weights"]))
    torch.testing.assert_close(scores, student(attention[None])[0].exp().detach())
    assert kept.tolist() == sorted(scores.argsort(descending=True)[: len(kept)].tolist()) and len(kept) == 13
    other = vlm.build("llava_siglip")
    with laconic.apply(other, recipe), torch.no_grad(), pytest.raises(laconic.LaconicError, match="another model"):
        other(**vlm.inputs("llava_siglip"))
    with laconic.apply(model, "explain_prune:20%"), pytest.raises(laconic.LaconicError, match="laconic profile explain_prune"):
        model(**prompts[0])
    with pytest.raises(laconic.LaconicError, match="answers right"):
        make_profile("explain_prune", model, prompts, seed=0)


def test_a_question_has_to_stand_behind_its_picture() -> None:
    model, x = vlm.build("llava"), one("llava")
    end = int((x["input_ids"][0] == vlm.IMAGE).nonzero().max()) + 1
    x = {**x, "input_ids": x["input_ids"][:, :end], "attention_mask": x["attention_mask"][:, :end]}
    with laconic.apply(model, "explain_prune:20%"), pytest.raises(laconic.LaconicError, match="behind a picture"):
        model(**x)


def kept_by(model: Any, x: dict[str, torch.Tensor], scores: torch.Tensor, k: int, answer: torch.Tensor) -> float:
    """Log-probability of an answer when only the k best tokens of the one picture are left."""

    @dataclass(frozen=True, kw_only=True)
    class Given(VisionMethod):
        id: ClassVar[str] = "given"
        paper: ClassVar[str] = ""

        def score(self, picture: Picture) -> torch.Tensor:
            return scores

    with laconic.apply(model, Given(budget=k)), torch.no_grad():
        logits = model(**longer(x, answer[:-1]), use_cache=True).logits[0, -len(answer) :]
    return float(logits.log_softmax(-1).gather(1, answer[:, None]).sum())


def test_what_is_relevant_carries_the_answer_further_than_chance() -> None:
    """A quarter of the tokens, the most and the least relevant ones against random ones, the mean over prompts."""
    model, generator, best, worst = vlm.build("llava"), torch.Generator().manual_seed(0), 0.0, 0.0
    for seed in range(12):
        x = one("llava", seed=seed)
        with torch.no_grad():
            answer = model.generate(**x, max_new_tokens=3, do_sample=False)[0, x["input_ids"].shape[1] :]
        found = relevance(model, x, answer)
        chance = sum(kept_by(model, x, torch.rand(64, generator=generator), 16, answer) for _ in range(4)) / 4
        best += (kept_by(model, x, found, 16, answer) - chance) / 12
        worst += (kept_by(model, x, -found, 16, answer) - chance) / 12
    assert best > 1e-3 and worst < -1e-3


def test_the_command_learns_from_what_the_model_answers_right(folder: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    task, ask = tmp_path / "mine.jsonl", {"prompt": "what colour", "image": "noise.png", "max_new_tokens": 2}
    model, reader = laconic.load(folder)
    said = Runner(model, reader)
    (item,) = prepare([Example("what colour", "?", max_new_tokens=2, pictures=(tmp_path / "noise.png",))], reader)
    right = said.text(said.run(item).own)
    command = ["profile", "explain_prune", "--model", folder, "--task", str(task), "--json"]
    task.write_text(json.dumps({**ask, "answer": "no such word"}) + "\n")
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "p.json")])
    assert result.exit_code == 2 and "answers none of the 1 prompts" in result.stderr
    task.write_text("".join(json.dumps({**ask, "answer": answer}) + "\n" for answer in ("no such word", right)))
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "p.json")])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tables"]["pictures"] == 1
    with laconic.apply(model, f"explain_prune(profile={tmp_path / 'p.json'}):10%") as handle, torch.no_grad():
        model(input_ids=torch.tensor([item.ids]), **item.inputs)
    assert len(handle.entry.reductions[0].kept) == 58


def test_the_command_shows_what_an_answer_rests_on(folder: str, tmp_path: Path) -> None:
    command = ["explain", "relevance", "scene:1", "--model", folder, "-o", str(tmp_path / "out.png")]
    command += ["--max-new-tokens", "1"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    scores = sorted(found["relevance"], reverse=True)
    assert len(scores) == found["tokens"] == 576 and min(scores) >= 0
    assert sum(scores[: found["half"]]) >= sum(scores) / 2 > sum(scores[: found["half"] - 1])
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("L")).reshape(24, 14, 24, 14).mean((1, 3)).flatten()
    relevant = np.argsort(found["relevance"])
    assert pixels[relevant[:288]].mean() > pixels[relevant[-100:]].mean()  # the less relevant half is faded
    assert "Half of its relevance lies in" in CliRunner().invoke(app, command).stdout


def test_without_a_question_nothing_is_explained(folder: str) -> None:
    result = CliRunner().invoke(app, ["explain", "relevance", "photo.jpg", "--model", folder])
    assert result.exit_code == 2 and "no question about photo.jpg" in result.stderr
