"""Questions about pictures: the answer follows from the scene, and always saying one thing is right too rarely to pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from laconic.errors import LaconicError
from laconic.evaluation.picture_tasks import TASKS
from laconic.evaluation.tasks import load_task
from laconic.models.reading import read
from laconic.models.scenes import BAR, CELL, COLOURS, SHAPES, TYPES, Scene, ask, make_scene, plural
from laconic.models.shapes_processor import make_processor, make_tokenizer


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


def test_a_file_of_ones_own_pictures(tmp_path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines = [
        '{"prompt": "what colour ?", "image": "a.png", "answer": "red"}',
        '{"prompt": "which is larger ?", "images": ["a.png", "a.png"]}',
        '{"prompt": "broken ?", "image": "bad.png"}',
        '{"prompt": "gone ?", "image": "b.png"}',
        '{"prompt": "no path ?", "image": 3}',
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    task = load_task(str(tmp_path / "mine.jsonl"), make_tokenizer())
    assert [len(e.pictures) for e in task.examples] == [1, 2] and task.examples[0].answer == "red"
    assert ["line 3" in task.problems[0], "line 4" in task.problems[1], "line 5" in task.problems[2]] == [True] * 3
    assert "cannot be read" in task.problems[0] and "no picture" in task.problems[1].lower()


def test_reading_prompts_with_pictures(tmp_path) -> None:
    from PIL import Image

    processor, picture = make_processor(), Image.new("RGB", (50, 20), "blue")
    inputs = read(processor, "what colour is the star ?", [picture])
    mark = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((inputs["input_ids"] == mark).sum()) == 576 and inputs["pixel_values"].shape == (1, 3, 336, 336)
    marked = read(processor, "<image> what colour is the star ?", [picture])
    assert marked["input_ids"].tolist() == inputs["input_ids"].tolist()
    with pytest.raises(LaconicError, match="2 marks <image> for 1 pictures"):
        read(processor, "<image> <image> what ?", [picture])
    with pytest.raises(LaconicError, match="reads text only"):
        read(processor.tokenizer, "what ?", [picture])
    with pytest.raises(LaconicError, match="no picture"):
        read(processor, "what ?", [tmp_path / "none.png"])
    with pytest.raises(LaconicError, match="no pixels"):
        read(processor, "what ?", [Image.new("RGB", (0, 5))])
