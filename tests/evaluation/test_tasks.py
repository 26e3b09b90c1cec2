"""Built-in tasks: lengths, places, determinism, and answers that follow from the text alone."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest

from laconic.errors import LaconicError
from laconic.evaluation import picture_tasks, template_tasks, wording
from laconic.evaluation.haystack import paragraphs, reference_text
from laconic.evaluation.metrics import score
from laconic.evaluation.prompts import build_prompt, place
from laconic.evaluation.retrieval import end_pattern, spread
from laconic.evaluation.tasks import Example, Task, load_task, task_names
from laconic.models.names import code_names
from laconic.models.templates import KINDS, is_held_out

LENGTHS = [600, 1200]
TEXTS = ("perplexity", "long_generation")
PICTURES = tuple(picture_tasks.TASKS)
NAMES = [name for name in task_names() if name not in (*PICTURES, *template_tasks.TASKS)]
RETRIEVAL = [name for name in NAMES if name not in TEXTS]
NAME = "[A-Z][a-z]{5}"


@cache
def make_tokenizer(kind: str):
    """``needle``: as the built-in model has it; ``plain``: GPT-2-like, names in pieces; ``bos``: adds a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from laconic.models.needle_tokenizer import train_tokenizer

    text = reference_text(held_out=False)[:60_000]
    if kind == "needle":
        return train_tokenizer([text], pieces=500)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "bos":  # words carry a mark in front, as in SentencePiece
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = sorted(set(reference_text()) | set("\u2581")) if kind == "bos" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([text], trainer)
    if kind == "bos":
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


@pytest.fixture(scope="module", params=["needle", "plain", "bos"])
def tokenizer(request: pytest.FixtureRequest):
    return make_tokenizer(request.param)


@cache
def task_of(name: str, seed: int = 0) -> Task:
    return load_task(name, make_tokenizer("needle"), samples=12, lengths=LENGTHS, seed=seed)


def pattern_of(template: str, values: int = 1) -> re.Pattern[str]:
    """The template as a regular expression with groups key and value."""
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(escaped.format(key=f"(?P<key> {NAME})", value=f"(?P<value>(?: {NAME}){{{values}}})"))


def context_of(example: Example) -> str:
    assert example.question and example.prompt.endswith(example.question)
    return example.prompt[: -len(example.question)]


def asked_name(example: Example) -> str:
    return " " + re.findall(NAME, example.question or "")[-1]


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_met_with_any_tokenizer(name: str, tokenizer) -> None:
    task = load_task(name, tokenizer, samples=4, lengths=LENGTHS)
    assert len(task.examples) == 4 and not task.problems
    for example in task.examples:
        wanted = example.meta["length"]
        assert abs(len(tokenizer(example.prompt)["input_ids"]) - wanted) <= 0.02 * wanted
    assert Counter(e.meta["length"] for e in task.examples) == {length: 2 for length in LENGTHS}


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_examples(name: str) -> None:
    tokenizer = make_tokenizer("needle")
    again = load_task(name, tokenizer, samples=12, lengths=LENGTHS)
    assert again == task_of(name)
    other = load_task(name, tokenizer, samples=12, lengths=LENGTHS, seed=1)
    assert all(a.prompt != b.prompt for a, b in zip(again.examples, other.examples, strict=True))


@pytest.mark.parametrize("name", RETRIEVAL)
def test_more_samples_keep_the_earlier_ones(name: str) -> None:
    prompts = {e.prompt for e in load_task(name, make_tokenizer("needle"), samples=18, lengths=LENGTHS).examples}
    assert len(prompts) == 18
    assert {e.prompt for e in load_task(name, make_tokenizer("needle"), samples=6, lengths=LENGTHS).examples} <= prompts


@pytest.mark.parametrize("name", RETRIEVAL)
def test_prompts_end_with_the_question_and_answers_fit(name: str) -> None:
    tokenizer = make_tokenizer("needle")
    for example in task_of(name).examples:
        context = context_of(example)
        assert asked_name(example) in context and example.prompt.endswith(asked_name(example))
        assert example.max_new_tokens < 20
        ends = example.meta.get("end", example.answer)
        for end in [ends] if isinstance(ends, str) else ends:
            assert len(tokenizer(f" {end}.", add_special_tokens=False)["input_ids"]) <= example.max_new_tokens


@pytest.mark.parametrize(("name", "count"), [("needle", 1), ("multi_needle", 8)])
def test_needles_stand_once_at_their_depth(name: str, count: int, tokenizer) -> None:
    task = load_task(name, tokenizer, samples=10, lengths=[1500])
    assert {e.meta["depth"] for e in task.examples} == {0.0, 0.25, 0.5, 0.75, 1.0}
    for example in task.examples:
        context = context_of(example)
        found = list(pattern_of(wording.NEEDLE, 2).finditer(context))
        assert len(found) == count == example.meta["needles"]
        (asked,) = [match for match in found if match["key"] == asked_name(example)]
        assert asked["value"].strip() == example.answer and context.count(asked_name(example)) == 1
        around = (context[: asked.start()], context[asked.end() :])
        texts = [re.sub(pattern_of(wording.NEEDLE, 2), "", part) for part in around]
        before, after = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        assert abs(before / (before + after) - example.meta["depth"]) < 0.025


def follow(links: dict[str, list[str]], start: str) -> list[str]:
    """All ends that the links lead to."""
    if start not in links:
        return [start]
    return [end for following in links[start] for end in follow(links, following)]


@pytest.mark.parametrize("direction", ["forward", "backward", "branching"])
def test_threads_lead_to_the_answer(direction: str) -> None:
    for example in task_of(f"threads:{direction}").examples:
        context = context_of(example)
        found = list(pattern_of(wording.LINK).finditer(context))
        links: dict[str, list[str]] = {}
        places = {}
        for match in found:
            links.setdefault(match["key"], []).append(match["value"])
            places[match["key"], match["value"]] = match.start()
        start = asked_name(example)
        ends = follow(links, start)
        named = example.meta["end"]
        assert sorted(end.strip() for end in ends) == sorted([named] if isinstance(named, str) else named)
        assert len(ends) == (2 if direction == "branching" else 1)
        hops = [start]
        while hops[-1] in links:
            hops.append(links[hops[-1]][0])
        assert len(hops) - 1 == example.meta["hops"] == 3
        order = [places[pair] for pair in pairwise(hops)]
        if direction != "branching":
            assert order == sorted(order, reverse=direction == "backward")
        assert len(found) == (6 if direction == "branching" else 3) + 3 * 3
        for end in ends:
            path = "".join(hops[1:-1]) + end
            assert score("regex", f"{path}. The road goes on", example.answer) == 1
        for wrong in hops[:-1]:
            assert score("regex", f"{ends[0]}{wrong}.", example.answer) == 0


def test_threads_alone_is_all_directions() -> None:
    assert Counter(e.meta["direction"] for e in task_of("threads").examples) == {
        "forward": 4, "backward": 4, "branching": 4,
    }  # fmt: skip


def test_only_the_last_name_up_to_the_full_stop_counts() -> None:
    pattern = end_pattern("Velmor")
    for right in (" Velmor.", " Belbax Velmor. Corcim", "Belbax -> Velmor\nCorcim", " Velmor", "\n**Velmor**."):
        assert score("regex", right, pattern) == 1, right
    everything = "".join(f" {name}" for name in code_names())
    for wrong in (" Belbax. Velmor.", " Velmor Belbax.", everything + ".", "", ".", " Velmora.", " Belbax\nVelmor."):
        assert score("regex", wrong, pattern) == 0, wrong


def test_pairs_give_the_answer() -> None:
    for example in task_of("kv_recall").examples:
        context = context_of(example)
        listed = context[context.index(wording.PAIRS_OPEN) + len(wording.PAIRS_OPEN) :]
        listed = listed[: listed.index(wording.PAIRS_CLOSE)]
        assert re.search(f"{NAME}$", listed)
        listed += ","  # the last one has no separator
        pairs = {match["key"]: match["value"] for match in pattern_of(wording.PAIR, 2).finditer(listed)}
        assert len(pairs) == example.meta["pairs"] == (40 if example.meta["length"] > 800 else len(pairs)) > 20
        assert pairs[asked_name(example)].strip() == example.answer
        assert list(pairs).index(asked_name(example)) == round(example.meta["depth"] * (len(pairs) - 1))


def test_the_text_around_is_held_out_real_text() -> None:
    (example,) = load_task("needle", make_tokenizer("needle"), samples=1, lengths=[1500]).examples
    first, *lines = re.sub(pattern_of(wording.NEEDLE, 2), "", context_of(example)).strip().split("\n")
    known = paragraphs(reference_text())
    assert len(lines) > 3 and set(lines) <= set(known)
    assert any(paragraph.endswith(first) for paragraph in known)


def test_the_default_grid() -> None:
    task = load_task("needle", make_tokenizer("needle"))
    cells = Counter((e.meta["length"], e.meta["depth"]) for e in task.examples)
    assert len(cells) == 15 and set(cells.values()) == {1}
    assert {length for length, _ in cells} == {1024, 2048, 4096}


def test_spread_is_even() -> None:
    grid = [{"depth": i} for i in range(6)]
    for count in range(1, 20):
        cells = spread(grid, count)
        assert len(cells) == count
        times = Counter(cell["depth"] for cell in cells)
        assert max(times.values()) - min(times.get(i, 0) for i in range(6)) <= 1
    assert [cell["depth"] for cell in spread(grid, 2)] == [1, 4]


def test_place_prefers_the_ends_of_sentences() -> None:
    words = [f" w{i}." if i % 50 == 49 else f" w{i}" for i in range(1000)]
    sizes = [1] * 1000
    assert place(words, sizes, [(0.505, " FACT")]).split("w499.")[1].startswith(" FACT w500")
    assert place(words, sizes, [(0.52, " FACT")]).split("w519")[1].startswith(" FACT w520")
    assert place(words, sizes, [(1.0, " B"), (0.0, " A")]).startswith(" A w0") and place(words, sizes, []).startswith("w0")


def test_too_short_a_prompt_is_refused(tokenizer) -> None:
    with pytest.raises(LaconicError, match=r"no room for this task: use at least [0-9]+ tokens"):
        load_task("multi_needle", tokenizer, lengths=[32])
    question = "\nWhat is it?"
    least = len(tokenizer(" A fact." + question)["input_ids"])
    assert build_prompt(tokenizer, least, [(0.5, " A fact.")], question, random.Random(0)) == " A fact." + question


def test_perplexity_of_a_file(tmp_path, tokenizer) -> None:
    path = tmp_path / "book.txt"
    path.write_text(reference_text(held_out=False)[5000:25_000], encoding="utf-8")
    task = load_task(f"perplexity:{path}", tokenizer, samples=5, lengths=[300])
    assert task.metric == "perplexity" and len({e.prompt for e in task.examples}) == 5
    assert all(e.prompt in path.read_text(encoding="utf-8") and e.answer is None for e in task.examples)
    short = tmp_path / "short.txt"
    short.write_text("A few words that are not many at all, and that is the end of it.\n", encoding="utf-8")
    task = load_task(f"perplexity:{short}", tokenizer, samples=1)
    assert len(task.problems) == 3 and task.examples[0].prompt == short.read_text(encoding="utf-8").strip()
    short.write_text("Word", encoding="utf-8")
    for wrong, reason in ((short, "at least"), (tmp_path / "none.txt", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(LaconicError, match=reason):
            load_task(f"perplexity:{wrong}", tokenizer)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("needel", "did you mean 'needle'"),
        ("kv-recall", "did you mean 'kv_recall'"),
        ("threads:forwards", "did you mean 'threads:forward'"),
        ("", "use one of needle, "),
        ("zzzzz", "use one of needle, .* or a .jsonl file"),
        ("needle:4", "did you mean 'needle'"),
    ],
)
def test_unknown_names(name: str, reason: str) -> None:
    with pytest.raises(LaconicError, match=reason) as caught:
        load_task(name, None)
    assert "\n" not in str(caught.value)


def test_impossible_settings(tmp_path) -> None:
    tokenizer = make_tokenizer("needle")
    for settings in ({"samples": 0}, {"lengths": []}, {"lengths": [0]}, {"lengths": [-5]}, {"samples": -3}):
        with pytest.raises(LaconicError):
            load_task("needle", tokenizer, **settings)
    (tmp_path / "task.txt").write_text("x")
    with pytest.raises(LaconicError, match=r"a task file is named \.jsonl"):
        load_task(str(tmp_path / "task.txt"), tokenizer)


def test_templates_are_held_out_and_have_no_length():
    tokenizer = make_tokenizer("plain")
    task = load_task("templates", tokenizer, samples=18, seed=3)
    assert task == load_task("templates", tokenizer, samples=18, seed=3) != load_task("templates", tokenizer, samples=18, seed=4)
    assert task.metric == "exact" and all(is_held_out(example.prompt) for example in task.examples)
    assert [example.meta["kind"] for example in task.examples] == [*KINDS, *KINDS]
    with pytest.raises(LaconicError, match="templates have their own"):
        load_task("templates", tokenizer, lengths=[64])
