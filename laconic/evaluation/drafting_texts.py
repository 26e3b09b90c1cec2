"""What drafting is measured on: prose, code and repetitive text, without any download and held out of all training here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from laconic.errors import LaconicError
from laconic.evaluation.haystack import reference_text
from laconic.models.text_data import python_sources

CHARACTERS = 8  # that are cut out for each token of a prompt; of some tokenizers a prompt comes out a little shorter


def prose(rng: random.Random, size: int) -> Iterator[str]:
    """Stretches of at least ``size`` characters of the Python language reference, from the start of a paragraph on."""
    text = reference_text()
    starts = [at + 2 for at in range(len(text) - size) if text.startswith("\n\n", at)]
    while starts:
        at = rng.choice(starts)
        yield text[at : at + size]


def code(rng: random.Random, size: int) -> Iterator[str]:
    """Stretches of modules of the running Python's standard library, from the start of a line on."""
    paths = python_sources()
    rng.shuffle(paths)
    while paths:
        found = False
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) > 2 * size:
                at = text.rfind("\n", 0, rng.randrange(size, len(text) - size)) + 1
                found = True
                yield text[at : at + size]
        if not found:
            return


def repetitive(rng: random.Random, size: int) -> Iterator[str]:
    """Logs of requests, one JSON object a line."""
    while True:
        users, clock, lines = rng.sample(range(1000, 10_000), 6), rng.randrange(80_000), []
        while sum(map(len, lines)) < size:
            clock += rng.randrange(1, 9)
            path = rng.choice(("/cart", "/checkout", "/login", "/search", "/items/17", "/items/204"))
            moment = f"2025-03-14T{clock // 3600:02}:{clock // 60 % 60:02}:{clock % 60:02}Z"
            line = {"time": moment, "level": "INFO", "service": "shop", "event": "request", "user": rng.choice(users)}
            line |= {"path": path, "status": rng.choice((200, 200, 200, 302, 404))}
            lines.append(json.dumps(line) + "\n")
        yield "".join(lines)[:size]


TEXTS = {"prose": prose, "code": code, "repetitive": repetitive}


def prompts(name: str, tokenizer: Any, count: int, tokens: int, seed: int) -> list[str]:
    """``count`` beginnings of about ``tokens`` tokens, which a model is to continue.

    Args:
        name: prose, code or repetitive.
    """
    source = TEXTS[name](random.Random(f"{name} {seed}"), CHARACTERS * tokens)
    found: list[str] = []
    for text in source:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        found.append(tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd"))  # a letter may have been cut in two
        if len(found) == count:
            return found
    raise LaconicError(f"There is no {name} of {tokens} tokens on this machine: give fewer with --lengths, or other workloads.")
