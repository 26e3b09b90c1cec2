"""The built-in models that see: they are there, they answer, and what is left out of a picture matters to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import laconic
from laconic.errors import LaconicError
from laconic.evaluation.measure import Runner, prepare
from laconic.evaluation.picture_tasks import make_task
from laconic.models import ZOO
from laconic.models.pictures import find_eyes
from laconic.models.reading import read
from laconic.models.scenes import ask, make_scene
from laconic.models.shapes_models import build_model, warm_start
from laconic.models.shapes_processor import VARIANTS, make_processor
from laconic.models.train_shapes import Frame, SceneMaker, assemble, encode, read_words
from laconic.vision.see import see

TOKENS = {"shapes": 576, "shapes-siglip": 576, "shapes-merger": 144}


@pytest.fixture(scope="module", params=VARIANTS)
def shapes(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return request.param, *laconic.load(request.param)


def right(shapes: tuple[str, Any, Any], recipe: str, samples: int = 36) -> float:
    """Share of held-out questions that are answered right."""
    _, model, processor = shapes
    runner, items = Runner(model, processor), prepare(make_task("shapes_vqa", samples, 0).examples, processor)
    with laconic.apply(model, recipe) as handle:
        said = [runner.text(runner.run(item, handle).own) for item in items]
    return sum(a.split() == item.example.answer.split() for a, item in zip(said, items, strict=True)) / samples


def test_it_answers_held_out_questions_and_needs_the_picture_for_it(shapes: tuple[str, Any, Any]) -> None:
    dense = right(shapes, "dense")
    assert dense >= 0.8
    assert right(shapes, "random_prune:1") < dense - 0.25


def test_it_is_what_its_command_builds(shapes: tuple[str, Any, Any]) -> None:
    name, model, processor = shapes
    expected = {part: weight.shape for part, weight in build_model(name).named_parameters()}
    assert {part: weight.shape for part, weight in model.named_parameters()} == expected
    assert (ZOO / name / "model.safetensors").stat().st_size <= 4e6
    picture = make_scene(np.random.default_rng(3)).render()
    made, stored = (read(p, "what colour is the star ?", [picture]) for p in (make_processor(name), processor))
    assert made.keys() == stored.keys() and all(torch.equal(made[key], stored[key]) for key in made)


def test_training_computes_what_the_model_computes(shapes: tuple[str, Any, Any]) -> None:
    """The hidden states of a question as the training loop lays it out are those of the stock forward."""
    name, model, processor = shapes
    rng = np.random.default_rng(7)
    scene = make_scene(rng)
    question = ask(scene, rng, "existence")
    batch = assemble([scene], [[question]], Frame.of(processor), rng)
    inputs = read(processor, f"{question.text} {question.answer} <eos>", [scene])
    with torch.no_grad():
        features, token = encode(model, batch)
        words = read_words(model, features, batch)
        stock = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert (token is not None) == (name == "shapes")
    assert inputs["input_ids"][0, -batch.ids.shape[1] :].tolist() == batch.ids[0].tolist()
    torch.testing.assert_close(words, stock[:, -batch.ids.shape[1] :], rtol=1e-4, atol=1e-4)


def test_windows_of_small_pictures_lie_on_whole_tokens() -> None:
    for name in VARIANTS:
        batch = SceneMaker(0, name).batch((56, 2, 24))
        merge = batch.frame.merge
        row, column = batch.places // 24, batch.places % 24
        tokens = (row // merge * (24 // merge) + column // merge).view(24, -1)
        first, count = len(batch.frame.before), (4 // merge) ** 2
        places = batch.positions[:, first : first + count] - first
        assert [set(line.tolist()) for line in tokens] == [set(line.tolist()) for line in places]


def test_a_shortened_picture_has_exactly_the_tokens_that_were_asked_for(shapes: tuple[str, Any, Any]) -> None:
    name, model, processor = shapes
    inputs = read(processor, "what shapes are there ?", [make_scene(np.random.default_rng(5))])
    pictured = find_eyes(model).pictured(inputs["input_ids"][0])
    assert int(pictured.sum()) == TOKENS[name]
    side = round(TOKENS[name] ** 0.5)
    for budget, kept in (("25%", TOKENS[name] // 4), ("16", 16)):
        for method in ("divprune", "hiprune", "visionzip", "uniform"):
            with torch.no_grad(), laconic.apply(model, f"{method}:{budget}") as handle:
                cache = model(**inputs).past_key_values
                assert handle.entry.pictures[0].layout.shapes == ((side, side),)
            for layer in cache.layers:
                held = layer.positions[0, 0]
                assert int(pictured[held].sum()) == kept  # and everything else
                assert len(held) == layer.n == len(pictured) - TOKENS[name] + kept


def test_all_tokens_kept_is_the_stock_model(shapes: tuple[str, Any, Any]) -> None:
    _, model, processor = shapes
    inputs = read(processor, "how many stars are there ?", [make_scene(np.random.default_rng(6))])
    with torch.no_grad():
        stock = model(**inputs).logits[:, -1]
        with laconic.apply(model, "divprune:100%"):
            kept = model(**inputs).logits[:, -1]
    torch.testing.assert_close(kept, stock, rtol=1e-4, atol=1e-4)


def test_methods_that_need_a_class_token_say_what_to_take_instead(shapes: tuple[str, Any, Any]) -> None:
    name, model, processor = shapes
    inputs = read(processor, "how many stars are there ?", [make_scene(np.random.default_rng(6))])

    def run() -> None:
        with laconic.apply(model, "vtc_cls:25%"):
            model(**inputs)

    if name == "shapes":
        run()
    else:
        with pytest.raises(LaconicError, match="no class token: use a method that needs none, such as hiprune or divprune"):
            run()


def test_what_is_seen_is_shown_on_the_grid_of_tokens(shapes: tuple[str, Any, Any]) -> None:
    name, model, processor = shapes
    scene = make_scene(np.random.default_rng(8))
    views, pictures = see(model, processor, [scene], "how many stars are there ?", ["divprune:25%"])
    shown = views[-1].pictures[0]
    assert shown.kept == TOKENS[name] // 4 and len(shown.layout) == TOKENS[name]
    assert np.abs(np.asarray(pictures[0], float) - np.asarray(scene.render(), float)).max() <= 1


def test_a_start_knows_most_of_what_it_comes_from() -> None:
    """SigLIP's tower with the weights of CLIP's gives nearly the features of it; a merger the mean of its tokens, roughly."""
    known, reader = laconic.load("shapes")
    scene = make_scene(np.random.default_rng(9))
    with torch.no_grad():
        wanted = known.model.get_image_features(read(reader, "what ?", [scene])["pixel_values"]).pooler_output[0]

    def unexplained(variant: str, target: torch.Tensor) -> float:
        torch.manual_seed(0)
        model = build_model(variant)
        warm_start(model, variant, "shapes")
        pixels = read(make_processor(variant), "what ?", [scene])["pixel_values"]
        with torch.no_grad():
            found = model.model.get_image_features(pixels).pooler_output[0]
        return float(((found - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())

    assert unexplained("shapes", wanted) == 0
    assert unexplained("shapes-siglip", wanted) < 0.3
    mean = wanted.view(12, 2, 12, 2, -1).mean((1, 3)).flatten(0, 1)
    assert unexplained("shapes-merger", mean) < 0.5


def test_a_merger_takes_over_the_encoder_of_siglip_as_it_is() -> None:
    model = build_model("shapes-merger")
    warm_start(model, "shapes-merger", "shapes-siglip")
    own, known = find_eyes(model).tower.state_dict(), find_eyes(laconic.load("shapes-siglip")[0]).tower.state_dict()
    assert own.keys() == known.keys() and all(torch.equal(own[name], known[name]) for name in own)


def test_a_start_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LaconicError, match="shapes-siglip cannot start from 'shapes-merger': give shapes or shapes-siglip"):
        warm_start(build_model("shapes-siglip"), "shapes-siglip", "shapes-merger")
    with pytest.raises(LaconicError, match="cannot start from 'needle'"):
        warm_start(build_model("shapes"), "shapes", "needle")
