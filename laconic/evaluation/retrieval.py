"""The built-in retrieval tasks: needles, threads of links, and key-value lists, in real text.

Keys and values are invented names (see ``laconic.models.names``), sentences come from ``wording``. Sources: needle in a
haystack (Kamradt, 2023); multi-needle (Hsieh et al., 2024, RULER); threads (Roberts et al., 2024, Needle Threading);
key-value recall (Liu et al., 2023, Lost in the Middle).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation import wording
from laconic.evaluation.examples import Example
from laconic.evaluation.prompts import build_prompt, count_tokens
from laconic.models.names import code_names

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLES = 8
HOPS = 3
OTHER_CHAINS = 3
PAIRS = 40
DIRECTIONS = ("forward", "backward", "branching")


def _take(names: list[str], count: int) -> list[str]:
    return [" " + names.pop() for _ in range(count)]


def _fresh_names(rng: random.Random) -> list[str]:
    names = code_names()
    rng.shuffle(names)
    return names


def _room(tokenizer: Any, answer: str, spare: int = 2) -> int:
    """Tokens to generate: the answer, its full stop, and a few more."""
    return count_tokens(tokenizer, f" {answer}.", special=False) + spare


def make_needles(tokenizer: Any, cell: dict[str, Any], rng: random.Random, needles: int = 1) -> Example:
    """``needles`` facts with a key and a value of two names; the one at the cell's depth is asked for."""
    names = _fresh_names(rng)
    facts = [(_take(names, 1)[0], "".join(_take(names, 2))) for _ in range(needles)]
    depths = [cell["depth"], *(rng.random() for _ in facts[1:])]
    sentences = [wording.NEEDLE.format(key=key, value=value) for key, value in facts]
    key, value = facts[0]
    question = wording.NEEDLE_QUESTION.format(key=key)
    prompt = build_prompt(tokenizer, cell["length"], list(zip(depths, sentences, strict=True)), question, rng)
    answer = value.strip()
    return Example(prompt, answer, None, question, _room(tokenizer, answer), {**cell, "needles": needles})


def make_many_needles(tokenizer: Any, cell: dict[str, Any], rng: random.Random) -> Example:
    """Eight needles, one asked for."""
    return make_needles(tokenizer, cell, rng, NEEDLES)


def end_pattern(name: str) -> str:
    """A regular expression for "the last name of the answer, up to the first full stop or line end, is this"."""
    return rf"\A\s*(?:[^.\n]*[^\w.\n])?{name}[^\w.\n]*(?:[.\n]|\Z)"


def make_thread(tokenizer: Any, cell: dict[str, Any], rng: random.Random) -> Example:
    """A chain of links from a start, between other chains; right is an answer that ends with the chain's end.

    ``forward``: the links stand in the text in the order of the path; ``backward``: in reverse; ``branching``: two
    links lead away from the start, either chain's end is right, and the order is random.
    """
    names = _fresh_names(rng)
    hops, direction = cell["hops"], cell["direction"]
    start = _take(names, 1)
    paths = [start + _take(names, hops) for _ in range(2 if direction == "branching" else 1)]
    chains = [_links(path, direction, rng) for path in paths]
    chains += [_links(_take(names, hops + 1), direction, rng) for _ in range(OTHER_CHAINS)]
    sentences = _interleave(chains, rng)
    depths = sorted(rng.random() for _ in sentences)
    question = wording.LINK_QUESTION.format(key=start[0])
    prompt = build_prompt(tokenizer, cell["length"], list(zip(depths, sentences, strict=True)), question, rng)
    ends = [path[-1].strip() for path in paths]
    meta = {**cell, "end": ends[0] if len(ends) == 1 else ends}
    written = "".join(paths[0][1:]).strip()
    patterns = [end_pattern(end) for end in ends]
    answer = patterns[0] if len(patterns) == 1 else patterns
    return Example(prompt, answer, None, question, _room(tokenizer, written), meta)


def _links(path: Sequence[str], direction: str, rng: random.Random) -> list[str]:
    links = [wording.LINK.format(key=a, value=b) for a, b in pairwise(path)]
    if direction == "backward":
        links.reverse()
    elif direction == "branching":
        rng.shuffle(links)
    return links


def _interleave(groups: Sequence[Sequence[str]], rng: random.Random) -> list[str]:
    """All in one random order that keeps the order inside each group."""
    owners = [i for i, group in enumerate(groups) for _ in group]
    rng.shuffle(owners)
    queues = [iter(group) for group in groups]
    return [next(queues[i]) for i in owners]


def make_pairs(tokenizer: Any, cell: dict[str, Any], rng: random.Random) -> Example:
    """A list of pairs in the middle of the text; ``depth`` is the place of the asked pair in the list.

    The list holds 40 pairs, or as many as fill half of the prompt.
    """
    names = _fresh_names(rng)
    pairs = [(_take(names, 1)[0], "".join(_take(names, 2))) for _ in range(PAIRS)]
    size = count_tokens(tokenizer, "".join(wording.PAIR.format(key=k, value=v) for k, v in pairs), special=False)
    pairs = pairs[: max(1, min(PAIRS, PAIRS * cell["length"] // (2 * size)))]
    key, value = pairs[round(cell["depth"] * (len(pairs) - 1))]
    question = wording.PAIR_QUESTION.format(key=key)
    entries = "".join(wording.PAIR.format(key=k, value=v) for k, v in pairs)
    # The last separator gives way to the closing mark.
    listed = wording.PAIRS_OPEN + entries[:-1] + wording.PAIRS_CLOSE
    prompt = build_prompt(tokenizer, cell["length"], [(0.5, listed)], question, rng)
    answer = value.strip()
    return Example(prompt, answer, None, question, _room(tokenizer, answer), {**cell, "pairs": len(pairs)})


Maker = Callable[[Any, dict[str, Any], random.Random], Example]

# name: (how an example is made, metric, settings of the grid besides the length)
TASKS: dict[str, tuple[Maker, str, list[dict[str, Any]]]] = {
    "needle": (make_needles, "contains", [{"depth": depth} for depth in DEPTHS]),
    "multi_needle": (make_many_needles, "contains", [{"depth": depth} for depth in DEPTHS]),
    "threads": (make_thread, "regex", [{"direction": d, "hops": HOPS} for d in DIRECTIONS]),
    **{f"threads:{d}": (make_thread, "regex", [{"direction": d, "hops": HOPS}]) for d in DIRECTIONS},
    "kv_recall": (make_pairs, "contains", [{"depth": depth} for depth in DEPTHS]),
}


def make_examples(name: str, tokenizer: Any, lengths: Sequence[int], samples: int | None, seed: int) -> list[Example]:
    """Examples of a task over the grid lengths x settings: ``samples`` in all, or enough for about 15."""
    make, _, settings = TASKS[name]
    grid = [{"length": length, **setting} for length in lengths for setting in settings]
    count = samples if samples is not None else len(grid) * max(1, 15 // len(grid))
    seen: Counter[str] = Counter()
    examples = []
    for cell in spread(grid, count):
        key = f"{name}/{seed}/{sorted(cell.items())}"
        # Every example has a stream of its own: it stays the same when more of them are asked for.
        examples.append(make(tokenizer, dict(cell), random.Random(f"{key}/{seen[key]}")))
        seen[key] += 1
    return examples


def spread(grid: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """``count`` cells of the grid: each equally often, and the rest evenly spaced over it; in the grid's order."""
    if count < 1:
        raise LaconicError(f"samples is {count}: give 1 or more.")
    whole, rest = divmod(count, len(grid))
    extra = {(2 * i + 1) * len(grid) // (2 * rest) for i in range(rest)}
    return [cell for i, cell in enumerate(grid) for _ in range(whole + (i in extra))]
