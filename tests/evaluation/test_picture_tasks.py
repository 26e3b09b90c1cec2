"""Questions about pictures: the answer follows from the scene, and always saying one thing is right too rarely to pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from laconic.errors import LaconicError
from laconic.evaluation.picture_tasks import TASKS
from laconic.evaluation.tasks import load_task
from laconic.models.scenes import BAR, CELL, COLOURS, SHAPES, TYPES, Scene, ask, make_scene, plural


def answer(scene: Scene, text: str, kind: str) -> str:
    """The answer by looking at the list of things."""
    words = text.split()
    by_shape = {shape: [t for t in scene.things if t.shape == shape] for shape in SHAPES}
    if kind == "colour":
        (thing,) = by_shape[words[4]]
        return thing.colour
    if kind == "count":
        return str(sum(words[2] in (plural(t.shape), t.colour) for t in scene.things))
    if kind == "position":
        (a,), (b,) = by_shape[words[2]], by_shape[words[-2]]
        return ("left" if a.x < b.x else "right") if "left" in words else ("above" if a.y < b.y else "below")
    if kind == "comparison":
        named = [by_shape[words[5]][0], by_shape[words[8]][0]]
        return sorted(named, key=lambda t: t.radius)[words[2] == "larger"].shape
    if kind == "reading":
        return " ".join(scene.sign.text) if words[1] == "number" else scene.sign.text
    return "yes" if any((t.colour, t.shape) == (words[3], words[4]) for t in scene.things) else "no"


@pytest.mark.parametrize("side", [84, 168, 336])
def test_answers_follow_from_the_scene(side: int) -> None:
    rng, asked = np.random.default_rng(3), Counter()
    for _ in range(150):
        scene = make_scene(rng, side)
        for kind in TYPES:
            question = ask(scene, rng, kind)
            if question is not None:
                asked[kind] += 1
                assert question.answer == answer(scene, question.text, kind)
    assert all(asked[kind] > 3 for kind in TYPES), asked


def test_things_show_where_they_are_said_to_be() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        scene = make_scene(rng)
        pixels = np.asarray(scene.render()).astype(int)
        assert pixels.shape == (336, 336, 3)
        for thing in scene.things:
            inside = scene.cells("things")[int(thing.y // CELL), int(thing.x // CELL)]
            if thing.shape in ("circle", "square", "cross", "star"):  # those whose middle is filled
                assert inside and tuple(pixels[round(thing.y), round(thing.x)]) == COLOURS[thing.colour]
        bars = scene.cells("bar")
        assert all(tuple(pixels[r * CELL + 7, c * CELL + 7]) == BAR for r, c in zip(*bars.nonzero(), strict=True))
        assert not (bars & scene.cells("things")).any() and not (bars & scene.cells("sign")).any()


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_pictures_and_questions(name: str) -> None:
    first, second, other = (load_task(name, None, samples=30, seed=seed) for seed in (0, 0, 1))
    assert first == second and first != other
    assert load_task(name, None, samples=12).examples == first.examples[:12]
    scene = first.examples[0].pictures[0]
    assert np.array_equal(np.asarray(scene.render()), np.asarray(second.examples[0].pictures[0].render()))
    kinds = Counter(e.meta["type"] for e in first.examples)
    assert kinds == ({"existence": 30} if name == "pope" else dict.fromkeys(TYPES, 5))


def test_no_answer_is_right_most_of_the_time() -> None:
    for kind in TYPES:
        task = load_task("shapes_vqa", None, samples=600)
        answers = Counter(e.answer for e in task.examples if e.meta["type"] == kind)
        assert answers.most_common(1)[0][1] / sum(answers.values()) < 0.62


def test_lengths_are_refused() -> None:
    with pytest.raises(LaconicError, match="pictures"):
        load_task("shapes_vqa", None, lengths=[1024])
